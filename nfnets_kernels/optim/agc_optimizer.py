"""`AGCOptimizer`: any optimizer, with adaptive gradient clipping before its step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sharded import local, reject_flat_parameters
from .agc import AGC


class AGCOptimizer(AGC, Optimizer):
    """Another optimizer, whose gradients are clipped before each step; what `AGC(optimizer, ...)` makes.

    It stands for the other one everywhere: schedulers, `torch.amp.GradScaler`, state_dict. Parameter groups and state
    are the other's. A group's own "clip_factor", as `optim.param_groups` makes it, goes before the one given here; None
    leaves the group unclipped. A `GradScaler` may leave the gradients scaled: they are unscaled before clipping.

    Args:
        optimizer: any torch.optim.Optimizer.
        clip_factor: of the groups that have none of their own.
        eps, norm_type, rule, backend, statistics: see `AGC`.

    Raises:
        TypeError: optimizer is none, or has parameters of FullyShardedDataParallel (FSDP1).
        ValueError: an option that `agc_` rejects.

    Examples:
        >>> optimizer = AGC(torch.optim.AdamW(param_groups(model), lr=1e-3), clip_factor=0.01)
        >>> loss.backward(); optimizer.step()
    """

    _step_supports_amp_scaling = True  # a GradScaler then leaves unscaling to step()

    def __init__(
        self,
        optimizer: Optimizer,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        *,
        norm_type: float = 2.0,
        rule: str = "timm",
        backend: str = "auto",
        statistics: bool = False,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self._set_options(clip_factor, eps, norm_type, rule, backend, statistics)
        reject_flat_parameters(self.parameters)

    # Optimizer's own attributes and methods, of the other one.
    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def parameters(self) -> list[Tensor]:  # type: ignore[override]
        """All parameters that are clipped."""
        return [parameter for _, parameters in self._by_factor() for parameter in parameters]

    def _by_factor(self) -> list[tuple[float, list[Tensor]]]:
        by_factor: dict[float, list[Tensor]] = {}
        for group in self.param_groups:
            factor = group.get("clip_factor", self.clip_factor)
            if factor is not None:
                by_factor.setdefault(factor, []).extend(group["params"])
        return list(by_factor.items())

    def _named_parameters(self) -> list[tuple[str, Tensor]]:
        return named_parameters(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips, then the other optimizer's step; with a closure, after each of its evaluations."""
        scale, found_inf = (self.__dict__.get(name) for name in ("grad_scale", "found_inf"))
        if scale is not None:
            unscale_([parameter for group in self.param_groups for parameter in group["params"]], scale)
        if found_inf is not None and not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            if found_inf:  # waits for the device: such an optimizer steps or does not, as the host says
                return None
            found_inf = None
        if closure is None:
            with nullcontext() if found_inf is None or self._counts is None else self._counts.unless(found_inf):
                self.clip_()
            return self._step_unless(found_inf)
        return self.optimizer.step(self._clipping(closure))

    def _step_unless(self, found_inf: Tensor | None) -> Any:
        """The other optimizer's step, which it skips itself where there are infinities."""
        other: Any = self.optimizer
        if found_inf is None:
            return other.step()
        other.grad_scale, other.found_inf = None, found_inf
        try:
            return other.step()
        finally:
            del other.grad_scale, other.found_inf

    def _clipping(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.clip_()
            return loss

        return evaluate

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The other optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the other optimizer: what it saved with or without clipping."""
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # Without a scheduler's step, which would step the optimizer that is copied, not the copy.
        return {key: value for key, value in super().__getstate__().items() if key != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"{AGC.__repr__(self)} before\n{self.optimizer!r}"


def unscale_(parameters: Sequence[Tensor], grad_scale: Tensor) -> None:
    """Divides the gradients by what a `GradScaler` multiplied the loss by."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_div_(list(map(local, grads)), grad_scale)


def named_parameters(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """An optimizer's parameters, with the names that it was given, if any."""
    named: list[tuple[str, Tensor]] = []
    for i, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"param_groups[{i}][{j}]" for j in range(len(group["params"]))]
        named += zip(names, group["params"], strict=True)
    return named
