"""Finding modules: the model under its wrappers, and a part of it by name."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel`, `DataParallel` and `torch.compile`, in any order; or the model."""
    while True:
        wraps = isinstance(model, (DistributedDataParallel, DataParallel))
        inner: Any = model.module if wraps else model._modules.get("_orig_mod")  # the latter is torch.compile's
        if inner is None:
            return model
        model = inner


def find_module(argument: str, entry: object, model: nn.Module) -> nn.Module:
    """The part of the model that an entry of an argument means, by qualified name as in `named_modules()` or itself.

    Raises:
        TypeError: the entry is neither a name nor a module.
        ValueError: the model has no such part.
    """
    if isinstance(entry, nn.Module):
        if all(entry is not module for module in model.modules()):
            raise ValueError(f"{argument} holds a {type(entry).__name__} that is not part of the model")
        return entry
    if not isinstance(entry, str):
        raise TypeError(f"{argument} must hold names or modules, got {type(entry).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    if entry not in modules:
        close = difflib.get_close_matches(entry, modules) + [name for name in modules if name.endswith(f".{entry}")]
        hint = f"; did you mean one of {sorted(set(close))}?" if close else ""
        raise ValueError(f"{argument}={entry!r} matches no module of the model{hint}")
    return modules[entry]
