"""1x1 convolutions on CPUs, whose gradients are matrix products and a sum over pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.library import is_channels_last

# Pixels of a batch up to which float32 matrix products beat oneDNN's backward convolutions. Measured on two cores of a
# Xeon at batch 8, convolution against products: 24 ms and 13 at 7x7 with stride 2, 8 and 7 at 14x14, level at 28x28,
# 9.7 and 10.2 at 56x56. In bfloat16 the products win everywhere: 143 and 101 ms for all 36 of an NF-ResNet-50.
_MOST_PIXELS = 2048


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels_last order as the matrix (N * H * W, C), without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
        ctx.stride, ctx.bias_dtype = stride, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        height, width = ctx.stride
        pixels = _pixels(grad)
        grad_x = grad_weight = grad_bias = None
        if needs_weight:
            grad_weight = (pixels.t() @ _pixels(x[:, :, ::height, ::width])).view(weight.shape)
        if needs_x:
            grad_x = (pixels @ weight.flatten(1)).view(*grad.permute(0, 2, 3, 1).shape[:3], -1).permute(0, 3, 1, 2)
            if ctx.stride != (1, 1):
                spread = torch.zeros_like(x)
                spread[:, :, ::height, ::width] = grad_x
                grad_x = spread
        if needs_bias:
            grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def pays(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: Any, groups: int) -> bool:
    """Whether the gradients of this convolution are best computed as matrix products."""
    if not (x.device.type == "cpu" and torch.is_grad_enabled() and weight.shape[2:] == (1, 1)):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    plain = groups == 1 and padding in (0, (0, 0), "same", "valid") and x.ndim == 4 and is_channels_last(x)
    pixels = x.shape[0] * -(-x.shape[2] // stride[0]) * -(-x.shape[3] // stride[1]) if plain else 0
    small = weight.dtype == torch.float32 and pixels <= _MOST_PIXELS
    return plain and (small or weight.dtype == torch.bfloat16)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
    """A 1x1 convolution where `pays`: (N, C_in, H, W) and (C_out, C_in, 1, 1) to (N, C_out, ceil(H / s), ceil(W / s)).

    It computes in the weight's dtype.
    """
    return _Pointwise.apply(x.to(weight.dtype), weight, bias, stride)
