"""`AGC`: adaptive gradient clipping in hot training loops, of a model's parameters or before an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import ops
from ..sharded import clip_sharded_, is_sharded, reject_flat_parameters
from .lookup import find_module
from .statistics import ClippingStatistics, UnitCounts

if TYPE_CHECKING:
    from torch.amp import GradScaler


class AGC:
    """Clips the gradients of a model's parameters unit by unit, once per step, between backward() and optimizer.step().

    Given an optimizer, it is an optimizer itself, which clips before each step: see `AGCOptimizer`.

    Parameters may be DTensors (FSDP2's `fully_shard`, tensor parallelism): `clip_` is then a collective call.

    Args:
        module_or_params: a module, or parameters. One that appears twice is clipped once.
        clip_factor, eps, norm_type, rule, backend: see `nfnets_kernels.agc_`.
        exclude: modules whose parameters (nested ones too) stay unclipped, by qualified name as in `named_modules()` or
            as objects. The authors leave out the last linear layer: `exclude=("fc",)`. A parameter that an excluded
            module shares with another one is excluded.
        statistics: count for every unit how often it was clipped, for `stats()`: 12 bytes a unit.

    Raises:
        TypeError: module_or_params or an entry of exclude is of another type, or parameters are those of
            FullyShardedDataParallel (FSDP1), which has no units.
        ValueError: a name or module that the model does not have, or an option that `agc_` rejects.

    Examples:
        >>> agc = AGC(model, clip_factor=0.01, exclude=("fc",))
        >>> loss.backward(); agc.clip_(); optimizer.step()
    """

    def __new__(cls, module_or_params: Any = (), *args: Any, **kwargs: Any) -> AGC:  # noqa: D102 (it is __init__'s)
        if cls is AGC and isinstance(module_or_params, Optimizer):
            from .agc_optimizer import AGCOptimizer

            return super().__new__(AGCOptimizer)
        return super().__new__(cls)

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
        statistics: bool = False,
    ) -> None:
        self._set_options(clip_factor, eps, norm_type, rule, backend, statistics)
        check_exclude(exclude)
        self.parameters, self._names = _included(module_or_params, exclude)
        reject_flat_parameters(self.parameters)

    def _set_options(
        self, clip_factor: float, eps: float, norm_type: float, rule: str, backend: str, statistics: bool
    ) -> None:
        ops.agc.check_options(clip_factor, eps, norm_type, rule, backend)
        self.clip_factor = clip_factor
        self.eps = eps
        self.norm_type = norm_type
        self.rule = rule
        self.backend = backend
        self._counts = UnitCounts() if statistics else None
        self._repeats: dict[int, ops.agc.Repeat | None] = {}  # by place in _by_factor(): factors may be scheduled

    def _by_factor(self) -> list[tuple[float, list[Tensor]]]:
        """What is clipped to which clip_factor."""
        return [(self.clip_factor, self.parameters)]

    def _named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return zip(self._names, self.parameters, strict=False)

    def clip_(self) -> None:
        """Clips the gradients that are there now, in place and in one pass.

        The first call checks all that `agc_` checks. As long as the parameters stay where they were and the gradients
        are as plain, the next ones reuse what it collected.
        """
        for place, (clip_factor, parameters) in enumerate(self._by_factor()):
            self._clip_to(clip_factor, parameters, place)

    def clip_scaled_(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        """Unscales the gradients of an optimizer whose loss a `torch.amp.GradScaler` scaled, then clips.

        Clipping compares gradients with parameters: `clip_` of gradients that are still scaled, by 65,536 say, clips
        them all. Instead of `scaler.unscale_(optimizer); agc.clip_()`; `scaler.step(optimizer)` follows and skips the
        step where it found infinities, which `stats()` then counts as clipped. An `AGC(optimizer)` and `SGD_AGC` do
        without: they know what they are given.

        Raises:
            RuntimeError: the gradients have been unscaled since the last `scaler.update()`.
        """
        scaler.unscale_(optimizer)
        self.clip_()

    def _clip_to(self, clip_factor: float, parameters: list[Tensor], place: int) -> None:
        options = (clip_factor, self.eps, self.norm_type, self.rule, self.backend)
        if torch.compiler.is_compiling():
            self._clip_checked(parameters, *options)
            return
        ops.agc.check_options(*options)
        repeat = self._repeats.get(place)
        if repeat is None or not repeat.clip_(parameters, *options):
            self._clip_checked(parameters, *options)
            self._repeats[place] = ops.agc.repeat_for(parameters, self.rule, self.backend, self._counting())

    def _clip_checked(
        self, parameters: list[Tensor], clip_factor: float, eps: float, norm_type: float, rule: str, backend: str
    ) -> None:
        counts = self._counting()
        if any(map(is_sharded, parameters)):
            clip_sharded_(parameters, clip_factor, eps, norm_type, rule=rule, backend=backend, counts=counts)
        else:
            weights, grads = ops.agc.with_gradients(parameters)
            statistics = None if counts is None else list(map(counts, weights))
            with torch.no_grad():
                ops.agc.agc_(weights, grads, clip_factor, eps, norm_type, rule, backend, statistics)

    def _counting(self) -> Callable[[Tensor], Tensor] | None:
        """What gives the counts of a parameter, where there are any."""
        return None if self._counts is None else partial(self._counts.of, rule=self.rule)

    def stats(self) -> ClippingStatistics:
        """What has been clipped since construction or `reset_stats()`, parameter by parameter; prints as a table.

        Reading waits for the device; counting did not.

        Raises:
            RuntimeError: nothing was counted: statistics=True was not given.
        """
        if self._counts is None:
            raise RuntimeError(f"nothing was counted: {type(self).__name__} was made without statistics=True")
        return self._counts.read(self._named_parameters())

    def reset_stats(self) -> None:
        """Starts counting anew."""
        if self._counts is not None:
            self._counts.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_repeats": {}}

    def __repr__(self) -> str:
        return (
            f"AGC({len(self.parameters)} parameters, clip_factor={self.clip_factor}, eps={self.eps}, "
            f"norm_type={self.norm_type}, rule={self.rule!r}, backend={self.backend!r})"
        )


def check_exclude(exclude: Sequence[str | nn.Module]) -> None:
    """Raises TypeError for a single name or module."""
    if isinstance(exclude, (str, nn.Module)):
        raise TypeError(f"exclude must be a sequence of names or modules, got a single {type(exclude).__name__}")


def _included(
    module_or_params: nn.Module | Tensor | Iterable[Tensor], exclude: Sequence[str | nn.Module]
) -> tuple[list[Tensor], list[str]]:
    """Parameters that are clipped, and their names."""
    root = module_or_params if isinstance(module_or_params, nn.Module) else None
    excluded = {id(p) for entry in exclude for p in _resolve(entry, root).parameters()}
    if isinstance(module_or_params, nn.Module):
        named: Iterable[tuple[str, Tensor]] = module_or_params.named_parameters()
    elif isinstance(module_or_params, Tensor):
        named = [("parameters[0]", module_or_params)]
    elif isinstance(module_or_params, Iterable):
        named = ((f"parameters[{i}]", parameter) for i, parameter in enumerate(module_or_params))
    else:
        raise TypeError(
            f"module_or_params must be a module, tensors or an optimizer, got {type(module_or_params).__name__}"
        )
    included: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in named:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"module_or_params must hold tensors, got {type(parameter).__name__}")
        if id(parameter) not in excluded:
            included.setdefault(id(parameter), (name, parameter))
    return [parameter for _, parameter in included.values()], [name for name, _ in included.values()]


def _resolve(entry: str | nn.Module, root: nn.Module | None) -> nn.Module:
    """The module that an entry of exclude means."""
    if root is not None:
        return find_module("exclude", entry, root)
    if isinstance(entry, str):
        raise ValueError(f"exclude={entry!r} names a module, but only parameters were given; pass the model instead")
    if not isinstance(entry, nn.Module):
        raise TypeError(f"exclude must hold names or modules, got {type(entry).__name__}")
    return entry
