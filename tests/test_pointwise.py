"""1x1 convolutions whose gradients are matrix products: the convolution's own values, and where they are used."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nfnets_kernels as nfk
from nfnets_kernels.modules.pointwise import pays, pointwise

from .helpers import channels_last
from .tolerances import assert_accurate

SHAPES = [(2, 5, 7, 6), (1, 5, 1, 3), (3, 5, 8, 1), (2, 5, 9, 9)]


def values_and_gradients(function, tensors: list[Tensor], stride, upstream: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, stride)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_convolutions_in_float64(shape, stride, dtype):
    x, weight = channels_last(torch.randn(shape)).to(dtype), torch.randn(4, 5, 1, 1).to(dtype)
    tensors = [x, weight, torch.randn(4)]
    upstream = channels_last(torch.randn(F.conv2d(x, weight, stride=stride).shape)).to(dtype)
    actual = values_and_gradients(pointwise, tensors, stride, upstream)
    doubles = [t.double() for t in tensors]
    expected = values_and_gradients(F.conv2d, doubles, stride, upstream.double())
    sizes = values_and_gradients(F.conv2d, [t.abs() for t in doubles], stride, upstream.double().abs())
    assert [t.dtype for t in actual] == [dtype, dtype, dtype, torch.float32]
    for value, reference, size in zip(actual, expected, sizes, strict=True):
        # the bias and its gradient are rounded to the compute dtype, as a convolution under autocast does
        assert_accurate(value.to(dtype), reference, unit_length=x.numel(), magnitude=size)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen):
    tensors = [channels_last(torch.randn(2, 3, 4, 5)), torch.randn(4, 3, 1, 1), torch.randn(4)]
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index != frozen)
    pointwise(*tensors, (1, 1)).sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [index == frozen for index in range(3)]


def test_can_be_differentiated_again():
    tensors = [
        channels_last(torch.randn(2, 3, 4, 5)).double(),
        torch.randn(4, 3, 1, 1).double(),
        torch.randn(4).double(),
    ]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradgradcheck(lambda *t: pointwise(*t, (2, 1)), tensors)


X, WEIGHT = channels_last(torch.zeros(2, 3, 4, 5)), torch.zeros(4, 3, 1, 1)


@pytest.mark.parametrize(
    ("x", "weight", "options", "expected"),
    [(X, WEIGHT, {}, True),
     (X, WEIGHT, {"stride": (2, 2)}, True),
     (X, WEIGHT, {"padding": (0, 0)}, True),
     (X, WEIGHT, {"padding": (1, 1)}, False),
     (X, WEIGHT, {"groups": 3}, False),
     (X.contiguous(), WEIGHT, {}, False),
     (X[0], WEIGHT, {}, False),
     (X, torch.zeros(4, 3, 3, 3), {}, False),
     (X, WEIGHT.double(), {}, False),
     (X.to("meta"), WEIGHT, {}, False),
     (channels_last(torch.zeros(1, 3, 64, 64)), WEIGHT, {}, False),
     (channels_last(torch.zeros(1, 3, 64, 64)), WEIGHT, {"stride": (2, 2)}, True),
     (channels_last(torch.zeros(1, 3, 64, 64)), WEIGHT.bfloat16(), {}, True)],
)  # fmt: skip
def test_only_small_or_bfloat16_convolutions_in_channels_last_are_products(x, weight, options, expected):
    arguments = {"stride": (1, 1), "padding": 0, "groups": 1, **options}
    assert pays(x, weight, **arguments) is expected
    with torch.no_grad():
        assert not pays(x, weight, **arguments)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_layer_uses_it(stride):
    x = channels_last(torch.randn(2, 6, 8, 8))
    assert "Pointwise" in type(nfk.WSConv2d(6, 4, 1, stride)(x).grad_fn).__name__
    assert "Pointwise" in type(nfk.WSConv2d(6, 4, 1, stride, padding="SAME")(x).grad_fn).__name__
    with torch.autocast("cpu", torch.bfloat16):
        out = nfk.WSConv2d(6, 4, 1, stride)(x)
    assert out.dtype == torch.bfloat16 and "Pointwise" in type(out.grad_fn).__name__
