"""This package's adaptive gradient clipping in timm's training loop."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable

from torch import Tensor

from .. import functional

# `timm.utils.clip_grad` is where `dispatch_clip_grad`, and so timm's scalers and train.py, look the function up.
_HOLDERS = ("timm.utils", "timm.utils.agc", "timm.utils.clip_grad")


def adaptive_clip_grad(
    parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3, norm_type: float = 2.0
) -> None:
    """timm's function of that name, as one call of `nfnets_kernels.agc_`, which says what it does and raises."""
    functional.agc_(parameters, clip_factor, eps, norm_type, rule="timm")


def use_agc() -> contextlib.ExitStack:
    """Replaces timm's `adaptive_clip_grad`, and with it what timm's `--clip-mode agc` calls.

    That is `timm.utils.dispatch_clip_grad` and `timm.utils.NativeScaler`, wherever they were imported, and
    `timm.utils.adaptive_clip_grad` where it is imported later. For timm's train.py, in a script beside it:

        import runpy
        from nfnets_kernels.integrations.timm import use_agc

        use_agc()
        runpy.run_path("train.py", run_name="__main__")  # with --clip-mode agc --clip-grad 0.01

    Returns:
        What undoes this, by `close()` or as a context manager; a second call while it is in force changes nothing, and
        its result undoes nothing.
    """
    undo = contextlib.ExitStack()
    for holder in map(importlib.import_module, _HOLDERS):
        if holder.adaptive_clip_grad is not adaptive_clip_grad:
            undo.callback(setattr, holder, "adaptive_clip_grad", holder.adaptive_clip_grad)
            holder.adaptive_clip_grad = adaptive_clip_grad  # type: ignore[attr-defined]
    return undo
