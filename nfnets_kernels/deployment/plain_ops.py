"""The ops as arithmetic of torch that torch.fx can trace: on tensors and on its proxies alike."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..reference.scaled_activation import FUNCTIONS, function_key

SPACE = "nfnets_kernels.space"
"""Key of a node's meta: how many dims of space follow (N, C)."""


def _space(x: Any) -> int:
    """Dims of space; what does not come straight from a layer is taken for images."""
    return x.ndim - 2 if isinstance(x, Tensor) else x.node.meta.get(SPACE, 2)


def scaled_activation(x: Any, name: str, scale: float, approximate: str, backend: str) -> Any:
    """`scale * f(x)`."""
    out = FUNCTIONS[function_key(name, approximate)](x)
    return out if scale == 1.0 else out * scale


def scaled_activation_(x: Any, name: str, scale: float, approximate: str, backend: str) -> Any:
    """The same, written into x, for the three functions that the op offers."""
    out = x if name == "identity" else getattr(F, name)(x, inplace=True)
    return out if scale == 1.0 else out.mul_(scale)


def bias_activation(x: Any, bias: Any, *options: Any) -> Any:
    """`scale * f(x + bias)`, whatever the number of dims: transposed, the channels come last."""
    return scaled_activation((x.transpose(1, -1) + bias).transpose(1, -1), *options)


def residual(
    f: Any,
    shortcut: Any,
    skip_gain: Any,
    se: Any,
    keep: Any,
    alpha: float,
    activation: str,
    scale: float,
    approximate: str,
    backend: str,
    bias: Any = None,
) -> tuple[Any, Any]:
    """h and a; the static factors are multiplied into the gate, which is smaller than f."""
    over_space = (..., *[None] * _space(f))
    factor: Any = alpha
    if skip_gain is not None:
        factor = factor * (skip_gain.item() if isinstance(skip_gain, Tensor) else skip_gain)
    if keep is not None:
        factor = factor * keep[:, None]
    if se is not None:
        factor = torch.sigmoid(se) * (2.0 * factor)
    if se is not None or keep is not None:
        factor = factor[over_space]
    h = f + shortcut if isinstance(factor, float) and factor == 1.0 else f * factor + shortcut
    if bias is not None:
        h = h + bias[over_space]
    return h, scaled_activation(h, activation, scale, approximate, backend)


def residual_(f: Any, shortcut: Any, alpha: float, *options: Any) -> tuple[Any, Any]:
    """The same without a factor but alpha; f is not overwritten, since nothing is saved for gradients."""
    return residual(f, shortcut, None, None, None, alpha, *options)


_replacing = threading.RLock()


def _in_this_thread(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The function for calls of the current thread, the original for all others."""
    thread = threading.get_ident()
    return lambda *arguments: (function if threading.get_ident() == thread else original)(*arguments)


@contextlib.contextmanager
def traceable_ops() -> Iterator[None]:
    """Replaces the ops by the functions above, for the current thread and as long as the `with` block runs.

    One thread at a time, so that none restores what another has replaced.
    """
    replacements: list[tuple[Any, str, Any]] = [
        (ops.bias_activation, "check", lambda *_: None),
        (ops.bias_activation, "bias_activation", bias_activation),
        (ops.bias_activation, "bias_activation_", bias_activation),
        (ops.residual, "check", lambda *_: None),
        (ops.residual, "residual", residual),
        (ops.residual, "residual_", residual_),
        (ops.scaled_activation, "check", lambda *_: None),
        (ops.scaled_activation, "scaled_activation", scaled_activation),
        (ops.scaled_activation, "scaled_activation_", scaled_activation_),
    ]
    with _replacing:
        originals = [getattr(module, name) for module, name, _ in replacements]
        try:
            for (module, name, function), original in zip(replacements, originals, strict=True):
                setattr(module, name, _in_this_thread(function, original))
            yield
        finally:
            for (module, name, _), original in zip(replacements, originals, strict=True):
                setattr(module, name, original)
