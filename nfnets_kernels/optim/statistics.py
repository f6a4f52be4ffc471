"""What clipping did, counted unit by unit where the gradients are, and read when asked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..sharded import local_units
from .text_table import text_table

_COLUMNS = ("parameter", "shape", "units", "steps", "clipped", "largest ratio")


class ParameterStatistics(NamedTuple):
    """How the units of one parameter were clipped."""

    name: str
    """as in the model or the parameter groups"""
    shape: tuple[int, ...]
    """of the parameter"""
    units: int
    """that the parameter has, on this rank where it is sharded"""
    steps: int
    """in which the parameter had a gradient, since the counts were last set to 0"""
    fraction: float
    """of units clipped, over all of these steps; 0 where there was none"""
    largest_ratio: float
    """of gradient norm to parameter norm (eps at least), over all units and steps: above clip_factor it was clipped"""


class ClippingStatistics(tuple[ParameterStatistics, ...]):
    """`ParameterStatistics` of every clipped parameter; prints as a table."""

    @property
    def fraction(self) -> float:
        """Of all units clipped, over all steps."""
        seen = sum(row.units * row.steps for row in self)
        return sum(row.fraction * row.units * row.steps for row in self) / seen if seen else 0.0

    @property
    def largest_ratio(self) -> float:
        """Of gradient norm to parameter norm, over all units and steps; NaN where there was one."""
        ratios = [row.largest_ratio for row in self]
        return math.nan if any(map(math.isnan, ratios)) else max(ratios, default=0.0)

    def __repr__(self) -> str:
        lines = text_table([_COLUMNS, *map(_cells, self)])
        return "\n".join([*lines, f"clipped in all: {self.fraction:.2%}, largest ratio {self.largest_ratio:.3g}"])


def _cells(row: ParameterStatistics) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    return row.name, shape, f"{row.units}", f"{row.steps}", f"{row.fraction:.2%}", f"{row.largest_ratio:.3g}"


class UnitCounts:
    """The counts (csrc/units.h, `UnitStatistics`) of every unit of some parameters, on the parameters' devices.

    Of DTensors each rank counts the units that it holds something of.

    The kernels that clip add to them: no step waits for a device, and replays of a CUDA graph count too.
    """

    def __init__(self) -> None:
        self._of: dict[Tensor, Tensor] = {}

    def of(self, parameter: Tensor, rule: str) -> Tensor:
        """(units, 3) float32 of a parameter, from 0 where it is seen for the first time, or has other units now."""
        counts = self._of.get(parameter)
        units = local_units(parameter, rule)
        if counts is None or counts.shape[0] != units or counts.device != parameter.device:
            counts = torch.zeros(units, 3, dtype=torch.float32, device=parameter.device)
            self._of[parameter] = counts
        return counts

    @contextmanager
    def unless(self, found_inf: Tensor) -> Iterator[None]:
        """Takes back what is counted in the `with` block if found_inf is not 0, without waiting for the device."""
        before = {parameter: counts.clone() for parameter, counts in self._of.items()}
        yield
        for parameter, counts in self._of.items():
            old = before.get(parameter, torch.zeros_like(counts))
            counts.copy_(torch.where(found_inf.to(counts.device) != 0, old, counts))

    @torch.no_grad()
    def reset(self) -> None:
        """Sets all counts to 0, in place: captured graphs go on with them."""
        for counts in self._of.values():
            counts.zero_()

    @torch.no_grad()
    def read(self, named: Iterable[tuple[str, Tensor]]) -> ClippingStatistics:
        """Those of the named parameters that have been counted; waits for the devices, once for each."""
        rows = [(name, parameter, self._of[parameter]) for name, parameter in named if parameter in self._of]
        summaries = _on_host([_summary(counts) for _, _, counts in rows])
        return ClippingStatistics(
            ParameterStatistics(name, tuple(parameter.shape), len(counts), int(steps), clipped, largest)
            for (name, parameter, counts), (steps, clipped, largest) in zip(rows, summaries, strict=True)
        )


def _summary(counts: Tensor) -> Tensor:
    """Steps, fraction clipped and largest ratio of one parameter."""
    if not len(counts):
        return counts.new_zeros(3, dtype=torch.float64)
    steps, clipped, largest = counts.to(torch.float64).unbind(dim=1)
    return torch.stack([steps.max(), clipped.sum() / steps.sum().clamp(min=1.0), largest.max()])


def _on_host(summaries: Sequence[Tensor]) -> list[list[float]]:
    """The values of small tensors of one shape, one transfer per device."""
    values: list[list[float]] = [[] for _ in summaries]
    for device in {summary.device for summary in summaries}:
        indices = [i for i, summary in enumerate(summaries) if summary.device == device]
        for i, row in zip(indices, torch.stack([summaries[i] for i in indices]).tolist(), strict=True):
            values[i] = row
    return values
