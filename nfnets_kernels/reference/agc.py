"""Adaptive gradient clipping in plain PyTorch (Brock et al. 2021, section 4.1, equation 3)."""

from typing import NamedTuple

import torch
from torch import Tensor


def is_one_unit(shape: torch.Size, rule: str) -> bool:
    """Whether a tensor of this shape is a single unit; otherwise each index of dim 0 is one.

    Scalars and vectors are one unit under both rules. "deepmind" squeezes first, so that a (C, 1, 1, 1) gain is a
    vector too; "timm" sees C units of one element in it.
    """
    if rule == "deepmind":
        return sum(size != 1 for size in shape) <= 1
    return len(shape) <= 1


def unitwise_norm(x: Tensor, norm_type: float, rule: str) -> Tensor:
    """p-norm of each unit in float64 (squares of float32 values overflow float32), shaped to broadcast over x."""
    dims = None if is_one_unit(x.shape, rule) else tuple(range(1, x.ndim))
    return torch.linalg.vector_norm(x, norm_type, dim=dims, keepdim=True, dtype=torch.float64)


class Decision(NamedTuple):
    """How each unit is clipped, in float64, shaped to broadcast over the tensor."""

    clips: Tensor
    factor: Tensor
    """what the gradient is multiplied by; 1 where the unit is not clipped"""
    ratio: Tensor
    """of gradient norm to parameter norm, the latter eps at least"""


def decide(weight_norm: Tensor, grad_norm: Tensor, clip_factor: float, eps: float) -> Decision:
    """Units whose gradient norm is not below `clip_factor * max(||w||, eps)` are scaled down to that bound."""
    bound = weight_norm.clamp(min=eps)
    max_norm = clip_factor * bound
    clips = ~(grad_norm < max_norm)
    factor = torch.where(clips, max_norm / grad_norm.clamp(min=1e-6), 1.0)
    return Decision(clips, factor, torch.where(grad_norm == 0, grad_norm, grad_norm / bound))


def count_(statistics: Tensor, decision: Decision) -> None:
    """Adds a step to (units, 3) float32: steps, steps in which the unit was clipped, largest ratio so far."""
    statistics[:, 0] += 1
    statistics[:, 1] += decision.clips.flatten()
    statistics[:, 2] = torch.maximum(statistics[:, 2], decision.ratio.flatten().to(statistics.dtype))


def agc_(
    weight: Tensor,
    grad: Tensor,
    clip_factor: float,
    eps: float,
    norm_type: float,
    rule: str,
    statistics: Tensor | None = None,
) -> None:
    """Clips every unit of a gradient; see `decide`."""
    if grad.numel() == 0:
        return
    norms = unitwise_norm(weight, norm_type, rule), unitwise_norm(grad, norm_type, rule)
    decision = decide(*norms, clip_factor, eps)
    if statistics is not None:
        count_(statistics, decision)
    grad.copy_(grad.to(torch.float64) * decision.factor)
