"""What `SGD_AGC` collects for a step, and keeps for the next ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .. import ops
from ..ops.sgd_agc import Call, Hyperparameters, Tensors
from ..sharded import is_sharded, local


def hyperparameters(group: dict[str, Any], lr: float) -> Hyperparameters:
    """Those of a parameter group, with this learning rate."""
    return Hyperparameters(
        lr=lr,
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        clip_factor=group["clip_factor"],
        eps=group["eps"],
        average_decay=0.0 if group["ema_decay"] is None else group["ema_decay"],
    )


class Memory(NamedTuple):
    """What serves the next steps."""

    repeat: ops.sgd_agc.Repeat
    kinds: list[tuple[Any, ...]]
    of_parameters: list[dict[str, Any]]
    """the optimizer's states of all parameters"""
    keys: list[tuple[dict[str, Any], str]]
    """where in these the tensors are that the repeat knows; a look-up by parameter would take 0.4 us each"""

    def states_now(self) -> list[Tensor | None]:
        """The tensors that are there now."""
        return [states.get(key) for states, key in self.keys]


class Plan:
    """Collects the tensors of a step, and the hyperparameters that hold for each."""

    def __init__(self, call: Call) -> None:
        self._groups = len(call.hypers)
        self._variants: dict[tuple[int, bool, bool], int] = {}
        self._parameters: list[Tensor] = []
        self.call = call._replace(hypers=list(call.hypers), lrs=list(call.lrs))
        self.tensors = Tensors([], [], [], [], [], [])

    @property
    def has_variants(self) -> bool:
        """Whether some parameters were treated in another way than their group's at later steps."""
        return bool(self._variants)

    def variant(self, group: int, *, first: bool, clipped: bool) -> int:
        """Index of the hyperparameters of a group; `first`: without dampening; not `clipped`: that has been done."""
        if clipped and not first:
            return group
        index = self._variants.setdefault((group, first, clipped), self._groups + len(self._variants))
        if index == len(self.call.hypers):
            hyper = self.call.hypers[group]
            dampening, clip_factor = 0.0 if first else hyper.dampening, hyper.clip_factor if clipped else None
            self.call.hypers.append(hyper._replace(dampening=dampening, clip_factor=clip_factor))
            self.call.lrs.append(self.call.lrs[group])
        return index

    def add(self, of_parameter: list[Any], variant: int) -> None:
        """Adds a parameter: itself, its gradient, momentum buffer, average and counts; None: without."""
        parameter, grad, *states = of_parameter
        if is_sharded(grad) and grad.placements != parameter.placements:  # a pending sum
            grad = grad.redistribute(placements=parameter.placements)
        self._parameters.append(parameter)
        entries = [x if x is None else local(x) for x in (parameter, grad, *states)]
        columns: tuple[list[Any], ...] = self.tensors
        for column, entry in zip(columns, [*entries, variant], strict=True):
            column.append(entry)

    def states_in(
        self, state: Mapping[Tensor, dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], str]]]:
        """An optimizer's states of all parameters, and where the plan's are in these, in the order of a Repeat's."""
        columns = (("momentum_buffer", self.tensors.momentum_buffers), ("ema", self.tensors.averages))
        keys = [
            (state[parameter], key)
            for key, column in columns
            for parameter, tensor in zip(self._parameters, column, strict=True)
            if tensor is not None
        ]
        return list(state.values()), keys
