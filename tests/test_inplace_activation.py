"""`inplace=True`: the same values and gradients as out of place, in x's own memory, and torch's usual errors."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nfnets_kernels as nfk
from nfnets_kernels.functional import scaled_activation

from .helpers import (
    DTYPES,
    INFINITY,
    LAYOUTS,
    NAN,
    assert_compiled_is_eager,
    assert_differentiable_twice,
    assert_same,
    randn,
    targets,
)

OFFERED = [("identity", -0.5), ("relu", 1.0), ("relu", 1.7), ("leaky_relu", 1.0), ("leaky_relu", 1.7)]
CASES = [(name, gain, target) for name, gain in OFFERED for target in targets("scaled_activation", name)]


def overwritten(x, name, gain, backend="auto"):
    """The results of in-place activation of a copy of x, whose gradient is to be taken."""
    inner = x.clone()
    out = scaled_activation(inner, name, gain, inplace=True, backend=backend)
    assert out is inner
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "gain", "target"), CASES)
def test_same_bits_as_out_of_place(name, gain, backend, dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    special = [smallest, -smallest, 0.0, -0.0, INFINITY, -INFINITY, NAN]
    x = torch.cat([3 * randn(5001, dtype), torch.tensor(special, dtype=dtype)]).requires_grad_()
    grad = randn(x.shape, dtype)
    expected, actual = scaled_activation(x, name, gain, backend=backend), overwritten(x, name, gain, backend)
    assert_same(actual.detach(), expected.detach())
    assert_same(torch.autograd.grad(actual, x, grad), torch.autograd.grad(expected, x, grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "gain", "target"), CASES)
def test_every_layout_is_overwritten_in_place(name, gain, backend, layout):
    for shape in [(2, 5, 3, 4), (2, 5), (0, 3), (2, 1, 3, 1)]:
        x = randn(shape, layout=layout)
        pointer, stride, expected = x.data_ptr(), x.stride(), scaled_activation(x, name, gain, backend=backend)
        assert scaled_activation(x, name, gain, inplace=True, backend=backend) is x
        assert (x.data_ptr(), x.stride()) == (pointer, stride)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("target", targets("scaled_activation", "relu"))
def test_is_torchs_inplace_relu_times_gamma(backend):
    x = randn((4, 6, 5, 5), torch.float64).requires_grad_()
    grad = randn(x.shape, torch.float64)
    actual = overwritten(x, "relu", None, backend)
    expected = nn.ReLU(inplace=True)(x.clone()) * nfk.functional.gamma("relu")
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x, grad), torch.autograd.grad(expected, x, grad))


@pytest.mark.parametrize(("name", "gain"), OFFERED)
def test_gradcheck(name, gain):
    x = randn((3, 4), torch.float64).requires_grad_()
    assert_differentiable_twice(lambda x: overwritten(x, name, gain), [x])


@pytest.mark.parametrize("target", targets("scaled_activation", "relu"))
def test_views(backend):
    x = randn((4, 6)).requires_grad_()

    def activated(inplace):
        y = 2 * x
        part = scaled_activation(y[1:3, ::2], "relu", inplace=inplace, backend=backend)
        return y, part

    y, part = activated(True)
    expected, expected_part = activated(False)
    assert_same(part.detach().contiguous(), expected_part.detach().contiguous())
    assert_same(y[1:3, ::2].detach().contiguous(), expected_part.detach().contiguous())
    assert_same(y[3].detach(), expected[3].detach())
    (grad,) = torch.autograd.grad(y.sum(), x)
    kept = torch.full_like(x, 2.0)
    kept[1:3, ::2] = torch.where(x[1:3, ::2] > 0, 2 * nfk.functional.gamma("relu"), 0.0)
    assert_same(grad, kept)


def test_torch_raises_as_usual():
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        scaled_activation(randn(3).requires_grad_(), "relu", inplace=True)
    with pytest.raises(RuntimeError, match="single memory location"):
        scaled_activation(randn(1).expand(3), "relu", inplace=True)
    x = randn(3).requires_grad_()
    inner = x.exp()  # needs its own output
    scaled_activation(inner, "relu", inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inner.sum().backward()


def test_without_gradients():
    x = randn(9)
    expected = scaled_activation(x, "relu")
    for context in (torch.no_grad, torch.inference_mode, lambda: torch.autocast(x.device.type, torch.bfloat16)):
        with context():
            inner = x.clone()
            assert scaled_activation(inner, "relu", inplace=True) is inner
        assert_same(inner, expected)


def test_memory_version_counts():
    for inner in (randn(3), randn(3).requires_grad_() * 2):
        before = inner._version
        scaled_activation(inner, "relu", inplace=True)
        assert inner._version > before


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(("name", "gain"), OFFERED)
def test_compile(name, gain, dynamic):
    inputs = [[randn((size, 4, 3)).requires_grad_()] for size in (2, 3)]
    assert_compiled_is_eager(lambda x: overwritten(x, name, gain) * 3, *inputs, dynamic=dynamic)


@pytest.mark.parametrize(("name", "gain"), [("relu", 0.9), ("leaky_relu", -1.0), ("silu", 1.0), ("relu6", 2.0)])
def test_others_are_refused_before_anything_is_written(name, gain):
    x = randn(5)
    before = x.clone()
    with pytest.raises(ValueError, match=f"inplace must be False.*{name} with {gain}"):
        scaled_activation(x, name, gain, inplace=True)
    assert_same(x, before)
    with pytest.raises(ValueError, match="inplace must be False"):
        nfk.ScaledActivation(name, gain, inplace=True)


def test_modules():
    for module in (nfk.ScaledReLU(inplace=True), nfk.ScaledActivation("leaky_relu", inplace=True)):
        x = randn((2, 3))
        expected = scaled_activation(x, module.name)
        assert module(x) is x
        assert_same(x, expected)
        assert repr(module).endswith(", inplace=True)")
    assert "inplace" not in repr(nfk.ScaledReLU())
    with pytest.raises(ValueError, match="inplace must be False"):
        nfk.ScaledReLU(beta=0.1, inplace=True)


def test_a_fake_tensor_is_not_written_to():
    with FakeTensorMode():
        x = torch.randn(3, 4)
        assert scaled_activation(x, "relu", inplace=True) is x
