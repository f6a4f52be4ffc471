"""`residual` with a bias: values and gradients against the formula written out in float64, and PyTorch's checkers."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nfnets_kernels import backend as backends
from nfnets_kernels import functional
from nfnets_kernels.ops.library import is_unit_dense
from nfnets_kernels.reference.weight_standardize import accumulation_dtype

from . import residual_cases
from .helpers import (
    DTYPES,
    INFINITY,
    LAYOUTS,
    MODULES,
    NAN,
    assert_compiled_is_eager,
    assert_differentiable_twice,
    assert_fake_is_real,
    assert_rounded_once,
    assert_same,
    assert_same_for_any_threads,
    available,
    derivative_size,
    randn,
    serving,
    sized,
    targets,
    threads,
    value_size,
)
from .residual_cases import SMALL, residual
from .strategies import FACTORS, NO_SUBNORMALS, shapes, tensors

OPS = torch.ops.nfnets_kernels
TARGETS = targets("residual", "relu")
BACKENDS = available("residual", "relu")
KEYS = ["relu", "gelu", "gelu_tanh", "silu"]
SUBSETS = [(), ("skip_gain",), ("keep",), ("se",), SMALL]


def small_inputs(f, names=(), dtype=None):
    """Random bias, and those of skip_gain, se and keep, that fit f."""
    others = residual_cases.small_inputs(f, names, dtype)
    return {"bias": randn(f.shape[1:2], dtype or f.dtype), **others}


def stream(f, shortcut, bias=None, skip_gain=None, se=None, keep=None, alpha=1.0):
    """h."""
    space = (1,) * (f.ndim - 2)
    factor = f.new_full(f.shape[:2], alpha)
    factor = factor if skip_gain is None else factor * skip_gain
    factor = factor if keep is None else factor * keep[:, None]
    factor = factor if se is None else factor * 2 * torch.sigmoid(se)
    branch = factor.reshape(*f.shape[:2], *space) * f
    return (branch if bias is None else branch + bias.reshape(-1, *space)) + shortcut


def assert_equal(actual, expected):
    """Bit for bit the same values; a tensor in place keeps its strides."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def leaves(inputs):
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


@threads(1)
def assert_results(inputs, results, cotangents, grads, *, key, scale, alpha):
    """The results are those of the formula in float64; a and the gradients belong to h as it was rounded."""
    h, a = results
    exact, sizes = leaves(inputs), leaves({n: x if n == "se" else x.abs() for n, x in inputs.items()})
    expected, size = stream(**exact, alpha=alpha), stream(**sizes, alpha=abs(alpha))
    assert_rounded_once(h, expected, size.detach())
    h64 = h.detach().double().requires_grad_()
    activated = scale * MODULES[key](h64)
    assert_rounded_once(a, activated, abs(scale) * value_size(h64.detach(), key))

    gh, ga = (x.double() for x in cotangents)
    (of_h,) = torch.autograd.grad(activated, h64, ga)
    terms = gh.abs() + abs(scale) * ga.abs() * derivative_size(h64.detach(), key, h.dtype)
    expected = dict(zip(exact, torch.autograd.grad(expected, exact.values(), gh + of_h), strict=True))
    size = dict(zip(sizes, torch.autograd.grad(size, sizes.values(), terms), strict=True))
    if "se" in size:
        size["se"] = size["se"] / (1 - torch.sigmoid(exact["se"].detach()))  # which cancels
    for name, grad in grads.items():
        terms, computed_in = h.numel() // max(1, grad.numel()), accumulation_dtype(h.dtype)
        assert_rounded_once(grad, expected[name], size[name], unit_length=terms, computed_in=computed_in)


def check(f, shortcut, small, backend, *, key="relu", scale=1.7, alpha=0.2, grad_layout="contiguous"):
    """Checks values, gradients and dtypes, in place too where that is offered, and returns h and a."""
    inputs = {"f": f, "shortcut": shortcut, **small}
    for x in inputs.values():
        x.requires_grad_()
    options = {**small, "alpha": alpha, "scale": scale, "backend": backend}
    results = residual(f, shortcut, key, **options)
    cotangents = [randn(f.shape, f.dtype, grad_layout) for _ in results]
    grads = torch.autograd.grad(results, inputs.values(), cotangents)
    assert [x.dtype for x in results] == [f.dtype] * 2
    assert [(x.dtype, x.shape) for x in grads] == [(x.dtype, x.shape) for x in inputs.values()]
    of_names = dict(zip(inputs, grads, strict=True))
    assert_results(inputs, results, cotangents, of_names, key=key, scale=scale, alpha=alpha)
    if small.keys() <= {"bias"}:
        overwritten = residual(f.clone(), shortcut, key, **options, inplace=True)
        assert_equal(overwritten, results)
        again = torch.autograd.grad(overwritten, inputs.values(), cotangents)
        if [x.stride() for x in overwritten] == [x.stride() for x in results]:
            assert_equal(again, grads)
        else:  # the bias's gradient is summed in the order of memory
            of_names = dict(zip(inputs, again, strict=True))
            assert_results(inputs, overwritten, cotangents, of_names, key=key, scale=scale, alpha=alpha)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", SUBSETS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_factor(backend, names, dtype):
    shapes = (4, 3), (4, 3, 5), (4, 3, 5, 3), (3, 2, 2, 3, 5)
    for shape, layout, factors in itertools.product(shapes, ("contiguous", "channels_last"), [(1.0, 1.7), (0.2, 0.5)]):
        f, shortcut = (randn(shape, dtype, layout) for _ in range(2))
        check(f, shortcut, small_inputs(f, names), backend, alpha=factors[0], scale=factors[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("target", TARGETS)
def test_activations(target, backend, key, dtype, layout):
    for names, alpha in [((), 1.0), (SMALL, 0.2)]:
        f, shortcut = (2 * randn((sized(3, 2, target), 33, 5, 3), dtype, layout) for _ in range(2))
        check(f, shortcut, small_inputs(f, names), backend, key=key, alpha=alpha)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_sizes(target, backend, dtype, layout):
    """Both sides of where blocks of pixels end, of one sample and of all."""
    for samples, space in [(1, 1), (5, 1), (2, 31), (1, 255), (3, 256), (2, 257), (2, sized(4608, 1100, target))]:
        for names, alpha in [((), 1.0), ((), 0.2), (("se",), 1.0)]:
            f, shortcut = (randn((samples, 2, space, 1), dtype, layout) for _ in range(2))
            check(f, shortcut, small_inputs(f, names), backend, alpha=alpha)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", TARGETS)
def test_numbers_of_channels(target, backend, layout):
    for channels in (1, 2, 31, 127, 128, 129, 300, sized(5000, 600, target)):
        for names, alpha in [((), 1.0), (("keep",), 1.0)]:
            f, shortcut = (randn((3, channels, 3, 7), layout=layout) for _ in range(2))
            check(f, shortcut, small_inputs(f, names), backend, alpha=alpha)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_layouts(backend, layout):
    for shape in [(2, 5), (2, 5, 3), (2, 5, 3, 4), (2, 5, 1, 1), (2, 3, 2, 3, 4)]:
        for shortcut_layout, names in itertools.product(LAYOUTS, [(), ("se",)]):
            f, shortcut = randn(shape, layout=layout), randn(shape, layout=shortcut_layout)
            for x in check(f, shortcut, small_inputs(f, names), backend, grad_layout=shortcut_layout):
                assert x.stride() == (f if is_unit_dense(f) else f.contiguous()).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_bias_of_another_dtype_or_stride(backend, bias_dtype, dtype):
    for layout in ("contiguous", "channels_last"):
        f = randn((3, 5, 2, 3), dtype, layout)
        for bias in (randn(5, bias_dtype), randn((5, 2), bias_dtype)[:, 1], randn(1, bias_dtype).expand(5)):
            check(f, randn(f.shape, dtype), {"bias": bias.detach()}, backend)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0), (0, 0), (2, 3, 2, 0)])
@pytest.mark.parametrize("target", TARGETS)
def test_empty_tensors(backend, shape):
    for names, alpha in [((), 1.0), (SMALL, 0.2)]:
        f = randn(shape)
        small = small_inputs(f, names)
        check(f, randn(shape), small, backend, alpha=alpha)
        h, a = residual(f, randn(shape), **small, backend=backend)
        assert_same(torch.autograd.grad(h.sum() + a.sum(), small["bias"])[0], torch.zeros(shape[1]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("names", [(), ("keep",)])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("target", TARGETS)
def test_one_output_of_two_is_used(backend, key, names, layout):
    f, shortcut = (randn((3, 4, 2, 3), torch.float64, layout) for _ in range(2))
    inputs = {"f": f, "shortcut": shortcut, **small_inputs(f, names)}
    for x in inputs.values():
        x.requires_grad_()
    h = stream(**inputs)
    results = zip(residual(**inputs, key=key, scale=1.7, backend=backend), (h, 1.7 * MODULES[key](h)), strict=True)
    for actual, expected in results:
        grads = (torch.autograd.grad(x.sum(), inputs.values(), retain_graph=True) for x in (actual, expected))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("target", TARGETS)
def test_only_what_needs_a_gradient_gets_one(backend):
    f, shortcut, bias = randn((2, 3, 4)), randn((2, 3, 4)), randn(3)
    h, _ = residual(f, shortcut, bias=bias, backend=backend)
    assert not h.requires_grad
    h, a = residual(f, shortcut, bias=bias.requires_grad_(), backend=backend)
    assert_same(torch.autograd.grad(h.sum(), bias)[0], torch.full((3,), 8.0))
    h, a = residual(f.requires_grad_(), shortcut, bias=bias.detach(), backend=backend)
    assert_same(torch.autograd.grad(a.sum(), f)[0], (h > 0).float())


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", TARGETS)
def test_bad_number_stays_in_its_channel(backend, layout, value):
    f, shortcut = (randn((2, 4, 3, 3), layout=layout) for _ in range(2))
    bias = randn(4)
    bias[2] = value
    for alpha in (1.0, 0.2):
        h, a = check(f, shortcut, {"bias": bias}, backend, alpha=alpha)
        assert torch.equal(~h.isfinite(), torch.zeros_like(h, dtype=torch.bool).index_fill_(1, torch.tensor(2), True))
        assert torch.equal(a[:, 2].isfinite(), torch.full_like(a[:, 2], value == -INFINITY, dtype=torch.bool))
        grad_h = torch.zeros_like(f)
        grad_h[1, 3, 0, 1] = value
        (grad,) = torch.autograd.grad(residual(f, shortcut, bias=bias, alpha=alpha, backend=backend)[0], bias, grad_h)
        torch.testing.assert_close(grad, torch.tensor([0.0, 0.0, 0.0, value]), equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", TARGETS)
def test_sums_of_many_terms_are_accurate(target, backend, layout):
    """Terms of one sign, which a naive sum in float32 would let drift."""
    f = LAYOUTS[layout](torch.full((2, 3, sized(300, 40, target), 300), 0.1))
    bias = torch.zeros(3, requires_grad=True)
    (grad,) = torch.autograd.grad(residual(f, f, bias=bias, backend=backend)[0], bias, f)
    exact = f.double().sum((0, 2, 3))
    assert_rounded_once(grad, exact, exact, unit_length=f.numel() // 3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("names", SUBSETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, names, layout):
    f, shortcut = (randn((2, 3, 4, 2), layout=layout) for _ in range(2))
    small = small_inputs(f, names, torch.bfloat16)
    factors, bias = [small.get(name) for name in SMALL], small["bias"]
    rest = (*factors, 0.7 if names else 1.0, "relu", 1.7, "none", backend)
    h, _ = OPS.residual(f, shortcut, *rest, bias)
    for grad_h in (randn(f.shape), None):
        arguments = (grad_h, randn(f.shape), f if names else None, h, *rest, torch.bfloat16)
        torch.library.opcheck(OPS.residual_backward.default, arguments)
    for x in (f, shortcut, *small.values()):
        x.requires_grad_()
    torch.library.opcheck(OPS.residual.default, (f, shortcut, *rest, bias))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [(), SMALL])
def test_fake_tensors(names, layout):
    def backward(f, small):
        factors = [small.get(name) for name in SMALL]
        rest = (*factors, 1.0, "relu", 1.0, "none", "auto", torch.float32)
        return [OPS.residual_backward(grad_h, f, f if names else None, f, *rest) for grad_h in (f, None)]

    for shape in [(2, 3), (2, 3, 4), (2, 3, 4, 2), (0, 3, 4, 2)]:
        f, shortcut = randn(shape, torch.bfloat16, layout if all(shape) else "contiguous"), randn(shape, torch.bfloat16)
        small = small_inputs(f, names)
        assert_fake_is_real(lambda f, shortcut, small: residual(f, shortcut, **small, alpha=0.5), f, shortcut, small)
        assert_fake_is_real(backward, f, small)


@pytest.mark.parametrize("scale", [1.7, 0.5])
@pytest.mark.parametrize("names", [(), SMALL])
@pytest.mark.parametrize("key", ["relu", "gelu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, key, names, scale):
    shape = 2, sized(3, 1, backend), sized(2, 1, backend)
    f, shortcut = (randn(shape, torch.float64).requires_grad_() for _ in range(2))
    small = {name: x.requires_grad_() for name, x in small_inputs(f, names).items()}

    def function(f, shortcut, *tensors):
        given = dict(zip(small, tensors, strict=True))
        return residual(f, shortcut, key, **given, alpha=0.7, scale=scale, backend=backend)

    assert_differentiable_twice(function, [f, shortcut, *small.values()])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("names", [(), SMALL])
def test_compile(names, dynamic):
    def inputs(samples):
        f = randn((samples, 3, 4, 2))
        small = small_inputs(f, names)
        return [x.requires_grad_() for x in (f, randn(f.shape), *small.values())]

    def function(f, shortcut, *tensors):
        return residual(f * 2, shortcut, "gelu", **dict(zip(("bias", *names), tensors, strict=True)))

    assert_compiled_is_eager(function, inputs(2), inputs(3), inputs(5), dynamic=dynamic)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("names", [(), SMALL])
@pytest.mark.parametrize("target", TARGETS)
def test_same_bits_for_any_number_of_threads_and_in_every_run(target, backend, names, layout):
    f, shortcut = (randn((3, sized(260, 5, target), 20, 20), layout=layout) for _ in range(2))
    small = small_inputs(f, names)
    inputs = [x.requires_grad_() for x in (f, shortcut, *small.values())]

    def function(f, shortcut, *tensors):
        return residual(f, shortcut, **dict(zip(small, tensors, strict=True)), backend=backend)

    assert_same_for_any_threads(function, inputs)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
def test_any_shape_dtype_and_strides(target, data):
    torch.manual_seed(data.draw(st.integers(0, 999), label="seed"))
    key = data.draw(st.sampled_from(KEYS))
    shape, dtypes = data.draw(shapes(target, 2)), st.sampled_from(DTYPES)
    dtype, size = data.draw(dtypes), data.draw(st.sampled_from([1.0, 30.0, 1e3]))
    # Derivatives of the smooth ones at infinity are not defined; factors magnify what a subnormal product loses.
    specials = (*NO_SUBNORMALS, INFINITY, -INFINITY) if key == "relu" else NO_SUBNORMALS
    f, shortcut = (data.draw(tensors(shape, dtype, size, specials=specials, read_only=True)) for _ in range(2))
    small = small_inputs(f, data.draw(st.sampled_from(SUBSETS)), data.draw(dtypes))
    options = {"key": key, "grad_layout": data.draw(st.sampled_from(list(LAYOUTS)))}
    options |= {"alpha": data.draw(FACTORS), "scale": data.draw(FACTORS)}
    with serving(target) as backend:
        check(f, shortcut, small, backend, **options)


F = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (1.0, TypeError, "bias must.*float"),
        (torch.ones(3).int(), TypeError, "bias must.*torch.int32"),
        (torch.ones(4), ValueError, r"bias must.*\(3,\).*\(4,\)"),
        (torch.ones(3, 1), ValueError, r"bias must.*\(3,\).*\(3, 1\)"),
        (torch.ones(()), ValueError, r"bias must.*\(3,\).*\(\)"),
        (torch.ones(3, device="meta"), ValueError, "bias must.*meta"),
    ],
)
def test_bad_bias_is_named_before_any_kernel_runs(bias, error, message):
    for inplace in (False, True):
        with backends.recording() as record, pytest.raises(error, match=message):
            functional.residual(F, F, bias=bias, inplace=inplace)
        assert record == []
