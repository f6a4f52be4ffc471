"""Scaled weight standardization in plain PyTorch (Brock et al. 2021a, equation 1)."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a storage dtype is computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _statistics(units: Tensor, eps: float, eps_form: str) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations from the mean, their inverse length r, and whether r depends on the weights; units is (count, N)."""
    deviations = units - units.mean(dim=1, keepdim=True)
    squared = deviations.square().sum(dim=1, keepdim=True)
    if eps_form == "clamp":
        denominator = squared.clamp(min=eps)
        varies = ~(squared < eps)
    else:
        denominator = squared + units.shape[1] * eps
        varies = torch.ones_like(squared, dtype=torch.bool)
    return deviations, denominator.rsqrt(), varies


def _gain_column(gain: Tensor | None, units: Tensor) -> Tensor | float:
    return 1.0 if gain is None else gain.reshape(-1, 1).to(units.dtype)


def weight_standardize(
    weight: Tensor, gain: Tensor | None, scale: float, eps: float, eps_form: str, dtype: torch.dtype
) -> Tensor:
    """`scale * gain * (w - mean) * r` for each index of dim 0, in `dtype` and the weight's memory format.

    r is `rsqrt(max(N*var, eps))` for eps_form "clamp" (the authors') and `rsqrt(N*(var + eps))` for "add" (timm's),
    with the biased variance of the N weights of the unit.
    """
    units = weight.flatten(1).to(accumulation_dtype(weight.dtype))
    deviations, r, _ = _statistics(units, eps, eps_form)
    return (deviations * (r * _gain_column(gain, units) * scale)).reshape(weight.shape).to(dtype)


def weight_standardize_backward(
    grad_out: Tensor, weight: Tensor, gain: Tensor | None, scale: float, eps: float, eps_form: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `weight_standardize` for weight and gain; differentiable once more."""
    units = weight.flatten(1).to(accumulation_dtype(weight.dtype))
    grad = grad_out.flatten(1).to(units.dtype)
    deviations, r, varies = _statistics(units, eps, eps_form)
    projection = (grad * deviations).sum(dim=1, keepdim=True)
    shrink = torch.where(varies, r.square() * projection, 0.0)
    centered = grad - grad.mean(dim=1, keepdim=True) - deviations * shrink
    grad_weight = (centered * (r * _gain_column(gain, units) * scale)).reshape(weight.shape).to(weight.dtype)
    grad_gain = None if gain is None else (scale * r * projection).reshape(gain.shape).to(gain.dtype)
    return grad_weight, grad_gain
