"""`residual(inplace=True)`: the values and gradients of out of place, in f's own memory, and torch's usual errors."""

import pytest
import torch

import nfnets_kernels as nfk
from nfnets_kernels import backend as backends
from nfnets_kernels.functional import residual

from .helpers import (
    DTYPES,
    LAYOUTS,
    assert_compiled_is_eager,
    assert_differentiable_twice,
    assert_fake_is_real,
    assert_same,
    channels_last,
    outputs_and_gradients,
    randn,
    targets,
)

TARGETS = targets("residual", "relu")
# The output of the last does not tell the gradient: h must stay as it is.
OPTIONS = [{}, {"alpha": 0.2, "scale": 1.7}, {"activation": "gelu", "scale": 0.5}]


def overwritten(f, shortcut, bias=None, **options):
    """The results in place of a copy of f, whose gradient is to be taken."""
    inner = f.clone()
    h, a = residual(inner, shortcut, bias=bias, inplace=True, **options)
    assert h is inner
    return h, a


def leaves(shape=(2, 5, 3, 4), dtype=torch.float32, layout="contiguous"):
    inputs = randn(shape, dtype, layout), randn(shape, dtype), randn(shape[1], dtype)
    return [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset_channels_last"])
@pytest.mark.parametrize("target", TARGETS)
def test_same_bits_as_out_of_place(backend, layout, options, dtype):
    def expected(f, shortcut, bias=None):
        return residual(f, shortcut, bias=bias, backend=backend, **options)

    def actual(f, shortcut, bias=None):
        return overwritten(f, shortcut, bias, backend=backend, **options)

    inputs = leaves(dtype=dtype, layout=layout)
    for given in (inputs, inputs[:2]):
        assert_same(outputs_and_gradients(actual, given), outputs_and_gradients(expected, given))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_layout_is_overwritten_in_place(backend, layout):
    for shape in [(2, 5, 3, 4), (2, 5), (0, 3), (2, 1, 3, 1), (2, 3, 0)]:
        f, shortcut, bias = (x.detach() for x in leaves(shape, layout=layout))
        expected = residual(f, shortcut, bias=bias, backend=backend)
        pointer, stride = f.data_ptr(), f.stride()
        h, a = residual(f, shortcut, bias=bias, inplace=True, backend=backend)
        assert h is f
        assert (h.data_ptr(), h.stride()) == (pointer, stride)
        assert torch.equal(h, expected[0])
        assert_same(a, expected[1])


def test_no_second_tensor_for_h():
    f, shortcut = (channels_last(randn((2, 8, 4, 4))) for _ in range(2))
    inner = f.requires_grad_() * 1
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda _: None):
        h, a = residual(inner, shortcut, inplace=True)
    assert saved == [a.data_ptr()]
    assert h.data_ptr() == inner.data_ptr()


def test_memory_that_another_argument_shares_is_read_before_it_is_written():
    buffer = randn(25)
    f, shortcut = buffer[:24].view(2, 3, 4), buffer[1:].view(2, 3, 4)
    expected = residual(f, shortcut)
    assert_same(residual(f, shortcut, inplace=True), expected)
    f = randn((2, 3, 4))
    expected = residual(f, f, alpha=0.5)
    assert_same(residual(f, f, alpha=0.5, inplace=True), expected)
    f = randn((3, 3))
    expected = residual(f, f * 2, bias=f[1])
    assert_same(residual(f, f * 2, bias=f[1], inplace=True), expected)


def test_views():
    base, shortcut, bias = randn((6, 5, 4)).requires_grad_(), *leaves((2, 5, 4))[1:]

    def function(base, shortcut, bias, inplace=True):
        y = 2 * base
        h, a = residual(y[1:3], shortcut, bias=bias, inplace=inplace)
        if not inplace:
            y = torch.cat([y[:1], h, y[3:]])
        return y, a

    inputs = [base, shortcut, bias]
    expected = outputs_and_gradients(lambda *x: function(*x, inplace=False), inputs)
    assert_same(outputs_and_gradients(function, inputs), expected)


def test_torch_raises_as_usual():
    f, shortcut, _ = leaves()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        residual(f, shortcut, inplace=True)
    with pytest.raises(RuntimeError, match="single memory location"):
        residual(randn((1, 3)).expand(2, 3), randn((2, 3)), inplace=True)
    inner = f.exp()  # needs its own output
    h, _ = residual(inner, shortcut, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_h_may_be_overwritten_again_where_the_activation_tells_its_sign():
    f, shortcut, _ = leaves()
    h, a = overwritten(f, shortcut)
    h.mul_(2)
    expected = residual(f, shortcut)
    assert_same(torch.autograd.grad(a.sum(), f), torch.autograd.grad(expected[1].sum(), f))
    h, a = overwritten(f, shortcut, activation="gelu")
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        a.sum().backward()


def test_hooks_see_the_gradient_of_h():
    f, shortcut, _ = leaves()
    h, _ = overwritten(f, shortcut)
    seen = []
    h.register_hook(seen.append)
    (3 * h).sum().backward()
    assert_same(seen, [torch.full_like(f, 3.0)])
    assert_same(f.grad, seen[0])


def test_without_gradients():
    f, shortcut, bias = (x.detach() for x in leaves())
    expected = residual(f, shortcut, bias=bias)
    for context in (torch.no_grad, torch.inference_mode, lambda: torch.autocast(f.device.type, torch.bfloat16)):
        with context():
            inner = f.clone()
            before = None if inner.is_inference() else inner._version
            h, a = residual(inner, shortcut, bias=bias, inplace=True)
            assert h is inner
            assert before is None or inner._version > before
        assert_same((h, a), expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    inputs = leaves((2, 3, 2), torch.float64)
    assert_differentiable_twice(lambda *x: overwritten(*x, **options), inputs)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_compile(options, dynamic):
    def function(*inputs):
        h, a = overwritten(*inputs, **options)
        return h * 3, a

    assert_compiled_is_eager(function, leaves((2, 4, 3)), leaves((3, 4, 3)), dynamic=dynamic)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors(layout):
    assert_fake_is_real(overwritten, *(x.detach() for x in leaves(layout=layout)))


@pytest.mark.parametrize(("name", "shape"), [("skip_gain", ()), ("se", (2, 5)), ("keep", (2,))])
def test_others_are_refused_before_anything_is_written(name, shape):
    f, shortcut, bias = (x.detach() for x in leaves())
    before = f.clone()
    with backends.recording() as record, pytest.raises(ValueError, match=f"inplace must be False.*{name}.*got True"):
        nfk.functional.residual(f, shortcut, **{name: torch.ones(shape)}, bias=bias, inplace=True)
    assert record == []
    assert_same(f, before)
    with pytest.raises(ValueError, match="'cuda' cannot serve residual"):
        residual(f, shortcut, backend="cuda", inplace=True)
    assert_same(f, before)
