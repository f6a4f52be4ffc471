"""Adaptive gradient clipping in plain PyTorch (Brock et al. 2021, section 4.1, equation 3)."""

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


def agc_(weight: Tensor, grad: Tensor, clip_factor: float, eps: float, norm_type: float, rule: str) -> None:
    """Scales every unit of grad whose norm is not below `clip_factor * max(||w||, eps)` down to that bound."""
    if grad.numel() == 0:
        return
    max_norm = unitwise_norm(weight, norm_type, rule).clamp(min=eps) * clip_factor
    grad_norm = unitwise_norm(grad, norm_type, rule)
    factor = torch.where(grad_norm < max_norm, 1.0, max_norm / grad_norm.clamp(min=1e-6))
    grad.copy_(grad.to(torch.float64) * factor)
