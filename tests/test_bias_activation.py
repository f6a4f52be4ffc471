"""`scaled_activation` with a bias: values and gradients against the formula in float64, and PyTorch's checkers."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nfnets_kernels import backend as backends
from nfnets_kernels import functional
from nfnets_kernels.ops.library import is_unit_dense
from nfnets_kernels.reference.weight_standardize import accumulation_dtype

from .helpers import (
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
    channels_last,
    derivative_size,
    named,
    nothing_else_written,
    offset,
    randn,
    serving,
    sized,
    targets,
    value_size,
)
from .strategies import FACTORS, NO_SUBNORMALS, shapes, tensors

OPS = torch.ops.nfnets_kernels
KEYS = ["relu", "gelu", "gelu_tanh", "silu"]
TARGETS = targets("residual", "relu")
BACKENDS = available("residual", "relu")
EVERY = [(key, backend) for key in ELEMENTWISE for backend in available("residual", key)]


def activate(x, bias, key="relu", scale=1.7, **options):
    """The op with the activation of that key."""
    name, approximate = named(key)
    return functional.scaled_activation(x, name, scale, bias=bias, approximate=approximate, **options)


def spread(bias, x):
    return bias.reshape(-1, *(1,) * (x.ndim - 2))


def assert_results(x, bias, out, grad, grads, *, key, scale):
    """Output and gradients are those of the formula in float64."""
    x64, bias64 = (t.detach().double().requires_grad_() for t in (x, bias))
    shifted = x64 + spread(bias64, x)
    expected = scale * MODULES[key](shifted)
    cancelled = (x64.abs() + spread(bias64, x).abs()).detach()
    assert_rounded_once(out, expected, abs(scale) * (value_size(shifted.detach(), key) + cancelled))

    of_x, of_bias = torch.autograd.grad(expected, (x64, bias64), grad.double())
    size = abs(scale) * grad.double().abs() * (derivative_size(shifted.detach(), key, x.dtype) + cancelled)
    assert_rounded_once(grads[0], of_x, size)
    terms, computed_in = x.numel() // max(1, bias.numel()), accumulation_dtype(x.dtype)
    size = size.flatten(2).sum(2).sum(0) if x.ndim > 2 else size.sum(0)
    assert_rounded_once(grads[1], of_bias, size, unit_length=terms, computed_in=computed_in)


def check(x, bias, backend, *, key="relu", scale=1.7, grad_layout="contiguous"):
    """Checks values, gradients and dtypes, in place too where that is offered, and returns the output."""
    inputs = [x.requires_grad_(), bias.requires_grad_()]
    out = activate(x, bias, key, scale, backend=backend)
    grad = randn(x.shape, x.dtype, grad_layout)
    grads = torch.autograd.grad(out, inputs, grad)
    assert out.dtype == x.dtype
    assert [(g.dtype, g.shape) for g in grads] == [(t.dtype, t.shape) for t in inputs]
    assert_results(x, bias, out, grad, grads, key=key, scale=scale)
    if key == "relu" and scale >= 1.0:
        overwritten = activate(x.clone(), bias, key, scale, backend=backend, inplace=True)
        torch.testing.assert_close(overwritten, out, rtol=0, atol=0, equal_nan=True)
        assert_results(x, bias, overwritten, grad, torch.autograd.grad(overwritten, inputs, grad), key=key, scale=scale)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("key", "backend"), [(key, name) for key in ELEMENTWISE for name in available("residual", key)]
)
def test_every_activation(backend, key, dtype):
    for shape, layout in itertools.product([(4, 3), (3, 5, 2), (2, 3, 3, 2)], ("contiguous", "channels_last")):
        check(2 * randn(shape, dtype, layout), randn(shape[1], dtype), backend, key=key, scale=-0.7)


def test_an_activation_without_a_kernel():
    """`auto` takes the reference, a backend by its name refuses."""
    check(randn((2, 3, 4)), randn(3), "auto", key="tanh")
    with pytest.raises(ValueError, match="cannot serve residual"):
        activate(randn((2, 3, 4)), randn(3), "tanh", backend="cpu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("target", TARGETS)
def test_instruction_sets(target, backend, key, dtype, layout):
    """Scales above 1, where ReLU's output tells its gradient, and below."""
    for scale in (1.7, 0.3):
        x = 2 * randn((sized(3, 2, target), 33, 5, 3), dtype, layout)
        check(x, randn(33, dtype), backend, key=key, scale=scale)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("key", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_sizes(target, backend, dtype, key, layout):
    """Both sides of where blocks of pixels end."""
    for samples, space in [(1, 1), (5, 1), (2, 31), (1, 255), (3, 256), (2, 257), (2, sized(4608, 1100, target))]:
        check(randn((samples, 2, space, 1), dtype, layout), randn(2), backend, key=key)
    for channels in (1, 31, 127, 129, 300, sized(5000, 600, target)):
        check(randn((3, channels, 3, 7), dtype, layout), randn(channels), backend, key=key)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_layouts(backend, layout):
    for shape in [(2, 5), (2, 5, 3), (2, 5, 3, 4), (2, 5, 1, 1), (2, 3, 2, 3, 4)]:
        for grad_layout, key in itertools.product(LAYOUTS, ("relu", "gelu")):
            x = randn(shape, layout=layout)
            out = check(x, randn(shape[1]), backend, key=key, grad_layout=grad_layout)
            assert out.stride() == (x if is_unit_dense(x) else x.contiguous()).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_bias_of_another_dtype_or_stride(backend, bias_dtype, dtype):
    for layout, key in itertools.product(("contiguous", "channels_last"), ("relu", "gelu")):
        x = randn((3, 5, 2, 3), dtype, layout)
        for bias in (randn(5, bias_dtype), randn((5, 2), bias_dtype)[:, 1], randn(1, bias_dtype).expand(5)):
            check(x, bias.detach(), backend, key=key)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0), (0, 0), (2, 3, 2, 0)])
@pytest.mark.parametrize("target", TARGETS)
def test_empty_tensors(backend, shape):
    for key in ("relu", "gelu"):
        bias = randn(shape[1]).requires_grad_()
        out = activate(randn(shape).requires_grad_(), bias, key, backend=backend)
        assert_same(torch.autograd.grad(out.sum(), bias)[0], torch.zeros(shape[1]))


@pytest.mark.parametrize("key", ["relu", "gelu"])
@pytest.mark.parametrize("target", TARGETS)
def test_only_what_needs_a_gradient_gets_one(backend, key):
    x, bias = randn((2, 3, 4)), randn(3)
    assert not activate(x, bias, key, backend=backend).requires_grad
    both = torch.autograd.grad(
        activate(x.requires_grad_(), bias.requires_grad_(), key, backend=backend).sum(), (x, bias)
    )
    assert_same(torch.autograd.grad(activate(x.detach(), bias, key, backend=backend).sum(), bias)[0], both[1])
    assert_same(torch.autograd.grad(activate(x, bias.detach(), key, backend=backend).sum(), x)[0], both[0])


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", TARGETS)
def test_bad_number_stays_in_its_channel(backend, layout, value):
    x, bias = randn((2, 4, 3, 3), layout=layout), randn(4)
    bias[2] = value
    out = check(x, bias, backend)
    assert torch.equal(out[:, 2].isfinite(), torch.full_like(out[:, 2], value == -INFINITY, dtype=torch.bool))
    assert out[:, [0, 1, 3]].isfinite().all()
    grad = torch.zeros_like(x)
    grad[1, 3, 0, 1] = value
    bias = torch.full((4,), 9.0, requires_grad=True)  # no element is masked
    (of_bias,) = torch.autograd.grad(activate(x, bias, backend=backend), bias, grad)
    torch.testing.assert_close(of_bias, torch.tensor([0.0, 0.0, 0.0, value]), equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", TARGETS)
def test_sums_of_many_terms_are_accurate(target, backend, layout):
    """Terms of one sign, which a naive sum in float32 would let drift."""
    x = LAYOUTS[layout](torch.full((2, 3, sized(300, 40, target), 300), 0.1))
    bias = torch.zeros(3, requires_grad=True)
    (grad,) = torch.autograd.grad(activate(x, bias, scale=1.0, backend=backend), bias, x)
    exact = x.double().sum((0, 2, 3))
    assert_rounded_once(grad, exact, exact, unit_length=x.numel() // 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_in_place(backend, layout):
    for shape in [(2, 5, 3, 4), (2, 5), (0, 3), (2, 1, 3, 1), (2, 3, 0)]:
        x, bias = randn(shape, layout=layout), randn(shape[1])
        expected = activate(x, bias, backend=backend)
        pointer, stride = x.data_ptr(), x.stride()
        assert activate(x, bias, inplace=True, backend=backend) is x
        assert (x.data_ptr(), x.stride()) == (pointer, stride)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_in_place_beside_other_data(backend):
    """A bias that lies in x's memory, a view, and a slice of a larger tensor."""
    x = randn((4, 5, 3))
    expected = activate(x, x[1, :, 0].clone(), backend=backend)
    assert torch.equal(activate(x, x[1, :, 0], inplace=True, backend=backend), expected)
    whole = randn((4, 5, 3)).requires_grad_()
    bias = randn(5).requires_grad_()
    results = []
    for inplace in (False, True):
        out = activate((whole * 1)[1:3], bias, inplace=inplace, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (whole, bias))])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    for lay_out in (offset, lambda x: channels_last(offset(x))):
        x = lay_out(randn((2, 5, 3, 3)))
        with nothing_else_written(x):
            activate(x, randn(5), inplace=True, backend=backend)


def test_in_place_frees_the_convolutions_output_and_is_refused_where_the_gradient_needs_it():
    x, bias = randn((2, 3, 4)), randn(3)
    for key, scale in (("gelu", 1.7), ("relu", 0.5)):
        with pytest.raises(ValueError, match="inplace must be False"):
            activate(x, bias, key, scale, inplace=True)
    inner = x.clone().requires_grad_() * 1
    out = activate(inner, bias.requires_grad_(), inplace=True)
    (saved,) = {t.data_ptr() for t in out.grad_fn.saved_tensors if t is not None}
    assert saved == inner.data_ptr()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("key", ["relu", "gelu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, key, layout):
    x, bias = randn((2, 3, 4, 2), layout=layout), randn(3, torch.bfloat16)
    for scale in (1.7, 0.5):
        options = key, scale, "none", backend
        out = OPS.bias_activation(x, bias, *options)
        for (saved, added), dtype in itertools.product([(x, bias), (out, None)], (torch.bfloat16, None)):
            arguments = None, randn(x.shape), None, saved, None, None, None, 1.0, *options, dtype, added
            torch.library.opcheck(OPS.residual_backward.default, arguments)
        inputs = x.clone().requires_grad_(), bias.clone().requires_grad_()
        torch.library.opcheck(OPS.bias_activation.default, (*inputs, *options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors(layout):
    for shape in [(2, 3), (2, 3, 4), (2, 3, 4, 2), (0, 3, 4, 2)]:
        x = randn(shape, torch.bfloat16, layout if all(shape) else "contiguous")
        assert_fake_is_real(activate, x, randn(3))


@pytest.mark.parametrize("scale", [1.7, 0.5])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, key, scale):
    x = randn((2, sized(3, 2, backend), sized(2, 1, backend)), torch.float64)
    inputs = [x.requires_grad_(), randn(x.shape[1], torch.float64).requires_grad_()]
    assert_differentiable_twice(lambda x, bias: activate(x, bias, key, scale, backend=backend), inputs)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile(dynamic, inplace):
    def inputs(samples):
        return [randn((samples, 3, 4, 2)).requires_grad_(), randn(3).requires_grad_()]

    def function(x, bias):
        return activate(x * 2, bias, "relu" if inplace else "gelu", inplace=inplace)

    assert_compiled_is_eager(function, inputs(2), inputs(3), inputs(5), dynamic=dynamic)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("key", ["relu", "gelu"])
@pytest.mark.parametrize("target", TARGETS)
def test_same_bits_for_any_number_of_threads_and_in_every_run(target, backend, key, layout):
    x = randn((3, sized(200, 40, target), sized(40, 9, target), 10), layout=layout)
    inputs = [x.requires_grad_(), randn(x.shape[1]).requires_grad_()]
    assert_same_for_any_threads(lambda x, bias: activate(x, bias, key, backend=backend), inputs)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
def test_any_shape_dtype_and_strides(target, data):
    torch.manual_seed(data.draw(st.integers(0, 999), label="seed"))
    key = data.draw(st.sampled_from(KEYS))
    shape, dtypes = data.draw(shapes(target, 2)), st.sampled_from(DTYPES)
    dtype, size = data.draw(dtypes), data.draw(st.sampled_from([1.0, 30.0, 1e3]))
    # Derivatives of the smooth ones at infinity are not defined.
    specials = (*NO_SUBNORMALS, INFINITY, -INFINITY) if key == "relu" else NO_SUBNORMALS
    x = data.draw(tensors(shape, dtype, size, specials=specials, read_only=True))
    options = {"key": key, "scale": data.draw(FACTORS), "grad_layout": data.draw(st.sampled_from(list(LAYOUTS)))}
    with serving(target) as backend:
        check(x, randn(shape[1], data.draw(dtypes)), backend, **options)


X = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("x", "name", "bias", "error", "message"),
    [
        (X, "relu", 1.0, TypeError, "bias must.*float"),
        (X, "relu", torch.ones(3).int(), TypeError, "bias must.*torch.int32"),
        (X, "relu", torch.ones(4), ValueError, r"bias must.*\(3,\).*\(4,\)"),
        (X, "relu", torch.ones(()), ValueError, r"bias must.*\(3,\).*\(\)"),
        (X, "relu", torch.ones(3, device="meta"), ValueError, "bias must.*meta"),
        (X[0, 0], "relu", torch.ones(4), ValueError, r"x must.*\(N, C, ...\).*\(4,\)"),
        (X[:, :2], "glu", torch.ones(2), ValueError, "bias must be None for glu"),
        (X, "log_softmax", torch.ones(3), ValueError, "bias must be None for log_softmax"),
    ],
)
def test_bad_arguments_are_named_before_any_kernel_runs(x, name, bias, error, message):
    for inplace in (False, True) if name == "relu" else (False,):
        with backends.recording() as record, pytest.raises(error, match=message):
            functional.scaled_activation(x, name, bias=bias, inplace=inplace)
        assert record == []
