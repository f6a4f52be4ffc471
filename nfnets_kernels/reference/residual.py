"""The end of a residual block and the start of the next one in plain PyTorch (Brock et al. 2021)."""

import torch
from torch import Tensor

from .scaled_activation import scaled_activation, scaled_activation_backward
from .weight_standardize import accumulation_dtype


def is_one(skip_gain: Tensor | None, se: Tensor | None, keep: Tensor | None, alpha: float) -> bool:
    """Whether `factor` is the constant 1, for which it returns None."""
    return alpha == 1.0 and skip_gain is None and se is None and keep is None


def factor(f: Tensor, skip_gain: Tensor | None, se: Tensor | None, keep: Tensor | None, alpha: float) -> Tensor | None:
    """`alpha * skip_gain * keep * 2 sigmoid(se)`, (N, C) in the accumulation dtype; None where it is the constant 1."""
    if is_one(skip_gain, se, keep, alpha):
        return None
    product = torch.full(f.shape[:2], alpha, dtype=accumulation_dtype(f.dtype), device=f.device)
    if skip_gain is not None:
        product = product * skip_gain.to(product.dtype)
    if keep is not None:
        product = product * keep.to(product.dtype)[:, None]
    if se is not None:
        product = product * (2.0 * torch.sigmoid(se.to(product.dtype)))
    return product


def factor_backward(
    grad: Tensor, f: Tensor, skip_gain: Tensor | None, se: Tensor | None, keep: Tensor | None, alpha: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `factor` for skip_gain, se and keep from its own, (N, C)."""
    grad_skip_gain = grad_se = grad_keep = None
    if skip_gain is not None:
        others = factor(f, None, se, keep, alpha)
        grad_skip_gain = (grad if others is None else grad * others).sum().reshape(skip_gain.shape).to(skip_gain.dtype)
    if keep is not None:
        others = factor(f, skip_gain, se, None, alpha)
        grad_keep = (grad if others is None else grad * others).sum(dim=1).to(keep.dtype)
    if se is not None:
        others = factor(f, skip_gain, None, keep, alpha)
        gate = torch.sigmoid(se.to(grad.dtype))
        slope = 2.0 * gate * (1.0 - gate)
        grad_se = (grad * slope if others is None else grad * slope * others).to(se.dtype)
    return grad_skip_gain, grad_se, grad_keep


def spread(product: Tensor, like: Tensor) -> Tensor:
    """(N, C) over the trailing dims of (N, C, ...)."""
    return product.reshape(product.shape + (1,) * (like.ndim - 2))


def residual(f: Tensor, shortcut: Tensor, product: Tensor | None, key: str, scale: float) -> tuple[Tensor, Tensor]:
    """`h = product * f + shortcut` and `a = scale * act(h)`; f, shortcut: (N, C, ...), product: `factor`'s (N, C)."""
    acc = accumulation_dtype(f.dtype)
    branch = f.to(acc) if product is None else f.to(acc) * spread(product, f)
    h = (branch + shortcut.to(acc)).to(f.dtype)
    return h, scaled_activation(h, key, scale)


def residual_backward(
    grad_h: Tensor, grad_a: Tensor, f: Tensor | None, saved: Tensor, product: Tensor | None, key: str, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients for shortcut, f and product (where f is given); saved is h, or ReLU's output."""
    acc = accumulation_dtype(grad_h.dtype)
    grad = grad_h.to(acc) + scaled_activation_backward(grad_a.to(acc), saved.to(acc), key, scale)
    grad_f = grad if product is None else grad * spread(product, grad)
    sums = None if f is None else (grad * f.to(acc)).flatten(2).sum(dim=2) if f.ndim > 2 else grad * f.to(acc)
    return grad.to(grad_h.dtype), grad_f.to(grad_h.dtype), sums
