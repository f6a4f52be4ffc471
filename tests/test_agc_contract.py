"""What `nfk.agc_` accepts, refuses and promises, apart from the values."""

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import nfnets_kernels as nfk

from .agc_cases import KERNELS, assert_clipped, float64_clipped, parameter, random_pair, using

op = torch.ops.nfnets_kernels.agc_


@pytest.fixture(params=KERNELS)
def backend(request) -> Iterator[str]:
    with using(request.param) as name:
        yield name


def clippable(shape: tuple[int, ...] = (3, 4)) -> nn.Parameter:
    return parameter(torch.ones(shape), torch.full(shape, 7.0))


def is_clipped(p: Tensor) -> bool:
    return p.grad is not None and bool((p.grad < 0.011).all())


def test_parameters_without_gradient_are_skipped(backend):
    parameters = [clippable(), nn.Parameter(torch.ones(2)), torch.ones(3), clippable((5,))]
    nfk.agc_(parameters, backend=backend)
    assert [p.grad is None for p in parameters] == [False, True, True, False]
    assert is_clipped(parameters[0])
    assert is_clipped(parameters[3])


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: [p], lambda p: (p,), lambda p: {p}, lambda p: iter([p]),
                                  lambda p: (q for q in [p]), lambda p: {p: 1}.keys()])  # fmt: skip
def test_one_tensor_and_any_iterable_are_accepted(wrap):
    p = clippable()
    assert nfk.agc_(wrap(p)) is None
    assert is_clipped(p)


def test_a_plain_tensor_with_a_gradient_is_clipped():
    weight = torch.ones(3, 4, requires_grad=True)
    (7.0 * weight).sum().backward()
    nfk.agc_([weight])
    assert is_clipped(weight)


def test_a_parameter_that_comes_twice_is_clipped_once(backend):
    """A second clip would multiply by bound / 1e-6: the bound, 2^-24, is exactly what the first leaves."""
    p = parameter(torch.full((2, 1), 2.0**-20), torch.ones(2, 1))
    nfk.agc_([p, clippable(), p], clip_factor=2.0**-4, eps=0.0, backend=backend)
    assert torch.equal(p.grad, torch.full((2, 1), 2.0**-24))
    nfk.agc_([p], clip_factor=2.0**-4, eps=0.0, backend=backend)
    assert (p.grad < 2.0**-27).all()


def test_gradients_that_are_views_of_one_buffer(backend):
    pairs = [random_pair(shape) for shape in ((6, 5, 3, 3), (7,), (6, 5), (), (5, 4, 1, 1))]
    flat = torch.cat([grad.flatten() for _, grad in pairs])
    views = torch.split(flat, [grad.numel() for _, grad in pairs])
    parameters = [parameter(weight, view.view_as(weight)) for (weight, _), view in zip(pairs, views, strict=True)]
    nfk.agc_(parameters, backend=backend)
    expected = torch.cat([float64_clipped(*pair).flatten() for pair in pairs])
    assert_clipped(flat, expected, 45)


def sparse() -> nn.Parameter:
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    return embedding.weight


def other_shape() -> nn.Parameter:
    p = clippable((6,))
    p.data = torch.ones(2, 3)
    return p


def float8() -> Tensor:
    p = torch.ones(4).to(torch.float8_e4m3fn).requires_grad_()
    p.grad = torch.ones(4).to(torch.float8_e4m3fn)
    return p


BAD = {
    "sparse": (sparse, TypeError, r"parameters\[1\].grad must be a dense .* torch.sparse_coo"),
    "complex": (lambda: parameter(torch.ones(3, dtype=torch.cfloat), torch.ones(3, dtype=torch.cfloat)), TypeError,
                r"parameters\[1\] must have one of the dtypes .* got torch.complex64"),
    "float8": (float8, TypeError, r"parameters\[1\] must have one of the dtypes .* got torch.float8"),
    "expanded": (lambda: parameter(torch.ones(3, 4), torch.ones(4).expand(3, 4)), ValueError,
                 r"parameters\[1\].grad may hold one element twice .*strides \(0, 1\).*clone"),
    "overlapping": (lambda: parameter(torch.ones(3, 3), torch.ones(6).as_strided((3, 3), (1, 1))), ValueError,
                    r"parameters\[1\].grad may hold one element twice"),
    "other shape": (other_shape, ValueError, r"parameters\[1\].grad must have the shape \(2, 3\), got \(6,\)"),
    "string": (lambda: "weight", TypeError, r"parameters\[1\] must be a tensor, got str"),
    "None": (lambda: None, TypeError, r"parameters\[1\] must be a tensor, got NoneType"),
    "named": (lambda: ("weight", clippable()), TypeError, r"parameters\[1\] must be a tensor, got tuple"),
    "list": (lambda: [clippable()], TypeError, r"parameters\[1\] must be a tensor, got list"),
    "param_group": (lambda: {"params": [clippable()]}, TypeError, r"parameters\[1\] must be a tensor, got dict"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_clipped_is_named_and_nothing_is_written(case):
    make, error, message = BAD[case]
    first, last = clippable(), clippable()
    with pytest.raises(error, match=message):
        nfk.agc_([first, make(), last])
    assert (first.grad == 7.0).all()
    assert (last.grad == 7.0).all()


def test_the_index_in_a_message_is_the_one_in_the_callers_list():
    p = clippable()
    with pytest.raises(TypeError, match=r"parameters\[2\]"):
        nfk.agc_([p, p, "weight"])


@pytest.mark.parametrize("value", [None, 3, nn.Linear(2, 2)], ids=["None", "int", "module"])
def test_what_is_no_iterable_of_tensors_is_named(value):
    with pytest.raises(TypeError, match=f"parameters must be .* got {type(value).__name__}"):
        nfk.agc_(value)


def test_a_gradient_on_another_device_is_named():
    with pytest.raises(ValueError, match=r"parameters\[3\].grad must be on the device cpu, got meta"):
        nfk.functional.ops.agc.check_gradient("parameters[3]", torch.ones(3), torch.ones(3, device="meta"))


@pytest.mark.parametrize("strides", [(1, 3), (4, 1), (9, 3), (12, 4)])
def test_gaps_between_elements_are_no_overlap(strides):
    memory = torch.full((50,), 7.0)
    p = parameter(torch.ones(3, 3), memory.as_strided((3, 3), strides))
    nfk.agc_(p)
    assert is_clipped(p)
    assert (memory == 7.0).sum() == 41


BAD_OPTIONS = [
    *[(name, value) for name in ("clip_factor", "eps") for value in (-0.1, math.nan, math.inf, -math.inf)],
    *[("norm_type", value) for value in (0.0, -1.0, -math.inf, math.nan)],
    *[("rule", "lamb"), ("rule", "TIMM"), ("rule", None), ("backend", "tpu"), ("backend", None)],
]
# Refused where there is something to clip; the emulator of CUDA serves tensors of the CPU.
MISPLACED = [("backend", "cuda")] if "cuda" not in KERNELS else []


@pytest.mark.parametrize("name, value", BAD_OPTIONS + MISPLACED)
def test_bad_options_are_named_and_nothing_is_written(name, value):
    p = clippable()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        nfk.agc_(p, **{name: value})
    assert (p.grad == 7.0).all()


@pytest.mark.parametrize("name, value", BAD_OPTIONS)
def test_bad_options_are_named_with_nothing_to_clip_too(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        nfk.agc_([nn.Parameter(torch.ones(3))], **{name: value})


@pytest.mark.parametrize("name", ["clip_factor", "eps", "norm_type"])
@pytest.mark.parametrize("value", ["0.1", None], ids=str)
def test_options_of_a_wrong_type_are_named(name, value):
    with pytest.raises(TypeError, match=name):
        nfk.agc_(clippable(), **{name: value})


@pytest.mark.parametrize("weight_shape, grad_shape", [((3,), (3000,)), ((3, 4), (4, 3)), ((1, 4), (8, 4))])
def test_the_op_itself_refuses_a_gradient_of_another_shape(weight_shape, grad_shape):
    """It would read past the end of the weight."""
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        op([torch.ones(weight_shape)], [torch.ones(grad_shape)], 0.01, 1e-3, 2.0, "timm", "auto")


def test_the_op_itself_refuses_lists_of_different_lengths():
    grads = [torch.full((3,), 7.0), torch.full((3,), 7.0)]
    with pytest.raises(ValueError):
        op([torch.ones(3)], grads, 0.01, 1e-3, 2.0, "timm", "auto")
    assert all((grad == 7.0).all() for grad in grads)


def test_only_the_version_of_gradients_is_bumped(backend):
    p, contiguous = clippable(), clippable()
    p.grad = torch.full((4, 3), 7.0).t()
    before = [(q._version, q.grad._version) for q in (p, contiguous)]
    nfk.agc_([p, contiguous], backend=backend)
    for q, (weight_version, grad_version) in zip((p, contiguous), before, strict=True):
        assert q._version == weight_version
        assert q.grad._version > grad_version


def test_autograd_notices_that_a_saved_gradient_was_clipped(backend):
    p = nn.Parameter(torch.ones(3, 4))
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    penalty = p.grad.square().sum()
    nfk.agc_(p, backend=backend)
    assert is_clipped(p)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_gradients_that_require_grad_are_clipped(backend):
    p = nn.Parameter(torch.ones(3, 4))
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    assert p.grad.requires_grad
    nfk.agc_(p, backend=backend)
    assert is_clipped(p)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make_inside", [False, True])
def test_grad_modes(backend, mode, make_inside):
    p = clippable()
    with mode():
        p = clippable() if make_inside else p
        nfk.agc_(p, backend=backend)
    assert is_clipped(p)


def test_the_op_itself_records_no_graph(backend):
    weight, (first, second) = nn.Parameter(torch.ones(3, 4)), (torch.full((3, 4), 7.0), torch.full((4, 3), 7.0).t())
    op([weight, weight], [first, second], 0.01, 1e-3, 2.0, "timm", backend)
    assert not first.requires_grad
    assert not second.requires_grad


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("rule", ["timm", "deepmind"])
def test_opcheck(backend, requires_grad, rule):
    pairs = [random_pair((3, 4)), random_pair((5,), torch.bfloat16), random_pair((4, 5, 3, 3)), random_pair((0, 3))]
    weights = [weight.requires_grad_(requires_grad) for weight, _ in pairs]
    grads = [pairs[0][1], pairs[1][1], pairs[2][1].to(memory_format=torch.channels_last), pairs[3][1]]
    grads.append(torch.randn(6, 4).t())
    weights.append(torch.randn(4, 6, dtype=torch.float16))
    grads = [grad.requires_grad_(requires_grad) for grad in grads]
    torch.library.opcheck(op.default, (weights, grads, 0.01, 1e-3, 2.0, rule, backend))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiles_into_one_graph(compiler):
    def through_parameters(parameters: list[nn.Parameter]) -> Tensor:
        nfk.agc_(parameters, clip_factor=0.02)
        return parameters[0].grad * 2

    def through_the_op(parameters: list[nn.Parameter]) -> Tensor:
        grads = [p.grad for p in parameters]
        op([p.detach() for p in parameters], grads, 0.02, 1e-3, 2.0, "timm", "auto")
        return grads[0] * 2

    for function in (through_parameters, through_the_op):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5, 2, 3, 3))]
        for _ in range(2):
            for p in parameters:
                p.grad = torch.randn_like(p)
            copies = [parameter(p.detach().clone(), p.grad.clone()) for p in parameters]
            nfk.agc_(copies, clip_factor=0.02)
            doubled = compiled(parameters)
            assert torch.equal(doubled, copies[0].grad * 2)
            assert all(torch.equal(p.grad, copy.grad) for p, copy in zip(parameters, copies, strict=True))


@pytest.mark.parametrize("counts, message", [
    (torch.zeros(2, 3), r"must be \(3, 3\).*got \(2, 3\)"),
    (torch.zeros(3, 2), r"got \(3, 2\)"),
    (torch.zeros(3, 3, dtype=torch.float64), "float64"),
    (torch.zeros(3, 3).t(), r"contiguous.*strides \(1, 3\)"),
], ids=["units", "columns", "dtype", "strides"])  # fmt: skip
def test_counts_that_kernels_would_write_beyond_are_refused(backend, counts, message):
    weights, grads = [torch.ones(3, 4)] * 2, [torch.full((3, 4), 7.0) for _ in range(2)]
    with pytest.raises(ValueError, match=rf"statistics\[1\] .*{message}"):
        op(weights, grads, 0.01, 1e-3, 2.0, "timm", backend, [torch.zeros(3, 3), counts])
    assert (grads[0] == 7.0).all()
