"""The values of `sgd_agc_` on every backend and instruction set, against float64."""

import itertools
import math
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from .helpers import LAYOUTS, nothing_else_written, sized, threads
from .sgd_agc_cases import (
    KERNELS,
    OPTIONS,
    RULES,
    Parameter,
    assert_stepped,
    assert_steps,
    average_dtype,
    bits,
    expected_step,
    random_parameter,
    step,
    step_groups,
    using,
)
from .strategies import SPECIALS, shapes, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [
    *[(), (1,), (7,), (5, 1, 1, 1), (1, 1, 1, 1), (1, 64, 1, 1), (1, 6), (6, 1), (4, 33), (3, 5, 7), (2, 3, 5, 7)],
    *[(2, 3, 2, 3, 2), (1, 3, 3, 3), (9, 1, 3, 1), (13, 301)],
]
# The options of a step that are not a matter of size, all together.
SWITCHES = [
    {"nesterov": False},
    {"nesterov": False, "dampening": 0.25},
    {"maximize": True},
    {"clip_factor": None},
    {"clip_factor": None, "maximize": True, "nesterov": False},
    {"weight_decay": 0.0},
    {"momentum": 0.0, "nesterov": False},
    {"lr": 0.0},
    {"ema_decay": 0.0},
    {"ema_decay": 1.0},
    {"clip_factor": 0.0},
    {"clip_factor": 0.1, "eps": 30.0},
    {"clip_factor": 1e3},
]


@pytest.fixture(params=KERNELS)
def backend(request) -> Iterator[str]:
    with using(request.param) as name:
        yield name


@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
@pytest.mark.parametrize("rule", RULES)
def test_shapes(backend, rule, states):
    parameters = [random_parameter(shape, states=states) for shape in SHAPES]
    before = [p.weight.clone() for p in parameters]
    assert_steps(backend, parameters, rule=rule)
    assert not any(map(torch.equal, before, [p.weight for p in parameters]))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 1023, 4608, 100_000])
def test_unit_lengths(backend, length):
    assert_steps(backend, [random_parameter((length,)), random_parameter((sized(5, 2, backend), length))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
def test_dtypes(backend, dtype, states):
    of_each = itertools.product(((9,), (6, 1, 1, 1), (6, 35), (3, 8, 3, 3)), DTYPES)
    assert_steps(backend, [random_parameter(shape, dtype, grad_dtype, states) for shape, grad_dtype in of_each])


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_are_rounded_once_and_to_nearest_even(backend, weight_dtype, grad_dtype):
    """What is stored is exact in float32, and every second value lies halfway between two of 16 bits."""
    ulp = torch.finfo(weight_dtype).eps
    weight = torch.arange(1.0, 2.0, 2 * ulp)
    p = Parameter(weight.to(weight_dtype), torch.full_like(weight, -ulp).to(grad_dtype), weight.to(weight_dtype))
    options = {"lr": 0.5, "momentum": 1.0, "nesterov": False, "weight_decay": 0.0, "clip_factor": None}
    step([p], backend, **options)
    momentum = weight - ulp
    assert torch.equal(p.momentum_buffer, momentum.to(weight_dtype))
    assert torch.equal(p.weight, (weight - 0.5 * momentum).to(weight_dtype))


@pytest.mark.parametrize("options", SWITCHES, ids=str)
@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
def test_options(backend, options, states):
    of_each = itertools.product(((), (6, 35)), DTYPES)
    assert_steps(backend, [random_parameter(shape, dtype, None, states) for shape, dtype in of_each], **options)


@pytest.mark.parametrize("momentum, average", [(True, False), (False, True)])
@pytest.mark.parametrize("clip_factor", [0.01, None])
def test_a_state_alone(backend, momentum, average, clip_factor):
    parameters = [random_parameter(shape) for shape in ((7,), (6, 35))]
    for p in parameters:
        p.momentum_buffer = p.momentum_buffer if momentum else None
        p.average = p.average if average else None
    assert_steps(backend, parameters, clip_factor=clip_factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_scalars_in_tensors(backend, shape, dtype):
    scalars = {
        "lr_tensor": torch.full(shape, 0.3, dtype=dtype),
        "grad_scale": torch.full(shape, 1536.0, dtype=dtype),
        "found_inf": torch.zeros(shape, dtype=dtype),
    }
    for name, value in scalars.items():
        assert_steps(backend, [random_parameter(()), random_parameter((6, 35))], **{name: value})
    assert_steps(backend, [random_parameter(()), random_parameter((6, 35))], **scalars)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("clip_factor", [0.01, None])
def test_a_loss_scale_that_is_a_power_of_two_leaves_no_trace(backend, dtype, maximize, clip_factor):
    p = random_parameter((5, 35), dtype)
    p.grad *= 2.0**-3
    scaled = p.clone()
    scaled.grad *= 2.0**8
    options = {"clip_factor": clip_factor, "maximize": maximize}
    step([p], backend, **options)
    step([scaled], backend, grad_scale=torch.tensor(2.0**8), **options)
    for a, b in ((p.weight, scaled.weight), (p.momentum_buffer, scaled.momentum_buffer), (p.average, scaled.average)):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("of_weight", LAYOUTS)
def test_layouts(backend, of_weight):
    """Each of the weight's, with any of some of the other tensors."""
    parameters = []
    for of_others, others in itertools.product(LAYOUTS, (("grad",), ("momentum_buffer",), ("grad", "average"))):
        p = random_parameter((4, 3, 5, 2))
        for name, x in vars(p.clone()).items():
            if x is not None:
                setattr(p, name, LAYOUTS[of_others if name in others else of_weight](x))
        parameters.append(p)
    strides = [x.stride() for p in parameters for x in p.tensors()]
    assert_steps(backend, parameters)
    assert [x.stride() for p in parameters for x in p.tensors()] == strides


VIEWS = {
    "transposed": lambda base: base[:60].view(10, 6).t(),
    "every third row": lambda base: base[:180].view(18, 10)[::3],
    "every fourth element": lambda base: base[:80:4],
    "cropped": lambda base: base[:2000].view(4, 5, 10, 10)[:, 1:4, 2:5, 3:9],
    "cropped channels_last": lambda base: base[:2000].view(4, 10, 10, 5).permute(0, 3, 1, 2)[:, :, 2:5],
    "misaligned by one": lambda base: base[1:331].view(10, 33),
    "misaligned by three, 1-d": lambda base: base[3:70],
    "one row": lambda base: base[:300].view(10, 30)[7:8],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_what_surrounds_views_is_untouched(backend, view, dtype):
    make = VIEWS[view]
    memory = random_parameter((2000,), dtype)
    inside = torch.zeros(2000, dtype=torch.bool)
    make(inside).fill_(True)
    before = memory.clone()
    assert_steps(backend, [Parameter(*map(make, memory.tensors()))])
    for now, then in zip(memory.tensors(), before.tensors(), strict=True):
        assert torch.equal(now[~inside], then[~inside])
        assert torch.equal(now[inside], then[inside]) == (now is memory.grad)


def test_empty_tensors_and_empty_lists(backend):
    step([], backend)
    empty = [random_parameter(shape) for shape in ((0,), (0, 3), (3, 0), (2, 0, 1, 1))]
    step(empty, backend)
    assert_steps(backend, [*empty[:2], random_parameter((4, 6)), *empty[2:]])


@pytest.mark.parametrize("tensor", ["weight", "grad", "momentum_buffer"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_unit(backend, tensor, value):
    of_each = itertools.product(((4, 35), (4, 2, 3, 3)), DTYPES)
    parameters = [random_parameter(shape, dtype) for shape, dtype in of_each]
    for p in parameters:
        getattr(p, tensor).view(4, -1)[1, -1] = value
    assert_steps(backend, parameters)
    for p in parameters:
        assert p.weight.view(4, -1).isfinite().all(dim=1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("clip_factor", [0.01, None])
def test_nan_in_a_gradient_makes_all_of_a_clipped_unit_nan_and_one_weight_of_an_unclipped_one(backend, clip_factor):
    p = random_parameter((3, 35))
    p.grad[1, 3] = math.nan
    step([p], backend, clip_factor=clip_factor)
    assert p.weight.isnan().sum(dim=1).tolist() == [0, 1 if clip_factor is None else 35, 0]


@pytest.mark.parametrize("clip_factor", [0.01, None])
@pytest.mark.parametrize("dtype, value", [(torch.float16, 4e3), (torch.float16, 6e4), (torch.bfloat16, 1e20),
                                          (torch.float32, 1e20), (torch.float32, 1e30), (torch.float32, 1e38),
                                          (torch.float64, 1e120)], ids=str)  # fmt: skip
def test_norms_of_large_gradients_do_not_overflow(backend, dtype, value, clip_factor):
    parameters = [
        Parameter(*[torch.full(shape, x, dtype=dtype) for x in (1.0, value, 0.0)])
        for shape in ((3, 16), (2, 1024), (600,))
    ]
    # Of a group that is not clipped the step itself must be one that float32 holds.
    lr = 0.5 if clip_factor is not None else 0.5 / value
    assert_steps(backend, parameters, lr=lr, clip_factor=clip_factor, nesterov=False)
    assert all((p.weight < 1).all() for p in parameters), "a large gradient became zero"


@pytest.mark.parametrize("weight, grad", [(1e30, 1e38), (1e30, 1e-30), (1e-30, 1.0), (1e-30, 1e-30), (1e-22, 1e-25),
                                          (1e-18, 1.0), (0.0, 1e-30), (1e-3, 3e38), (1e-20, 3e38)])  # fmt: skip
def test_float32_that_does_not_hold_norms_or_factors_costs_no_digits(backend, weight, grad):
    parameters = []
    for shape, dtype in itertools.product(((2, 35), (35,), (2, 1)), (torch.float32, torch.bfloat16)):
        w, g = torch.randn(2, *shape, dtype=torch.float64)
        values = weight * w, grad * g / g.abs().max(), torch.zeros(shape)
        parameters.append(Parameter(*[x.to(dtype) for x in values]))
    assert_steps(backend, parameters, eps=0.0, lr=0.5, weight_decay=0.0)


@pytest.mark.parametrize("rule", RULES)
def test_zero_weights_are_bounded_by_eps(backend, rule):
    p = Parameter(torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(3, 4))
    step([p], backend, rule=rule, clip_factor=0.5, eps=2.0**-4, lr=0.5, nesterov=False)
    assert torch.equal(p.momentum_buffer, torch.full((3, 4), 2.0**-6))
    assert torch.equal(p.weight, torch.full((3, 4), -(2.0**-7)))


def test_decay_comes_after_clipping(backend):
    """The authors' order: a norm of 1 is clipped to 1/2, and a quarter of the weight is added to that, unclipped."""
    p = Parameter(torch.full((1, 4), 1.0), torch.full((1, 4), 8.0))
    step([p], backend, clip_factor=0.5, weight_decay=0.25, lr=1.0, momentum=0.0, nesterov=False)
    assert torch.equal(p.weight, torch.full((1, 4), 1.0 - 0.5 - 0.25))


def test_the_norm_is_that_of_the_unscaled_gradient(backend):
    p = Parameter(torch.ones(2, 4), torch.tensor([[2.0**8], [2.0**12]]).expand(2, 4).clone())
    step([p], backend, grad_scale=torch.tensor(2.0**10), clip_factor=0.5, weight_decay=0.0, lr=1.0)
    assert torch.equal(p.weight, torch.tensor([[0.75], [0.5]]).expand(2, 4))


def test_the_average_is_of_the_weights_as_they_are_stored(backend):
    """2^-9 is less than half an ulp of bfloat16's 1: the weight stays, and so does the average."""
    p = Parameter(torch.ones(2, 4).bfloat16(), torch.full((2, 4), 2.0**-9), average=torch.ones(2, 4))
    step([p], backend, clip_factor=None, weight_decay=0.0, lr=1.0, ema_decay=0.5)
    assert torch.equal(p.average, torch.ones(2, 4))


def many_groups() -> tuple[list[Parameter], list[int], list[dict]]:
    """Parameters of all kinds, in turn of four groups that differ in everything."""
    options = [
        {},
        {"clip_factor": None, "lr": 0.5},
        {"nesterov": False, "maximize": True},
        {"momentum": 0.0, "nesterov": False},
    ]
    shapes = (6, 35), (9,), (4, 3, 3, 3), (), (3, 0), (5, 1, 1, 1), (2, 300)
    parameters = [random_parameter(shape, dtype) for shape in shapes for dtype in DTYPES]
    groups = [i % 4 for i in range(len(parameters))]
    for p, group in zip(parameters, groups, strict=True):
        p.momentum_buffer = None if group == 3 else p.momentum_buffer
        p.average = None if group == 1 else p.average
    return parameters, groups, options


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_call_of_several_groups_gives_the_bits_of_a_call_for_each(kernel):
    parameters, groups, options = many_groups()
    apart = [p.clone() for p in parameters]
    lrs = [None, torch.tensor(0.5), torch.tensor(0.25), None]
    scale = torch.tensor(8.0)
    with using(kernel) as backend:
        expected = [
            expected_step(p, lr_tensor=lrs[g], grad_scale=scale, **options[g])
            for p, g in zip(parameters, groups, strict=True)
        ]
        before = [p.clone() for p in parameters]
        step_groups(parameters, groups, options, backend, lrs=lrs, grad_scale=scale)
        for i, of_group in enumerate(options):
            members = [p for p, group in zip(apart, groups, strict=True) if group == i]
            step(members, backend, lr_tensor=lrs[i], grad_scale=scale, **of_group)
    for p, q, old, of_p in zip(parameters, apart, before, expected, strict=True):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(p.tensors(), q.tensors(), strict=True))
        assert_stepped(p, old, of_p, OPTIONS["ema_decay"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_and_two_threads_give_the_same_bits(kernel):
    units, length = sized(100, 10, kernel), sized(30_000, 10_000, kernel)
    first = [random_parameter(shape, dtype) for shape in ((units, 300), (2, length), (length,)) for dtype in DTYPES[:2]]
    results = []
    for count in (1, 2, 2):
        parameters = [p.clone() for p in first]
        with threads(count), using(kernel) as backend:
            step(parameters, backend)
        results.append([x for p in parameters for x in p.tensors()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@st.composite
def parameters_of_any_layout(draw, kernel: str) -> Parameter:
    """Any shape, dtypes, magnitudes and states, each tensor with a layout of its own."""
    shape, dtype, grad_dtype = draw(shapes(kernel)), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    size = draw(st.sampled_from([0.0, 1e-25, 1e-2, 1.0, 1e2, 1e15]))
    weight = draw(tensors(shape, dtype, size, specials=SPECIALS))
    sizes = st.integers(-4, 2) | st.integers(-30, 15)
    grad = draw(tensors(shape, grad_dtype, 10.0 ** draw(sizes), specials=SPECIALS))
    momentum = draw(st.none() | tensors(shape, dtype, specials=SPECIALS))
    return Parameter(weight, grad, momentum, draw(st.none() | tensors(shape, average_dtype(dtype))))


def options_of_any_group() -> st.SearchStrategy:
    return st.fixed_dictionaries({
        "lr": st.floats(1e-3, 2.0),
        "momentum": st.floats(0.1, 1.0),
        "weight_decay": st.sampled_from([0.0, 0.02, 1.0]),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
        "clip_factor": st.sampled_from([None, 0.0, 0.01, 1.0]),
        "eps": st.sampled_from([0.0, 1e-3, 1.0]),
        "ema_decay": st.floats(0.0, 1.0),
    })  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.data(), rule=st.sampled_from(RULES), scale=st.sampled_from([None, 0.5, 3.0, 65536.0]))
def test_any_strides_dtypes_states_and_options(kernel, data, rule, scale):
    options = data.draw(st.lists(options_of_any_group(), min_size=1, max_size=2), label="groups")
    parameters = data.draw(st.lists(parameters_of_any_layout(kernel), min_size=1, max_size=3), label="parameters")
    groups = [data.draw(st.integers(0, len(options) - 1)) for _ in parameters]
    grad_scale = None if scale is None else torch.tensor(scale)
    before = [p.clone() for p in parameters]
    expected = [
        expected_step(p, rule=rule, grad_scale=grad_scale, **options[group])
        for p, group in zip(parameters, groups, strict=True)
    ]
    with using(kernel) as backend, nothing_else_written(*(x for p in parameters for x in p.tensors())):
        step_groups(parameters, groups, options, backend, rule=rule, grad_scale=grad_scale)
    for p, old, of_p, group in zip(parameters, before, expected, groups, strict=True):
        assert_stepped(p, old, of_p, options[group]["ema_decay"])
