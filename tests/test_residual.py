"""`residual`: every backend against the float64 reference, a plain formula under autograd, and PyTorch's checkers."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nfnets_kernels import backend as backends
from nfnets_kernels import functional
from nfnets_kernels.ops.library import is_unit_dense
from nfnets_kernels.reference import residual as reference
from nfnets_kernels.reference.residual import Branch
from nfnets_kernels.reference.scaled_activation import scaled_activation
from nfnets_kernels.reference.weight_standardize import accumulation_dtype

from .helpers import (
    DEVICE,
    DTYPES,
    ELEMENTWISE,
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
    named,
    randn,
    serving,
    sized,
    targets,
    threads,
    value_size,
)
from .residual_cases import SMALL, residual, small_inputs
from .strategies import FACTORS, NO_SUBNORMALS, shapes, tensors

OPS = torch.ops.nfnets_kernels
CASES = [(key, target) for key in ELEMENTWISE for target in targets("residual", key)]
CONTRACT_CASES = [(key, name) for key in ELEMENTWISE for name in available("residual", key)]
# Of Triton's kernels some activations: gradcheck calls them thousands of times, and they are interpreted.
CHECKED_CASES = [case for case in CONTRACT_CASES if case[1] != "triton" or case[0] in ("relu", "gelu_tanh")]
FUSED = [key for key in ELEMENTWISE if backends.serving("residual", DEVICE, "auto", key) != "reference"]
RELU_TARGETS = targets("residual", "relu")


@threads(1)
def assert_results(f, shortcut, small, results, grad_h, grad_a, grads, *, key, scale, alpha):
    """The results are those of the float64 reference; a and the gradients belong to h as it was rounded."""
    h, a = results
    f64, s64, gh, ga = (x.detach().double() for x in (f, shortcut, grad_h, grad_a))
    branch = Branch(*(None if name not in small else small[name].detach().double() for name in SMALL), alpha)
    product = reference.factor(f64, branch)
    weight = 1.0 if product is None else reference.spread(product.abs(), f64)

    assert_rounded_once(h, reference.residual(f64, s64, branch, key, scale)[0], weight * f64.abs() + s64.abs())
    h64 = h.detach().double()
    assert_rounded_once(a, scaled_activation(h64, key, scale), abs(scale) * value_size(h64, key))

    expected = reference.residual_backward(gh, ga, f64 if small else None, h64, branch, key, scale)
    stream = gh.abs() + abs(scale) * ga.abs() * derivative_size(h64, key, f.dtype)
    assert_rounded_once(grads["shortcut"], expected[0], stream)
    assert_rounded_once(grads["f"], expected[0 if branch.is_one else 1], stream * weight)
    sums = reference.sum_space(stream * f64.abs())
    absolute = Branch(*(x if x is None or x is branch.se else x.abs() for x in branch.tensors), abs(alpha))
    sizes = reference.factor_backward(sums, f64, absolute)
    lengths = {"skip_gain": f.numel(), "se": f.numel() // max(1, sums.numel()), "keep": f.numel() // max(1, len(f))}
    for name, value, size in zip(small, expected[2:], sizes, strict=True):
        size = sums * product.abs() if name == "se" else size  # 1 - sigmoid cancels
        computed_in = accumulation_dtype(f.dtype)
        assert_rounded_once(grads[name], value, size, unit_length=lengths[name], computed_in=computed_in)


def check(f, shortcut, small, backend, *, key="relu", scale=1.7, alpha=0.2, grad_layout="contiguous"):
    """Checks values, gradients and dtypes, and returns h and a."""
    inputs = {"f": f, "shortcut": shortcut, **small}
    for x in inputs.values():
        x.requires_grad_()
    results = residual(f, shortcut, key, **small, alpha=alpha, scale=scale, backend=backend)
    cotangents = [randn(f.shape, f.dtype, grad_layout) for _ in results]
    grads = dict(zip(inputs, torch.autograd.grad(results, inputs.values(), cotangents), strict=True))
    assert [x.dtype for x in results] == [f.dtype] * 2
    assert {name: (x.dtype, x.shape) for name, x in grads.items()} == {n: (x.dtype, x.shape) for n, x in inputs.items()}
    assert_results(f, shortcut, small, results, *cotangents, grads, key=key, scale=scale, alpha=alpha)
    return results


def test_cpu_kernels_are_built():
    for key in ("relu", "gelu", "gelu_tanh", "silu"):
        assert "cpu:baseline" in targets("residual", key)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [names for count in range(4) for names in itertools.combinations(SMALL, count)])
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_every_combination_of_factors(backend, names, dtype):
    for shape in [(4, 3), (4, 3, 5), (4, 3, 5, 3), (3, 2, 2, 3, 5)]:
        for alpha, scale in [(1.0, 1.7), (0.2, 0.5)]:
            f = randn(shape, dtype)
            check(f, randn(shape, dtype), small_inputs(f, names), backend, alpha=alpha, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key", "target"), CASES)
def test_activations(key, target, backend, dtype):
    for layout in ("contiguous", "channels_last"):
        for names, scale in [(SMALL, 1.7), ((), 0.5), (("se",), -1.2)]:
            f, shortcut = (2 * randn((sized(3, 2, target), 33, 5, 3), dtype, layout) for _ in range(2))
            check(f, shortcut, small_inputs(f, names), backend, key=key, scale=scale)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_sizes(target, backend, dtype, layout):
    for space in (1, 2, 3, 31, 32, 33, 1023, sized(4608, 2000, target), sized(100_000, 9000, target)):
        f, shortcut = (randn((1, 2, space, 1), dtype, layout) for _ in range(2))
        check(f, shortcut, small_inputs(f), backend)


@pytest.mark.parametrize("target", RELU_TARGETS)
def test_numbers_of_channels(backend):
    for channels, layout in itertools.product((1, 2, 31, 127, 128, 129, 300), ("contiguous", "channels_last")):
        f, shortcut = (randn((4, channels, 3, 5), layout=layout) for _ in range(2))
        check(f, shortcut, small_inputs(f), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_layouts(backend, layout):
    for shape in [(2, 5), (2, 5, 3), (2, 5, 3, 4), (2, 5, 1, 1), (2, 3, 2, 3, 4)]:
        for shortcut_layout, names in itertools.product(LAYOUTS, [(), SMALL]):
            f = randn(shape, layout=layout)
            for x in check(f, randn(shape, layout=shortcut_layout), small_inputs(f, names), backend):
                assert x.stride() == (f if is_unit_dense(f) else f.contiguous()).stride()


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_gradients_in_another_layout(backend, layout, grad_layout):
    f = randn((2, 5, 3, 4), layout=layout)
    check(f, randn(f.shape), small_inputs(f), backend, grad_layout=grad_layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("small_dtype", DTYPES)
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_factors_of_another_dtype(backend, small_dtype, dtype):
    f = randn((3, 5, 2, 3), dtype)
    check(f, randn(f.shape, dtype), small_inputs(f, dtype=small_dtype), backend)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0), (0, 0), (2, 3, 2, 0)])
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_empty_tensors(backend, shape):
    for names in [(), SMALL]:
        f = randn(shape)
        check(f, randn(shape), small_inputs(f, names), backend)


@pytest.mark.parametrize(("key", "target"), CASES)
def test_plain_formula(key, backend):
    f, shortcut = (randn((3, 4, 2, 3), torch.float64) for _ in range(2))
    small = small_inputs(f)
    inputs = [x.requires_grad_() for x in (f, shortcut, *small.values())]
    factor = 0.7 * small["skip_gain"] * small["keep"][:, None] * 2 * torch.sigmoid(small["se"])
    h = factor[:, :, None, None] * f + shortcut
    expected = h, 1.7 * MODULES[key](h)
    actual = residual(f, shortcut, key, **small, alpha=0.7, scale=1.7, backend=backend)
    torch.testing.assert_close(actual, expected)
    cotangents = [randn(f.shape, torch.float64) for _ in range(2)]
    for used in (slice(0, 2), slice(0, 1), slice(1, 2)):  # both outputs, or only one of them
        grads = (torch.autograd.grad(x[used], inputs, cotangents[used], retain_graph=True) for x in (actual, expected))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_bad_number_stays_in_its_element(backend, layout, value):
    f, shortcut = (randn((2, 4, 3, 3), layout=layout) for _ in range(2))
    f[1, 2, 0, 1] = value
    h, a = check(f, shortcut, {"se": randn((2, 4))}, backend)
    bad = ~f.isfinite()
    assert torch.equal(~h.isfinite(), bad)
    assert torch.equal(a.isnan(), bad & f.isnan())
    assert torch.equal(a.isinf(), bad & (f == INFINITY))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2.0, 1.0, 0.5, 0.0, -0.5, -2.0])
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_relu_gradient_where_the_output_rounds_to_zero_or_is_negative(backend, scale, dtype):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    f = torch.tensor([[smallest, 3 * smallest, 1.0, 0.0, -smallest, -1.0]], dtype=dtype, requires_grad=True)
    h, a = residual(f, torch.zeros_like(f), scale=scale, backend=backend)
    assert_same(h.detach(), f.detach())
    (grad,) = torch.autograd.grad(a, f, torch.full_like(f, 4.0))
    assert_same(grad, torch.tensor([[4 * scale] * 3 + [0.0] * 3], dtype=dtype))


@pytest.mark.parametrize("scale", [1.5, 0.5])
@pytest.mark.parametrize("names", [(), SMALL])
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_relu_passes_no_gradient_where_it_is_zero_not_even_nan(backend, names, scale):
    f, shortcut = torch.zeros(2, 4, 1, requires_grad=True), torch.tensor([-1.0, 0.0, -INFINITY, 2.0]).view(1, 4, 1)
    _, a = residual(f, shortcut.expand(2, 4, 1), **small_inputs(f, names), scale=scale, backend=backend)
    grad_a = torch.tensor([NAN, INFINITY, -INFINITY, 1.0]).view(1, 4, 1).expand(2, 4, 1)
    (grad,) = torch.autograd.grad(a, f, grad_a)
    assert not grad[:, :3].any()


@pytest.mark.parametrize("target", RELU_TARGETS)
def test_relu_lets_h_be_overwritten_where_its_output_tells_the_sign(backend):
    f, shortcut = randn((2, 3, 4)).requires_grad_(), randn((2, 3, 4))
    for scale, key in [(1.0, "relu"), (0.5, "relu"), (1.0, "silu")]:
        h, a = residual(f, shortcut, key, scale=scale, backend=backend)
        h.detach().zero_()
        if (scale, key) == (1.0, "relu"):
            assert_same(torch.autograd.grad(a.sum(), f)[0], (f + shortcut > 0).float())
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                a.sum().backward()


@pytest.mark.parametrize("target", RELU_TARGETS)
def test_dropped_sample_is_its_shortcut(backend):
    f, shortcut = (randn((4, 3, 5)).requires_grad_() for _ in range(2))
    keep = torch.tensor([0.0, 1.0, 0.0, 2.0])
    h, a = residual(f, shortcut, keep=keep, alpha=0.3, backend=backend)
    assert torch.equal(h[keep == 0], shortcut[keep == 0])
    (grad,) = torch.autograd.grad((h + a).sum(), f)
    assert torch.equal(grad.flatten(1).any(dim=1), keep > 0)


@pytest.mark.parametrize("target", RELU_TARGETS)
def test_gradients_do_not_share_memory(backend):
    f, shortcut = (randn((2, 3, 4)).requires_grad_() for _ in range(2))
    torch.stack(residual(f, shortcut, backend=backend)).sum().backward()
    before = shortcut.grad.clone()
    f.grad.zero_()
    assert_same(shortcut.grad, before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("names", [(), ("skip_gain",), SMALL])
@pytest.mark.parametrize(("key", "backend"), [case for case in CONTRACT_CASES if case[0] in ("relu", "gelu_tanh")])
def test_opcheck(key, backend, names, layout):
    name, approximate = named(key)
    f, shortcut = (randn((2, 3, 4, 2), layout=layout) for _ in range(2))
    small = [small_inputs(f, names).get(x) for x in SMALL]
    rest = (*small, 0.7, name, 1.7, approximate, backend)
    grads = [randn(f.shape) for _ in range(2)]
    h, _ = OPS.residual(f, shortcut, *rest)
    torch.library.opcheck(OPS.residual_backward.default, (*grads, f if names else None, h, *rest))
    for x in (f, shortcut, *small):
        if x is not None:
            x.requires_grad_()
    torch.library.opcheck(OPS.residual.default, (f, shortcut, *rest))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [(), SMALL])
def test_fake_tensors(names, layout):
    def backward(f, h, small):
        factors = [small.get(name) for name in SMALL]
        return OPS.residual_backward(h, h, f if names else None, h, *factors, 0.5, "relu", 1.0, "none", "auto")

    for shape in [(2, 3), (2, 3, 4), (2, 3, 4, 2), (2, 3, 4, 2, 1)]:
        f, shortcut = randn(shape, torch.bfloat16, layout), randn(shape, torch.bfloat16)
        small = small_inputs(f, names)
        assert_fake_is_real(lambda f, shortcut, small: residual(f, shortcut, **small, alpha=0.5), f, shortcut, small)
        assert_fake_is_real(backward, f, f, small)
    empty = randn((0, 3, 4, 2))
    assert_fake_is_real(lambda f: residual(f, f), empty)
    assert_fake_is_real(backward, empty, empty, small_inputs(empty, names))


@pytest.mark.parametrize("scale", [1.7, 0.5])
@pytest.mark.parametrize(("key", "backend"), CHECKED_CASES)
def test_gradcheck(key, backend, scale):
    shape = 2, sized(3, 1, backend), sized(2, 1, backend)
    f, shortcut = (randn(shape, torch.float64).requires_grad_() for _ in range(2))
    small = [x.requires_grad_() for x in small_inputs(f).values()]

    def function(f, shortcut, *small):
        factors = dict(zip(SMALL, small, strict=True)) if small else {}
        return residual(f, shortcut, key, **factors, alpha=0.7, scale=scale, backend=backend)

    assert_differentiable_twice(function, [f, shortcut])
    assert_differentiable_twice(function, [f, shortcut, *small])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(compiler, dynamic):
    def leaves(samples):
        f = randn((samples, 3, 4, 2))
        return [x.requires_grad_() for x in (f, randn(f.shape), *small_inputs(f).values())]

    def function(f, shortcut, skip_gain, se, keep):
        return residual(f * 2, shortcut, "gelu", skip_gain=skip_gain, se=se, keep=keep, alpha=0.2)

    assert_compiled_is_eager(function, leaves(2), leaves(3), leaves(5), compiler=compiler, dynamic=dynamic)
    inputs = [leaves(2)[:2], leaves(3)[:2]]
    assert_compiled_is_eager(lambda *x: residual(*x, scale=0.5), *inputs, compiler=compiler, dynamic=dynamic)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_same_bits_for_any_number_of_threads_and_in_every_run(target, backend, layout):
    f, shortcut = (randn((3, sized(260, 5, target), 20, 20), layout=layout) for _ in range(2))
    inputs = [x.requires_grad_() for x in (f, shortcut, *small_inputs(f).values())]

    def function(f, shortcut, *small):
        factors = dict(zip(SMALL, small, strict=True))
        return residual(f, shortcut, **factors, backend=backend), residual(f, shortcut, backend=backend)

    assert_same_for_any_threads(function, inputs)


@pytest.mark.parametrize("target", RELU_TARGETS)
@given(data=st.data())
def test_any_shape_dtype_and_strides(target, data):
    torch.manual_seed(data.draw(st.integers(0, 999), label="seed"))
    key = data.draw(st.sampled_from([key for key, serving_it in CASES if serving_it == target]))
    shape, dtypes = data.draw(shapes(target, 2)), st.sampled_from(DTYPES)
    dtype, size = data.draw(dtypes), data.draw(st.sampled_from([1.0, 30.0, 1e3]))
    # Derivatives of the smooth ones at infinity are not defined; factors magnify what a subnormal product loses.
    specials = (*NO_SUBNORMALS, INFINITY, -INFINITY) if key == "relu" else NO_SUBNORMALS
    f, shortcut = (data.draw(tensors(shape, dtype, size, specials=specials, read_only=True)) for _ in range(2))
    small = small_inputs(f, sorted(data.draw(st.sets(st.sampled_from(SMALL)))), data.draw(dtypes))
    options = {"key": key, "grad_layout": data.draw(st.sampled_from(list(LAYOUTS)))}
    options |= {"alpha": data.draw(FACTORS), "scale": data.draw(FACTORS)}
    with serving(target) as backend:
        check(f, shortcut, small, backend, **options)


F, S = torch.ones(2, 3, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("f", "shortcut", "options", "error", "message"),
    [
        (F.int(), F, {}, TypeError, "f must.*torch.int32"),
        ([1.0], F, {}, TypeError, "f must.*list"),
        (F[0, 0], F[0, 0], {}, ValueError, r"f must.*\(4,\)"),
        (F, F.int(), {}, TypeError, "shortcut must.*torch.int32"),
        (F, 1.0, {}, TypeError, "shortcut must.*float"),
        (F, F.double(), {}, ValueError, "shortcut must.*float32.*float64"),
        (F, F[:, :2], {}, ValueError, r"shortcut must.*\(2, 3, 4\).*\(2, 2, 4\)"),
        (F, F.to("meta"), {}, ValueError, "shortcut must.*meta"),
        (F, F, {"skip_gain": torch.ones(1)}, ValueError, r"skip_gain must.*\(\).*\(1,\)"),
        (F, F, {"skip_gain": 1.0}, TypeError, "skip_gain must.*float"),
        (F, F, {"se": S[..., None]}, ValueError, r"se must.*\(2, 3\).*\(2, 3, 1\)"),
        (F, F, {"se": S.int()}, TypeError, "se must.*torch.int32"),
        (F, F, {"keep": S}, ValueError, r"keep must.*\(2,\).*\(2, 3\)"),
        (F, F, {"keep": S[:, 0] > 0}, TypeError, "keep must.*torch.bool"),
        (F, F, {"activation": "glu"}, ValueError, "activation must.*'glu'"),
        (F, F, {"approximate": "erf"}, ValueError, "approximate must.*'erf'"),
        (F, F, {"alpha": NAN}, ValueError, "alpha must.*nan"),
        (F, F, {"scale": INFINITY}, ValueError, "scale must.*inf"),
        (F, F, {"backend": "tpu"}, ValueError, "backend must.*'tpu'"),
        (F, F, {"backend": "cuda"}, ValueError, "'cuda' cannot serve residual on cpu: .*does not run on cpu"),
        (F, F, {"backend": "cpu", "activation": "tanh"}, ValueError, "'cpu' cannot serve residual.*knows.*not tanh"),
    ],
)
def test_bad_argument_is_named_before_any_kernel_runs(f, shortcut, options, error, message):
    with backends.recording() as record, pytest.raises(error, match=message):
        functional.residual(f, shortcut, **options)
    assert record == []
