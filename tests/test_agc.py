"""The values of `nfk.agc_` on every backend and instruction set, against float64."""

import itertools
import math
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

import nfnets_kernels as nfk
from nfnets_kernels import backend as backends

from .agc_cases import (
    DTYPES,
    KERNELS,
    NORMS,
    RULES,
    assert_clipped,
    assert_clips,
    bits,
    float64_clipped,
    parameter,
    random_pair,
    unit_length,
    using,
)
from .helpers import nothing_else_written, sized, threads
from .strategies import SPECIALS, shapes, tensors

SHAPES = [
    *[(), (1,), (7,), (5, 1, 1, 1), (1, 1, 1, 1), (1, 64, 1, 1), (1, 6), (6, 1), (4, 33), (3, 5, 7), (2, 3, 5, 7)],
    *[(2, 3, 2, 3, 2), (1, 3, 3, 3), (9, 1, 3, 1), (300, 700)],
]
VIEWS = {
    "transposed": lambda base: base[:60].view(10, 6).t(),
    "transposed inside the unit": lambda base: base[:60].view(3, 5, 4).transpose(1, 2),
    "every second column": lambda base: base[:120].view(6, 20)[:, ::2],
    "every third row": lambda base: base[:180].view(18, 10)[::3],
    "every fourth element": lambda base: base[:80:4],
    "cropped": lambda base: base[:2000].view(4, 5, 10, 10)[:, 1:4, 2:5, 3:9],
    "cropped channels_last": lambda base: base[:2000].view(4, 10, 10, 5).permute(0, 3, 1, 2)[:, :, 2:5],
    "permuted": lambda base: base[:360].view(6, 5, 4, 3).permute(2, 0, 3, 1),
    "misaligned by one": lambda base: base[1:331].view(10, 33),
    "misaligned by three, 1-d": lambda base: base[3:70],
    "one row": lambda base: base[:300].view(10, 30)[7:8],
}


@pytest.fixture(params=KERNELS)
def backend(request) -> Iterator[str]:
    with using(request.param) as name:
        yield name


def test_every_instruction_set_of_this_cpu_is_tested():
    built = {"AVX512": 3, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 1)
    expected = ["cpu:baseline", "cpu:avx2", "cpu:avx512"][:built]
    assert [kernel for kernel in KERNELS if kernel.startswith("cpu")] == expected
    assert "reference" in KERNELS
    assert backends.extension.isa() == expected[-1].removeprefix("cpu:"), "auto is not the widest"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, rule):
    weight, grad = random_pair(shape)
    before = grad.clone()
    assert not torch.equal(assert_clips(backend, weight, grad, rule), before)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 1023, 4608, 100_000])
@pytest.mark.parametrize("count", [None, 1, 5])
def test_unit_lengths(backend, count, length):
    assert_clips(backend, *random_pair((length,) if count is None else (count, length)))


def test_rules_differ_in_gains_of_shape_c111(backend):
    weight, grad = torch.tensor([1.0, 4.0, 8.0]).view(3, 1, 1, 1), torch.tensor([8.0, 0.0, 6.0]).view(3, 1, 1, 1)
    for rule, expected in (("timm", [0.5, 0.0, 4.0]), ("deepmind", [3.6, 0.0, 2.7])):
        p = parameter(weight, grad.clone())
        nfk.agc_(p, clip_factor=0.5, rule=rule, backend=backend)
        assert_clipped(p.grad.flatten(), torch.tensor(expected, dtype=torch.float64), 3)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_dtypes_and_norm_types(backend, dtype, norm_type, rule):
    for shape in ((), (9,), (6, 1, 1, 1), (6, 35), (5, 8, 3, 3)):
        assert_clips(backend, *random_pair(shape, dtype), rule, norm_type=norm_type)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_to_nearest_even(backend, dtype):
    grad = torch.arange(1.0, 0.5, -torch.finfo(dtype).eps / 2).to(dtype)
    expected = (grad.float() * 0.75).to(dtype)  # the products are exact, every second one lies halfway
    nfk.agc_(parameter(torch.ones_like(grad), grad), clip_factor=0.75, norm_type=math.inf, backend=backend)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("weight_dtype, grad_dtype", list(itertools.permutations(DTYPES, 2)), ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
def test_mixed_dtypes_through_the_op(backend, weight_dtype, grad_dtype, norm_type):
    weight, grad = random_pair((6, 35))
    weight, grad = weight.to(weight_dtype), grad.to(grad_dtype)
    expected = float64_clipped(weight, grad, norm_type=norm_type)
    torch.ops.nfnets_kernels.agc_([weight], [grad], 0.01, 1e-3, norm_type, "timm", backend)
    # The norm of another weight is taken in float32, so that a float64 gradient is right to the ulps of a float32.
    assert_clipped(grad.float() if grad_dtype == torch.float64 else grad, expected, 35)


def test_gradient_of_another_dtype_than_its_parameter(backend):
    weight, grad = random_pair((6, 35))
    p = nn.Parameter(weight)
    p.grad_dtype = torch.bfloat16
    p.grad = grad.bfloat16()
    expected = float64_clipped(weight, p.grad)
    nfk.agc_(p, backend=backend)
    assert p.grad.dtype == torch.bfloat16
    assert_clipped(p.grad, expected, 35)


def test_thousands_of_tensors_of_mixed_shapes_and_dtypes(backend):
    sizes = torch.randint(1, 40, (sized(2500, 200, backend),)).tolist()
    pairs = [random_pair((n,) if n % 3 else (n, n % 7 + 1), DTYPES[n % 4]) for n in sizes]
    expected = [float64_clipped(*pair) for pair in pairs]
    nfk.agc_([parameter(*pair) for pair in pairs], backend=backend)
    for dtype in DTYPES:
        same = [i for i, (_, grad) in enumerate(pairs) if grad.dtype == dtype]
        actual = torch.cat([pairs[i][1].flatten() for i in same])
        assert_clipped(actual, torch.cat([expected[i].flatten() for i in same]), 40)


def test_empty_tensors_and_empty_lists(backend):
    for parameters in ([], iter(()), [parameter(torch.ones(3), None)]):
        nfk.agc_(parameters, backend=backend)
    weight, grad = random_pair((4, 6))
    expected = float64_clipped(weight, grad)
    empty = [parameter(torch.ones(shape), torch.ones(shape)) for shape in ((0,), (0, 3), (3, 0), (2, 0, 1, 1))]
    nfk.agc_([*empty[:2], parameter(weight, grad), *empty[2:]], backend=backend)
    assert_clipped(grad, expected, 6)


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (3, 4, 3, 2, 3)], ids=str)
@pytest.mark.parametrize("weight_last, grad_last", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("rule", RULES)
def test_channels_last(backend, shape, weight_last, grad_last, rule):
    channels_last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    weight, grad = random_pair(shape)
    weight = weight.to(memory_format=channels_last) if weight_last else weight
    grad = grad.to(memory_format=channels_last) if grad_last else grad
    strides = grad.stride()
    assert assert_clips(backend, weight, grad, rule).stride() == strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rule", RULES)
def test_views_are_clipped_in_place_and_what_surrounds_them_is_untouched(backend, view, dtype, rule):
    make = VIEWS[view]
    weights, memory = torch.randn(2000).to(dtype), torch.randn(2000).to(dtype)
    inside = torch.zeros(2000, dtype=torch.bool)
    make(inside).fill_(True)
    before, before_weights = memory.clone(), weights.clone()
    assert_clips(backend, make(weights), make(memory), rule)
    assert torch.equal(memory[~inside], before[~inside])
    assert not torch.equal(memory[inside], before[inside])
    assert torch.equal(weights, before_weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 35), (4, 2, 3, 3), (35,)], ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
def test_nan_in_a_gradient_makes_its_unit_nan_and_no_other(backend, shape, dtype, norm_type):
    weight, grad = random_pair(shape, dtype)
    expected = grad.clone()
    nfk.agc_(parameter(weight, expected), norm_type=norm_type, backend=backend)
    expected[1 if len(shape) > 1 else slice(None)] = math.nan
    grad.view(shape[0], -1)[1, -1] = math.nan
    nfk.agc_(parameter(weight, grad), norm_type=norm_type, backend=backend)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_weight_makes_its_unit_nan_and_no_other(backend, dtype, norm_type):
    weight, grad = random_pair((4, 35), dtype)
    grad[1] *= 1e-3
    weight[1, 17] = math.nan
    grad = assert_clips(backend, weight, grad, norm_type=norm_type)
    assert grad.isnan().all(dim=1).tolist() == grad.isnan().any(dim=1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("rule", RULES)
def test_zero_weights_are_bounded_by_eps(backend, rule):
    grad = assert_clips(backend, torch.zeros(3, 4), torch.ones(3, 4), rule, clip_factor=0.5, eps=2.0**-4)
    assert torch.equal(grad, torch.full((3, 4), 2.0**-6))


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_zero_gradients_stay_zero(backend, weight, eps):
    assert torch.equal(assert_clips(backend, torch.full((3, 4), weight), torch.zeros(3, 4), eps=eps), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_factor_zero_zeroes_and_eps_zero_zeroes_only_where_the_weight_is_zero(backend, dtype):
    weight, grad = random_pair((5, 35), dtype)
    weight[2] = 0.0
    assert not assert_clips(backend, weight, grad.clone(), clip_factor=0.0).any()
    grad = assert_clips(backend, weight, grad, eps=0.0)
    assert grad.any(dim=1).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"clip_factor": 1e3}, {"eps": 1e6}], ids=str)
def test_generous_options_change_nothing(backend, dtype, options):
    weight, grad = random_pair((5, 35), dtype)
    before = grad.clone()
    assert torch.equal(assert_clips(backend, weight, grad, **options), before)


@pytest.mark.parametrize("value, dtype", [(4e3, torch.float16), (65504.0, torch.float16), (1e20, torch.float32),
                                          (1e20, torch.bfloat16), (1e120, torch.float64)], ids=str)  # fmt: skip
def test_norms_do_not_overflow(backend, dtype, value):
    for length in (1, 16, 4608):
        grad = torch.full((3, length), value, dtype=dtype)
        assert assert_clips(backend, torch.ones(3, length, dtype=dtype), grad).all(), "a large gradient became zero"


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight, grad", [(1.0, 1e38), (1e38, 1e38), (1e-3, 3e38)])
def test_norms_above_the_largest_float32_do_not_overflow(backend, weight, grad, dtype, norm_type):
    weight, grad = torch.full((2, 16), weight, dtype=dtype), torch.full((2, 16), grad, dtype=dtype)
    assert_clips(backend, weight, grad, norm_type=norm_type)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight, grad", [(1e-22, 1e-22), (1e-22, 1e-25), (1e-18, 1.0), (0.0, 1e-30)])
def test_norms_below_what_float32_squares_keep_their_digits(backend, weight, grad, dtype, norm_type):
    weight, grad = weight * random_pair((2, 35))[0], grad * random_pair((2, 35))[0]
    assert_clips(backend, weight.to(dtype), grad.to(dtype), norm_type=norm_type, eps=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
def test_units_below_their_bound_keep_every_bit(backend, dtype, norm_type):
    info = torch.finfo(dtype)
    weight, grad = torch.ones(6, 35, dtype=dtype), torch.randn(6, 35).to(dtype)
    grad[::2] *= 2.0**-12
    grad[::2, :4] = torch.tensor([-0.0, info.smallest_normal / 4, -info.smallest_normal, 2.0**-12], dtype=dtype)
    before = grad.clone()
    assert_clips(backend, weight, grad, norm_type=norm_type)
    assert (bits(grad) == bits(before)).all(dim=1).tolist() == [True, False] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_norm_exactly_at_the_bound_is_not_below_it(backend, dtype):
    """Below 1e-6, where the factor is bound / 1e-6 and not bound / norm = 1, it makes a difference."""
    weight = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=dtype) * 2.0**-30
    grad = torch.tensor([[1.5, 2.0], [1.5, 2.0 - 2.0**-7]], dtype=dtype) * 2.0**-30
    before = grad.clone()
    assert_clips(backend, weight, grad, clip_factor=0.5, eps=0.0)
    assert (grad[0] < before[0] / 100).all()
    assert torch.equal(grad[1], before[1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_and_two_threads_give_the_same_bits(kernel):
    length, units = sized(100_000, 10_000, kernel), sized(500, 10, kernel)
    pairs = [
        random_pair(shape, dtype) for shape in ((units, 700), (3, length), (7 * length // 10,)) for dtype in DTYPES
    ]
    results = []
    for count in (1, 2, 2):
        grads = [grad.clone() for _, grad in pairs]
        with threads(count), using(kernel) as backend:
            nfk.agc_([parameter(w, g) for (w, _), g in zip(pairs, grads, strict=True)], backend=backend)
        results.append(grads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.data())
def test_any_shapes_dtypes_strides_and_options(kernel, data):
    """Of lists of tensors: weights and gradients of different dtypes, norms of anything from 0 to infinity."""
    norm_type = data.draw(st.sampled_from(NORMS))
    # The rounding of 1 / p, in torch as in the kernels, grows with the logarithm of the sum that has this exponent.
    wide = norm_type in (1.0, 2.0, math.inf)
    of_parameters, weights, grads = data.draw(st.booleans(), label="of parameters"), [], []
    for _ in range(data.draw(st.integers(1, 3), label="tensors")):
        shape, dtype = data.draw(shapes(kernel)), data.draw(st.sampled_from(DTYPES))
        size = data.draw(st.sampled_from([0.0, 1e-2, 1.0, 1e2] + [1e-25, 1e25] * wide))
        weights.append(data.draw(tensors(shape, dtype, size, specials=SPECIALS, read_only=True)))
        dtype = dtype if of_parameters else data.draw(st.sampled_from(DTYPES))
        size = 10.0 ** data.draw(st.integers(-4, 2) | st.integers(*(-30, 30) if wide else (-4, 2)))
        grads.append(data.draw(tensors(shape, dtype, size, specials=SPECIALS)))
    options = {
        "clip_factor": data.draw(st.sampled_from([0.0, 0.01, 1.0])),
        "eps": data.draw(st.sampled_from([0.0, 1e-3, 1.0])),
        "norm_type": norm_type,
        "rule": data.draw(st.sampled_from(RULES)),
    }
    expected = [float64_clipped(weight, grad, **options) for weight, grad in zip(weights, grads, strict=True)]
    with using(kernel) as backend, nothing_else_written(*grads):
        if of_parameters:
            nfk.agc_(list(map(parameter, weights, grads)), **options, backend=backend)
        else:
            torch.ops.nfnets_kernels.agc_(weights, grads, *options.values(), backend)
    for grad, clipped in zip(grads, expected, strict=True):
        assert_clipped(grad, clipped, unit_length(grad.shape, options["rule"]))
