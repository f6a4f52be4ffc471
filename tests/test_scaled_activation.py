"""`scaled_activation`: every backend against the float64 reference, torch's modules, timm's gains and an integral."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nfnets_kernels import backend as backends
from nfnets_kernels.functional import gamma, scaled_activation
from nfnets_kernels.reference import scaled_activation as reference

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
from .strategies import FACTORS, SPECIALS, shapes, tensors

OPS = torch.ops.nfnets_kernels
CASES = [(key, target) for key in MODULES for target in targets("scaled_activation", key)]
CONTRACT_CASES = [(key, name) for key in MODULES for name in available("scaled_activation", key)]
KERNEL_CASES = [case for case in CASES if case[1] != "reference"]
FUSED = [key for key in ELEMENTWISE if backends.serving("scaled_activation", DEVICE, "auto", key) != "reference"]
RELU_TARGETS = targets("scaled_activation", "relu")
# Triton's elementwise functions share one kernel.
LAYOUT_CASES = [case for case in CASES if case[0] in ("tanh", "glu", "log_softmax")] + [
    case for case in CASES if case[0] in FUSED and case[0] != "tanh" and case[1] != "triton"
]


def keys_of(target):
    return [key for key, serving_it in CASES if serving_it == target]


def activate(x, key, **options):
    name, approximate = named(key)
    return scaled_activation(x, name, approximate=approximate, **options)


def scale_of(key, gamma=None, beta=1.0):
    return (reference.GAMMA[key.removesuffix("_tanh")] if gamma is None else gamma) * beta


@threads(1)
def assert_value(out, x, key, scale):
    x = x.detach().double()
    expected = reference.scaled_activation(x, key, scale)
    size = abs(scale) * value_size(x, key)
    assert_rounded_once(out, expected, size, unit_length=x.shape[1] if x.ndim > 1 else 1)


@threads(1)
def assert_gradient(grad_x, grad, x, key, scale):
    x, grad = x.detach().double(), grad.double()
    expected = reference.scaled_activation_backward(grad, x, key, scale)
    size = abs(scale) * derivative_size(x, key, grad_x.dtype) * (grad.abs() if key in ELEMENTWISE else grad.abs().max())
    assert_rounded_once(grad_x, expected, size, unit_length=x.shape[1] if x.ndim > 1 else 1)


def shaped(x, key):
    """A vector as it is, or as the two channels of the activations that need channels."""
    return x if key in ELEMENTWISE else x[:, None].expand(-1, 2).clone()


def check(x, key, backend, *, gamma=None, beta=1.0, grad_layout="contiguous"):
    """Checks value, gradient and dtypes, and returns the output."""
    out = activate(x.requires_grad_(), key, gamma=gamma, beta=beta, backend=backend)
    assert out.dtype == x.dtype
    if out.numel() == 0:
        (grad_x,) = torch.autograd.grad(out.sum(), x)
        assert grad_x.shape == x.shape
        return out
    grad = randn(out.shape, x.dtype, grad_layout)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    scale = scale_of(key, gamma, beta)
    assert_value(out, x, key, scale)
    assert grad_x.dtype == x.dtype
    assert_gradient(grad_x, grad, x, key, scale)
    return out


def test_cpu_kernels_are_built():
    for key in ("relu", "gelu", "gelu_tanh", "silu"):
        assert "cpu:baseline" in targets("scaled_activation", key)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key", "target"), CASES)
def test_values_and_gradients(key, backend, dtype):
    for beta in (1.0, 0.3, -1.5):
        check(3 * randn((2, 34, 5), dtype), key, backend, beta=beta)
        check(3 * randn((2, 6, 3, 3), dtype), key, backend, gamma=1.0, beta=beta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key", "target"), KERNEL_CASES)
def test_sizes(key, target, backend, dtype):
    for size in (1, 2, 3, 31, 32, 33, 1023, 4608, sized(100_000, 9000, target)):
        check(shaped(3 * randn(size, dtype), key), key, backend)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 4, 3, 3), (2, 4, 0)])
@pytest.mark.parametrize(("key", "target"), CASES)
def test_scalars_and_empty_tensors(key, backend, shape):
    if key in ELEMENTWISE or len(shape) > 1:
        check(randn(shape), key, backend)


def every_16_bit_number(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("key", "target"), KERNEL_CASES)
def test_value_of_every_16_bit_number(key, backend, dtype):
    x = every_16_bit_number(dtype)
    if key == "selu":  # f(x) overflows before it is scaled
        x = x[~(x.isfinite() & (x.abs() > 3.2e38))]
    x = shaped(x, key)
    for beta in (1.0, 0.3):
        assert_value(activate(x, key, beta=beta, backend=backend), x, key, scale_of(key, beta=beta))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("key", "target"), KERNEL_CASES)
def test_gradient_at_every_16_bit_number(key, backend, dtype):
    x = every_16_bit_number(dtype)
    x = x[~(x.abs() > 1e15)]  # beyond, the derivatives of torch overflow too
    if key in ("celu", "elu", "glu", "log_softmax", "relu6", "selu"):
        x = x[~x.isnan()]  # what torch returns for a NaN depends on its place, and a channel's is in the others
    x = shaped(x, key).requires_grad_()
    for beta in (1.0, 0.3):
        out = activate(x, key, beta=beta, backend=backend)
        (grad_x,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert_gradient(grad_x, torch.ones_like(out), x, key, scale_of(key, beta=beta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("key", "target"), CASES)
def test_over_the_whole_range(key, backend, dtype):
    sizes = torch.logspace(-40, 15, 2000, dtype=torch.float64).to(dtype)
    x = torch.cat([sizes, -sizes, torch.linspace(-100, 100, 20001, dtype=dtype)])
    check(shaped(x, key), key, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("key", "target"), LAYOUT_CASES)
def test_layouts(key, backend, layout):
    for shape in [(2, 5), (2, 5, 3), (2, 5, 3, 4), (2, 5, 1, 1), (2, 3, 2, 3, 4)]:
        for grad_layout in LAYOUTS:
            x = randn((2, 6, *shape[2:]) if key == "glu" else shape, layout=layout)
            out = check(x, key, backend, grad_layout=grad_layout)
            assert key == "glu" or out.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("target", targets("scaled_activation", "glu"))
def test_glu_keeps_the_memory_format(backend):
    for shape, memory_format in [((2, 6, 3, 5), torch.channels_last), ((2, 6, 2, 3, 5), torch.channels_last_3d)]:
        assert check(randn(shape), "glu", backend).is_contiguous()
        out = check(randn(shape, layout="channels_last"), "glu", backend)
        assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("key", "target"), KERNEL_CASES)
def test_expanded_inputs(key, backend):
    check(randn((3, 1, 4)).expand(3, 6, 4), key, backend)
    x = randn((3, 6)).requires_grad_()
    out = activate(x, key, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_gradient(grad, torch.ones_like(out), x, key, scale_of(key))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_relu_keeps_nan_and_infinity(backend, dtype):
    x = torch.tensor([NAN, -NAN, INFINITY, -INFINITY, -0.0, 0.0], dtype=dtype)
    for gain in (1.5, 0.5):
        out = scaled_activation(x, "relu", gain, backend=backend)
        assert_same(out, torch.tensor([NAN, NAN, INFINITY, 0.0, 0.0, 0.0], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [1.5, 0.5])
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_relu_passes_no_gradient_where_it_is_zero_not_even_nan(backend, gain, dtype):
    x = torch.tensor([-1.0, 0.0, -0.0, -INFINITY, -2.0, 2.0, 3.0, NAN], dtype=dtype, requires_grad=True)
    grad = torch.tensor([NAN, INFINITY, -INFINITY, 1.0, 1.0, 1.0, INFINITY, 1.0], dtype=dtype)
    (grad_x,) = torch.autograd.grad(scaled_activation(x, "relu", gain, backend=backend), x, grad)
    assert_same(grad_x, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, gain, INFINITY, gain], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [2.0, 1.0, 0.5, 0.0, -0.5, -2.0])
@pytest.mark.parametrize("target", RELU_TARGETS)
def test_relu_gradient_where_the_output_rounds_to_zero_or_is_negative(backend, gain, dtype):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    x = torch.tensor([smallest, 3 * smallest, 1.0, 0.0, -smallest, -1.0], dtype=dtype, requires_grad=True)
    out = scaled_activation(x, "relu", gain, backend=backend)
    assert_same(out.detach()[2:] + 0.0, torch.tensor([gain, 0.0, 0.0, 0.0], dtype=dtype))
    (grad,) = torch.autograd.grad(out, x, torch.full_like(x, 4.0))
    assert_same(grad, torch.tensor([4 * gain] * 3 + [0.0] * 3, dtype=dtype))


@pytest.mark.parametrize("target", RELU_TARGETS)
def test_relu_lets_its_input_be_overwritten_where_its_output_tells_the_sign(backend):
    x = randn(100).requires_grad_()
    for gain, key in [(1.0, "relu"), (0.5, "relu"), (1.0, "silu")]:
        inner = x.clone()
        out = scaled_activation(inner, key, gain, backend=backend)
        inner.detach().zero_()
        if (gain, key) == (1.0, "relu"):
            assert_same(torch.autograd.grad(out.sum(), x)[0], (x > 0).float())
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()


@pytest.mark.parametrize(("key", "target"), CASES)
def test_torch_modules(key, backend):
    x = randn((3, 4, 5), torch.float64).requires_grad_()
    expected = MODULES[key](x) * (0.7 * gamma(key.removesuffix("_tanh")))
    actual = activate(x, key, beta=0.7, backend=backend)
    grad = randn(expected.shape, torch.float64)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x, grad), torch.autograd.grad(expected, x, grad))


def test_gammas_are_timms():
    from timm.models.nfnet import _nonlin_gamma

    assert _nonlin_gamma == {name: gamma(name) for name in reference.GAMMA if name != "glu"}


@pytest.mark.parametrize("key", ELEMENTWISE)
def test_gamma_brings_the_variance_back_to_one(key):
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)

    def expectation(values):
        return torch.trapezoid(values * density, x)

    value = activate(x, key, backend="reference")
    variance = expectation(value**2) - expectation(value) ** 2
    assert variance.sqrt().item() == pytest.approx(1.0, rel=1e-3)


def test_gamma_of_glu_brings_the_variance_back_to_one():
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)  # of the gate; the gated half is independent of it
    variance = torch.trapezoid(torch.sigmoid(x) ** 2 * torch.exp(-0.5 * x**2), x) / math.sqrt(2 * math.pi)
    assert gamma("glu") * variance.sqrt().item() == pytest.approx(1.0, rel=2e-3)  # the authors sampled it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("key", "backend"), [case for case in CONTRACT_CASES if case[0] in ("relu", "gelu_tanh", "glu", "elu")]
)
def test_opcheck(key, backend, dtype):
    name, approximate = named(key)
    for layout in ("contiguous", "channels_last", "every_second"):
        x = randn((2, 4, 3, 3), dtype, layout)
        for scale in (1.5, 0.5):
            rest = (name, scale, approximate, backend)
            out = OPS.scaled_activation(x, *rest)
            torch.library.opcheck(OPS.scaled_activation_backward.default, (randn(out.shape, dtype), x, *rest))
            torch.library.opcheck(OPS.scaled_activation.default, (x.clone().requires_grad_(), *rest))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", MODULES)
def test_fake_tensors(key, layout):
    for shape in [(2, 4), (2, 4, 3), (2, 4, 3, 3), (2, 4, 2, 3, 3)]:
        assert_fake_is_real(lambda x: activate(x, key), randn(shape, torch.float16, layout))
    assert_fake_is_real(lambda x: activate(x, key), randn((0, 4, 3, 3)))


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize(("key", "backend"), CONTRACT_CASES)
def test_gradcheck(key, backend, beta):
    x = randn((sized(3, 2, backend), 4, sized(2, 1, backend)), torch.float64).requires_grad_()
    assert_differentiable_twice(lambda x: activate(x, key, beta=beta, backend=backend), [x])


def leaves(*sizes):
    return [[randn((size, 4, 3, 3)).requires_grad_()] for size in sizes]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("key", [*FUSED, "glu", "tanh"])
def test_compile(key, dynamic):
    inputs = leaves(2, 3, 5)
    for beta in (1.0, 0.3):
        assert_compiled_is_eager(lambda x, beta=beta: activate(x * 2, key, beta=beta), *inputs, dynamic=dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_inductor(dynamic):
    assert_compiled_is_eager(lambda x: activate(x * 2, "gelu"), *leaves(2, 3), compiler="inductor", dynamic=dynamic)


@pytest.mark.parametrize(("key", "target"), KERNEL_CASES)
def test_same_bits_for_any_number_of_threads_and_in_every_run(key, target, backend):
    x = shaped(3 * randn(sized(300_001, 5001, target)), key)
    assert_same_for_any_threads(lambda x: activate(x, key, backend=backend), [x.requires_grad_()])


@pytest.mark.parametrize("target", RELU_TARGETS)
@given(data=st.data())
def test_any_shape_dtype_and_strides(target, data):
    torch.manual_seed(data.draw(st.integers(0, 999), label="seed"))
    key, beta = data.draw(st.sampled_from(keys_of(target))), data.draw(FACTORS)
    shape = list(data.draw(shapes(target, 0 if key in ELEMENTWISE else 2, side=9)))
    if key == "glu":
        shape[1] *= 2
    size, specials = data.draw(st.sampled_from([1.0, 3.0, 100.0, 1e10])), SPECIALS if key in FUSED else ()
    x = data.draw(tensors(shape, data.draw(st.sampled_from(DTYPES)), size, specials=specials, read_only=True))
    with serving(target) as backend:
        check(x, key, backend, beta=beta, grad_layout=data.draw(st.sampled_from(list(LAYOUTS))))


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("x", "name", "options", "error", "message"),
    [
        (X.int(), "relu", {}, TypeError, "x must.*torch.int32"),
        (X.to(torch.complex64), "relu", {}, TypeError, "x must.*complex64"),
        (X.to_sparse(), "relu", {}, TypeError, "x must.*sparse"),
        ([1.0], "relu", {}, TypeError, "x must.*list"),
        (X, "swish", {}, ValueError, "name must.*'swish'"),
        (X, None, {}, ValueError, "name must.*None"),
        (X, "gelu_tanh", {}, ValueError, "name must.*'gelu_tanh'"),
        (X, "gelu", {"approximate": "erf"}, ValueError, "approximate must.*'erf'"),
        (X, "relu", {"beta": NAN}, ValueError, "beta.*nan"),
        (X, "relu", {"gamma": INFINITY}, ValueError, "gamma.*inf"),
        (X, "glu", {}, ValueError, r"x must.*even.*\(2, 3\)"),
        (X[0], "glu", {}, ValueError, r"x must.*channel.*\(3,\)"),
        (X[0], "log_softmax", {}, ValueError, r"x must.*channel.*\(3,\)"),
        (X, "relu", {"backend": "tpu"}, ValueError, "backend must.*'tpu'"),
        (X, "relu", {"backend": "cuda"}, ValueError, "'cuda' cannot serve scaled.*does not run on cpu"),
        (X, "tanh", {"backend": "cpu"}, ValueError, "'cpu' cannot serve scaled_activation.*knows.*not tanh"),
    ],
)
def test_bad_argument_is_named_before_any_kernel_runs(x, name, options, error, message):
    with backends.recording() as record, pytest.raises(error, match=message):
        scaled_activation(x, name, **options)
    assert record == []


def test_gamma_names_a_bad_activation():
    with pytest.raises(ValueError, match=r"name must.*'swish'"):
        gamma("swish")
