"""What the tests of clipping statistics share: a float64 formula of the counts."""

from collections.abc import Sequence

import torch
from torch import Tensor


def norms(x: Tensor, norm_type: float, rule: str) -> Tensor:
    """Of all units; the authors squeeze before they look whether it is a vector."""
    units = x.detach().double()
    one = (units.squeeze() if rule == "deepmind" else units).ndim <= 1
    return torch.linalg.vector_norm(units.reshape(1, -1) if one else units.flatten(1), norm_type, dim=1)


def counted_once(
    weight: Tensor,
    grad: Tensor,
    rule: str = "timm",
    norm_type: float = 2.0,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    grad_scale: float = 1.0,
) -> Tensor:
    """(units, 3) float64 of one step."""
    bound = norms(weight, norm_type, rule).clamp(min=eps)
    norm = norms(grad, norm_type, rule) / grad_scale
    ratio = torch.where(norm == 0, norm, norm / bound)
    return torch.stack([torch.ones_like(norm), (~(norm < clip_factor * bound)).double(), ratio], dim=1)


def counted(steps: Sequence[Tensor]) -> Tensor:
    """(units, 3) of several steps."""
    every = torch.stack(list(steps))
    return torch.cat([every[:, :, :2].sum(dim=0), every[:, :, 2:].amax(dim=0)], dim=1)
