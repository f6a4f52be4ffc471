"""`AGC`: adaptive gradient clipping of a fixed set of parameters, for hot training loops."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, ops


class AGC:
    """Clips the gradients of a model's parameters unit by unit, once per step, between backward() and optimizer.step().

    Args:
        module_or_params: a module, or parameters. One that appears twice is clipped once.
        clip_factor, eps, norm_type, rule, backend: see `nfnets_kernels.agc_`.
        exclude: modules whose parameters (nested ones too) stay unclipped, by qualified name as in `named_modules()` or
            as objects. The authors leave out the last linear layer: `exclude=("fc",)`. A parameter that an excluded
            module shares with another one is excluded.

    Raises:
        TypeError: module_or_params or an entry of exclude is of another type.
        ValueError: a name or module that the model does not have, or an option that `agc_` rejects.

    Example:
        >>> agc = AGC(model, clip_factor=0.01, exclude=("fc",))
        >>> loss.backward(); agc.clip_(); optimizer.step()
    """

    def __init__(
        self,
        module_or_params: nn.Module | Tensor | Iterable[Tensor],
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        *,
        norm_type: float = 2.0,
        rule: str = "timm",
        exclude: Sequence[str | nn.Module] = (),
        backend: str = "auto",
    ) -> None:
        ops.agc.check_options(clip_factor, eps, norm_type, rule, backend)
        if isinstance(exclude, (str, nn.Module)):
            raise TypeError(f"exclude must be a sequence of names or modules, got a single {type(exclude).__name__}")
        self.clip_factor = clip_factor
        self.eps = eps
        self.norm_type = norm_type
        self.rule = rule
        self.backend = backend
        self.parameters = _included(module_or_params, exclude)
        self._repeat: ops.agc.Repeat | None = None

    def clip_(self) -> None:
        """Clips the gradients that are there now, in place and in one pass.

        The first call checks all that `agc_` checks. As long as the parameters stay where they were and the gradients
        are as plain, the next ones reuse what it collected.
        """
        if torch.compiler.is_compiling():
            self._clip_checked()
            return
        options = (self.clip_factor, self.eps, self.norm_type, self.rule, self.backend)
        ops.agc.check_options(*options)
        if self._repeat is None or not self._repeat.clip_(self.parameters, *options):
            self._clip_checked()
            self._repeat = ops.agc.repeat_for(self.parameters, self.rule, self.backend)

    def _clip_checked(self) -> None:
        functional.agc_(
            self.parameters, self.clip_factor, self.eps, self.norm_type, rule=self.rule, backend=self.backend
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_repeat": None}

    def __repr__(self) -> str:
        return (
            f"AGC({len(self.parameters)} parameters, clip_factor={self.clip_factor}, eps={self.eps}, "
            f"norm_type={self.norm_type}, rule={self.rule!r}, backend={self.backend!r})"
        )


def _included(
    module_or_params: nn.Module | Tensor | Iterable[Tensor], exclude: Sequence[str | nn.Module]
) -> list[Tensor]:
    root = module_or_params if isinstance(module_or_params, nn.Module) else None
    excluded = {id(p) for entry in exclude for p in _resolve(entry, root).parameters()}
    if isinstance(module_or_params, nn.Module):
        parameters: Iterable[Tensor] = module_or_params.parameters()
    elif isinstance(module_or_params, Tensor):
        parameters = [module_or_params]
    elif isinstance(module_or_params, Iterable):
        parameters = module_or_params
    else:
        raise TypeError(f"module_or_params must be a module or tensors, got {type(module_or_params).__name__}")
    included: dict[int, Tensor] = {}
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"module_or_params must hold tensors, got {type(parameter).__name__}")
        if id(parameter) not in excluded:
            included[id(parameter)] = parameter
    return list(included.values())


def _resolve(entry: str | nn.Module, root: nn.Module | None) -> nn.Module:
    """The module that an entry of exclude means."""
    if isinstance(entry, nn.Module):
        if root is not None and all(entry is not module for module in root.modules()):
            raise ValueError(f"exclude holds a {type(entry).__name__} that is not part of the model")
        return entry
    if not isinstance(entry, str):
        raise TypeError(f"exclude must hold names or modules, got {type(entry).__name__}")
    if root is None:
        raise ValueError(f"exclude={entry!r} names a module, but only parameters were given; pass the model instead")
    modules = dict(root.named_modules())
    if entry not in modules:
        close = difflib.get_close_matches(entry, modules) + [name for name in modules if name.endswith(f".{entry}")]
        hint = f"; did you mean one of {sorted(set(close))}?" if close else ""
        raise ValueError(f"exclude={entry!r} matches no module of the model{hint}")
    return modules[entry]
