"""The bias gradient that WSConv sums itself where that is faster than the convolution's own."""

import pytest
import torch
from torch import nn

import nfnets_kernels as nfk
from nfnets_kernels.modules.conv import sums_bias_gradient
from tests.tolerances import assert_accurate

LAYERS = [(nfk.WSConv1d, (9,)), (nfk.WSConv2d, (9, 8)), (nfk.WSConv3d, (5, 6, 4))]


def bias_gradient(module: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(torch.relu_(module(x)), [module.bias], upstream)
    return gradient


@pytest.mark.parametrize("batch", [(), (3,)], ids=["unbatched", "batched"])
@pytest.mark.parametrize(("layer", "size"), LAYERS)
def test_equals_the_float64_gradient_through_an_activation_in_place(layer, size, batch):
    module, x = layer(4, 6, 3, padding=1), torch.randn(*batch, 4, *size)
    upstream = torch.randn(*batch, 6, *size)
    assert sums_bias_gradient(x, module.weight, module.bias)
    gradient = bias_gradient(module, x, upstream)
    double = module.double()
    assert not sums_bias_gradient(x.double(), double.weight, double.bias)
    expected = bias_gradient(double, x.double(), upstream.double())
    terms = upstream.double().abs().sum([dim for dim in range(upstream.ndim) if dim != len(batch)])
    assert_accurate(gradient, expected, unit_length=upstream[..., :1].numel(), magnitude=terms)


def test_can_be_differentiated_again():
    module = nfk.WSConv2d(3, 4, 3)
    loss = module(torch.randn(2, 3, 6, 6)).square().sum()
    (gradient,) = torch.autograd.grad(loss, [module.bias], create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), [module.bias])
    torch.testing.assert_close(second, torch.full((4,), 2.0 * 2 * 4 * 4))  # d/db of sum 2 (y + b) over 2 x 4 x 4 pixels


def test_is_left_to_the_convolution_elsewhere():
    x, weight, bias = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 1, 1), torch.randn(2, requires_grad=True)
    assert sums_bias_gradient(x, weight, bias)
    assert not sums_bias_gradient(x, weight, None)
    assert not sums_bias_gradient(x, weight, bias.detach())
    assert not sums_bias_gradient(x, weight.bfloat16(), bias)
    assert not sums_bias_gradient(x.to("meta"), weight, bias)
    with torch.no_grad():
        assert not sums_bias_gradient(x, weight, bias)
