"""What `sgd_agc_` accepts, refuses and promises, apart from the values."""

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import nfnets_kernels as nfk
from nfnets_kernels.ops.sgd_agc import Hyperparameters, check_hyperparameters

from .sgd_agc_cases import (
    KERNELS,
    OPTIONS,
    Parameter,
    bits,
    op,
    random_parameter,
    step,
    step_groups,
    using,
)

LAYOUTS = {"contiguous": lambda x: x, "transposed": lambda x: x.t().contiguous().t()}


@pytest.fixture(params=KERNELS)
def backend(request) -> Iterator[str]:
    with using(request.param) as name:
        yield name


def counted(shape: tuple[int, ...] = (4, 6), dtype: torch.dtype = torch.float32) -> Parameter:
    """With all states."""
    p = random_parameter(shape, dtype)
    p.statistics = torch.zeros(shape[0] if len(shape) > 1 else 1, 3)
    return p


def laid_out(layout: str) -> Parameter:
    p = counted()
    p.weight, p.momentum_buffer = (LAYOUTS[layout](x) for x in (p.weight, p.momentum_buffer))
    return p


def written(p: Parameter) -> list[Tensor]:
    return [x for x in p.tensors() if x is not p.grad]


def same_bits(p: Parameter, q: Parameter) -> list[bool]:
    return [torch.equal(bits(a), bits(b)) for a, b in zip(p.tensors(), q.tensors(), strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [1.0, -1.0, math.inf, math.nan])
def test_nothing_is_written_where_infinities_were_found(backend, layout, value):
    parameters = [laid_out(layout), counted((7,), torch.bfloat16), counted((2, 9000), torch.float64)]
    parameters[0].grad[1, 2] = math.inf
    before = [p.clone() for p in parameters]
    for clip_factor in (0.01, None):
        step(parameters, backend, found_inf=torch.tensor(value), clip_factor=clip_factor)
    for p, old in zip(parameters, before, strict=True):
        assert all(same_bits(p, old))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_but_the_gradient_is_written_where_none_were_found(backend, layout):
    p = laid_out(layout)
    before = p.clone()
    step([p], backend, found_inf=torch.tensor(0.0))
    assert same_bits(p, before) == [False, True, False, False, False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_versions_of_all_that_is_written_are_bumped_and_no_others(backend, layout):
    p, scalars = laid_out(layout), {"lr_tensor": torch.tensor(0.5), "found_inf": torch.tensor(0.0)}
    read = [p.grad, *scalars.values()]
    before = [x._version for x in [*written(p), *read]]
    step([p], backend, **scalars)
    bumped = [x._version > version for x, version in zip([*written(p), *read], before, strict=True)]
    assert bumped == [True] * 4 + [False] * 3


def test_autograd_notices_that_a_saved_weight_was_updated(backend):
    p = random_parameter((4, 6), states=False)
    p.weight.requires_grad_()
    loss = p.weight.square().sum()
    step([p], backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made_inside", [False, True])
def test_grad_modes(backend, mode, made_inside):
    p = counted()
    with mode():
        p = counted() if made_inside else p
        p.weight.requires_grad_(mode is contextlib.nullcontext)
        p.grad.requires_grad_(mode is contextlib.nullcontext)
        before = p.weight.detach().clone()
        step([p], backend)
    assert not torch.equal(p.weight, before)
    assert all(x.grad_fn is None for x in p.tensors())


def test_tensors_without_a_state_beside_others_with_one(backend):
    parameters = [counted() for _ in range(3)]
    parameters[0].momentum_buffer = parameters[1].average = parameters[2].statistics = None
    alone = [p.clone() for p in parameters]
    step_groups(parameters, [0, 0, 0], [{}], backend)
    for p, q in zip(parameters, alone, strict=True):
        step([q], backend)
        assert all(same_bits(p, q))


def test_views_of_one_buffer(backend):
    """As the parameters of flattened modules are."""
    shapes = (6, 5), (7,), (4, 3)
    parameters = [random_parameter(shape) for shape in shapes]
    apart = [p.clone() for p in parameters]
    sizes = [math.prod(shape) for shape in shapes]
    for name in ("weight", "grad", "momentum_buffer"):
        flat = torch.cat([getattr(p, name).flatten() for p in parameters])
        for p, view in zip(parameters, flat.split(sizes), strict=True):
            setattr(p, name, view.view(p.weight.shape))
    step(parameters, backend)
    step(apart, backend)
    for p, q in zip(parameters, apart, strict=True):
        torch.testing.assert_close(p.weight, q.weight)
        torch.testing.assert_close(p.momentum_buffer, q.momentum_buffer)


def test_what_serves_is_recorded_and_described():
    assert set(nfk.backend.describe().serving["cpu"]) >= {"agc", "sgd_agc"}
    for name in {kernel.partition(":")[0] for kernel in KERNELS}:
        with nfk.backend.recording() as record:
            step([counted(), counted((3,))], name)
        assert record == [("sgd_agc", name)]
    with nfk.backend.recording() as record:
        step([], "auto")
        step([counted()], "auto")
    assert record == [("sgd_agc", nfk.backend.describe().serving["cpu"]["sgd_agc"])]


BAD_TENSORS: dict[str, tuple[Callable[[Parameter], None], type[Exception], str]] = {
    "grad of another shape": (lambda p: setattr(p, "grad", torch.ones(6, 4)), ValueError,
                              r"parameters\[1\].grad must have the shape \(4, 6\), got \(6, 4\)"),
    "integer grad": (lambda p: setattr(p, "grad", torch.ones(4, 6, dtype=torch.int32)), TypeError,
                     r"parameters\[1\].grad must have one of the dtypes .* got torch.int32"),
    "sparse grad": (lambda p: setattr(p, "grad", p.grad.to_sparse()), TypeError,
                    r"parameters\[1\].grad must be a dense .* torch.sparse_coo"),
    "expanded grad": (lambda p: setattr(p, "grad", torch.ones(6).expand(4, 6)), ValueError,
                      r"parameters\[1\].grad may hold one element twice"),
    "complex weight": (lambda p: setattr(p, "weight", p.weight.cfloat()), TypeError,
                       r"parameters\[1\] must have one of the dtypes .* got torch.complex64"),
    "expanded weight": (lambda p: setattr(p, "weight", torch.ones(6).expand(4, 6)), ValueError,
                        r"parameters\[1\] may hold one element twice .*strides \(0, 1\)"),
    "momentum of another shape": (lambda p: setattr(p, "momentum_buffer", torch.zeros(4, 5)), ValueError,
                                  r"momentum_buffer of parameters\[1\] must be \(4, 6\) .* got \(4, 5\)"),
    "momentum of another dtype": (lambda p: setattr(p, "momentum_buffer", p.momentum_buffer.double()), ValueError,
                                  r"momentum_buffer of parameters\[1\] must be .*float32.* got .*float64"),
    "expanded momentum": (lambda p: setattr(p, "momentum_buffer", torch.zeros(()).expand(4, 6)), ValueError,
                          r"momentum_buffer of parameters\[1\] may hold one element twice"),
    "sparse momentum": (lambda p: setattr(p, "momentum_buffer", p.momentum_buffer.to_sparse()), TypeError,
                        r"momentum_buffer of parameters\[1\] must be a dense"),
    "average of another dtype": (lambda p: setattr(p, "average", p.average.bfloat16()), ValueError,
                                 r"ema of parameters\[1\] must be .*float32.* got .*bfloat16"),
    "expanded average": (lambda p: setattr(p, "average", torch.zeros(4, 1).expand(4, 6)), ValueError,
                         r"ema of parameters\[1\] may hold one element twice"),
    "too few statistics": (lambda p: setattr(p, "statistics", torch.zeros(3, 3)), ValueError,
                           r"statistics of parameters\[1\] must be \(4, 3\) .* got \(3, 3\)"),
    "statistics in pairs": (lambda p: setattr(p, "statistics", torch.zeros(4, 2)), ValueError,
                            r"statistics of parameters\[1\] must be \(4, 3\) .* got \(4, 2\)"),
    "integer statistics": (lambda p: setattr(p, "statistics", torch.zeros(4, 3, dtype=torch.int32)), ValueError,
                           r"statistics of parameters\[1\] must be .*float32.* got .*int32"),
    "transposed statistics": (lambda p: setattr(p, "statistics", torch.zeros(3, 4).t()), ValueError,
                              r"statistics of parameters\[1\] must be .*contiguous.* strides \(1, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(case):
    spoil, error, message = BAD_TENSORS[case]
    parameters = [counted() for _ in range(3)]
    spoil(parameters[1])
    before = [p.clone() for p in parameters]
    with pytest.raises(error, match=message):
        step(parameters, "auto")
    assert all(same_bits(parameters[0], before[0]))
    assert all(same_bits(parameters[2], before[2]))


@pytest.mark.parametrize("name", ["grad", "momentum_buffer", "average", "statistics"])
def test_a_tensor_on_another_device_is_named(name):
    p = counted()
    setattr(p, name, getattr(p, name).to("meta"))
    with pytest.raises(ValueError, match=r"on (the device )?cpu, got .*meta"):
        step_groups([p], [0], [{}], "auto")


LISTS = [(1, "grads"), (2, "momentum_buffers"), (3, "averages"), (4, "statistics")]


@pytest.mark.parametrize("index, name", LISTS)
def test_lists_of_different_lengths_are_named_and_nothing_is_written(index, name):
    parameters = [counted(), counted()]
    before = [p.clone() for p in parameters]
    columns = [[p.tensors()[i] for p in parameters] for i in range(5)]
    columns[index] = columns[index][:1]
    with pytest.raises(ValueError, match=f"{name} must have an entry for each of 2 weights, got 1"):
        op(*columns, None, None, None, **OPTIONS, rule="timm", backend="auto")
    for p, old in zip(parameters, before, strict=True):
        assert all(same_bits(p, old))


BAD_OPTIONS = [
    *[(name, value) for name in ("lr", "momentum", "dampening", "weight_decay", "clip_factor", "eps", "ema_decay")
      for value in (-0.1, math.nan, math.inf)],
    *[("ema_decay", 1.5), ("rule", "lamb"), ("backend", "tpu"), ("dampening", 0.5), ("momentum", 0.0)],
]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD_OPTIONS)
def test_bad_options_are_named_and_nothing_is_written(name, value):
    p = counted()
    before = p.clone()
    backend = value if name == "backend" else "auto"
    options = {} if name == "backend" else {name: value}
    for parameters in ([p], []):
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            step(parameters, backend, **options)
    assert all(same_bits(p, before))


@pytest.mark.parametrize("name", ["lr_tensor", "grad_scale", "found_inf"])
@pytest.mark.parametrize("shape", [(0,), (2,), (1, 2)])
def test_scalars_of_more_or_less_than_one_element_are_named(name, shape):
    p = counted()
    before = p.clone()
    with pytest.raises(ValueError, match=rf"{name} must have one element, got .*\({shape[0]}"):
        step([p], "auto", **{name: torch.ones(shape)})
    assert all(same_bits(p, before))


@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay", "clip_factor", "eps", "ema_decay"])
def test_options_of_a_wrong_type_are_named(name):
    with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
        check_hyperparameters(Hyperparameters(*{**OPTIONS, name: "0.1"}.values()))


@pytest.mark.parametrize("name", sorted({kernel.partition(":")[0] for kernel in KERNELS}))
@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
def test_opcheck(name, states):
    parameters = [counted(), counted((5,), torch.bfloat16), counted((2, 5, 3, 3)), counted((3, 1))]
    parameters[0].weight.requires_grad_()
    parameters[2].weight = parameters[2].weight.to(memory_format=torch.channels_last)
    columns = [[vars(p)[field] for p in parameters] for field in vars(parameters[0])]
    columns = columns if states else [*columns[:2], [], [], []]
    scalars = [torch.tensor(0.5), torch.tensor(8.0), torch.tensor(0.0)] if states else [None] * 3
    torch.library.opcheck(op.default, (*columns, *scalars, *OPTIONS.values(), "timm", name))


def test_fake_and_meta_tensors_stay_as_they_are():
    p = counted()
    with FakeTensorMode() as mode:
        step([Parameter(*map(mode.from_tensor, p.tensors()))], "auto")
    step([Parameter(*[x.to("meta") for x in p.tensors()])], "auto")


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(compiler):
    def train(x: Tensor, p: Parameter, scale: Tensor, found: Tensor) -> Tensor:
        grad = x @ p.grad
        columns = [p.weight], [grad], [p.momentum_buffer], [p.average], [p.statistics]
        op(*columns, None, scale, found, **OPTIONS, rule="timm", backend="auto")
        return p.weight.sum() + p.average.sum()

    torch._dynamo.reset()
    compiled = torch.compile(train, fullgraph=True, backend=compiler)
    p = counted()
    q, x = p.clone(), torch.eye(4)
    for found in (0.0, 0.0, 1.0):
        scalars = torch.tensor(4.0), torch.tensor(found)
        torch.testing.assert_close(compiled(x, p, *scalars), train(x, q, *scalars))
        torch.testing.assert_close(p.tensors(), q.tensors())
    assert p.statistics[:, 0].tolist() == [2.0] * 4
