"""The end of a residual block and the start of the next one in plain PyTorch (Brock et al. 2021)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .scaled_activation import scaled_activation, scaled_activation_backward
from .weight_standardize import accumulation_dtype


class Branch(NamedTuple):
    """What multiplies the residual branch f of shape (N, C, ...): alpha * skip_gain * keep * 2 sigmoid(se)."""

    skip_gain: Tensor | None
    """()"""
    se: Tensor | None
    """(N, C)"""
    keep: Tensor | None
    """(N,)"""
    alpha: float

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """skip_gain, se and keep."""
        return self[:3]

    @property
    def is_one(self) -> bool:
        """Whether it is the constant 1."""
        return self.alpha == 1.0 and all(tensor is None for tensor in self.tensors)


def factor(f: Tensor, branch: Branch) -> Tensor | None:
    """`alpha * skip_gain * keep * 2 sigmoid(se)`, (N, C) in the accumulation dtype; None where it is the constant 1."""
    if branch.is_one:
        return None
    product = torch.full(f.shape[:2], branch.alpha, dtype=accumulation_dtype(f.dtype), device=f.device)
    if branch.skip_gain is not None:
        product = product * branch.skip_gain.to(product.dtype)
    if branch.keep is not None:
        product = product * branch.keep.to(product.dtype)[:, None]
    if branch.se is not None:
        product = product * (2.0 * torch.sigmoid(branch.se.to(product.dtype)))
    return product


def factor_backward(grad: Tensor, f: Tensor, branch: Branch) -> list[Tensor]:
    """Gradients of `factor` for those of skip_gain, se and keep that are there, from its own, (N, C)."""
    skip_gain, se, keep, _ = branch
    grads = []
    if skip_gain is not None:
        others = factor(f, branch._replace(skip_gain=None))
        grads.append((grad if others is None else grad * others).sum().reshape(skip_gain.shape).to(skip_gain.dtype))
    if se is not None:
        others = factor(f, branch._replace(se=None))
        gate = torch.sigmoid(se.to(grad.dtype))
        slope = 2.0 * gate * (1.0 - gate)
        grads.append((grad * slope if others is None else grad * slope * others).to(se.dtype))
    if keep is not None:
        others = factor(f, branch._replace(keep=None))
        grads.append((grad if others is None else grad * others).sum(dim=1).to(keep.dtype))
    return grads


def spread(product: Tensor, like: Tensor) -> Tensor:
    """(N or 1, C) over the trailing dims of (N, C, ...)."""
    return product.reshape(product.shape + (1,) * (like.ndim - 2))


def sum_space(x: Tensor) -> Tensor:
    """(N, C, ...) summed to (N, C)."""
    return x.flatten(2).sum(dim=2) if x.ndim > 2 else x


def sum_to_channels(x: Tensor) -> Tensor:
    """(N, C, ...) summed to (C,)."""
    return sum_space(x).sum(dim=0)


def residual(
    f: Tensor, shortcut: Tensor, branch: Branch, key: str, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h = factor * f + bias + shortcut` and `a = scale * act(h)`; f, shortcut: (N, C, ...), bias: (C,)."""
    acc = accumulation_dtype(f.dtype)
    product = factor(f, branch)
    scaled = f.to(acc) if product is None else f.to(acc) * spread(product, f)
    if bias is not None:
        scaled = scaled + spread(bias.to(acc)[None], f)
    h = (scaled + shortcut.to(acc)).to(f.dtype)
    return h, scaled_activation(h, key, scale)


def bias_activation(f: Tensor, key: str, scale: float, bias: Tensor) -> Tensor:
    """`scale * act(f + bias)`; f: (N, C, ...), bias: (C,)."""
    acc = accumulation_dtype(f.dtype)
    return scaled_activation(f.to(acc) + spread(bias.to(acc)[None], f), key, scale).to(f.dtype)


def residual_backward(
    grad_h: Tensor | None,
    grad_a: Tensor,
    f: Tensor | None,
    saved: Tensor,
    branch: Branch,
    key: str,
    scale: float,
    bias_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> list[Tensor]:
    """Gradients for shortcut, where the branch is not 1 for f, where f is given for the branch's tensors, and for bias.

    grad_h is None for zeros; saved is h, or ReLU's output, or with `bias` what this is added to in `bias_activation`;
    bias_dtype is None where bias needs no gradient.
    """
    acc = accumulation_dtype(saved.dtype)
    at = saved.to(acc) if bias is None else saved.to(acc) + spread(bias.to(acc)[None], saved)
    grad = scaled_activation_backward(grad_a.to(acc), at, key, scale)
    if grad_h is not None:
        grad = grad_h.to(acc) + grad
    grads = [grad.to(saved.dtype)]
    product = factor(saved, branch)
    if product is not None:
        grads.append((grad * spread(product, grad)).to(saved.dtype))
    if f is not None:
        grads += factor_backward(sum_space(grad * f.to(acc)), saved, branch)
    if bias_dtype is not None:
        grads.append(sum_to_channels(grad).to(bias_dtype))
    return grads
