"""Channel attention as NF networks use it: the logits of a gate that the residual op applies."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _PoolThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = x.mean((2, 3), keepdim=True)
        ctx.weight = pooled.numel() / max(1, x.numel())
        return pooled, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        of_pooled, of_x = grads
        return torch.add(of_x, of_pooled, alpha=ctx.weight)


def pool_through(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a gate of (N, C, H, W) is computed from, the average (N, C, 1, 1) of x, and x, which the gate multiplies.

    The gradients of both are then added in one pass. torch writes that of the average first, always in contiguous
    order, and adds it to a channels_last one: three passes more, which takes 2.5 times as long. A compiler, which fuses
    them, and torch.fx see x twice.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or torch._C._are_functorch_transforms_active():
        return x, x
    return _PoolThrough.apply(x)


class SqueezeExcite(nn.Module):
    """Logits of one gate per sample and channel: pool, linear, ReLU, linear.

    The gate 2 * sigmoid(logits) belongs to the `residual` op, which multiplies it into the branch in the same pass.

    Args:
        channels: channels of the branch.
        ratio: hidden width over channels, at least one neuron (nfnets/base.py, `SqueezeExcite`).
        device, dtype: of the parameters.
        hidden: hidden width, in place of the ratio.
    """

    def __init__(
        self, channels: int, ratio: float = 0.5, device=None, dtype=None, *, hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = max(1, int(channels * ratio)) if hidden is None else hidden
        self.fc0 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.fc1 = nn.Linear(hidden, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to logits (N, C)."""
        return self.fc1(F.relu(self.fc0(x.flatten(2).mean(dim=2))))


class EfficientChannelAttention(nn.Module):
    """Logits of one gate per sample and channel: pool, convolution over neighbouring channels (Wang et al. 2020, ECA).

    Args:
        channels: channels of the branch; the kernel has the odd size next to (log2(channels) + 1) / 2, at least 3.
        device, dtype: of the parameters.
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__()
        half = int(abs(math.log2(channels) + 1) / 2)
        size = max(half if half % 2 else half + 1, 3)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to logits (N, C)."""
        return self.conv(x.flatten(2).mean(dim=2).unsqueeze(1)).squeeze(1)
