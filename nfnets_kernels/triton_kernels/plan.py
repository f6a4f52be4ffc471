"""Which program of a launch works on which units of weights and gradients: tiles of units, or parts of long ones.

A unit that no tile holds takes two launches: `sum_parts_kernel`, and an op's own kernel, which gets the unit's norms
from `norms_of_parts`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import ceil_div, scalar, widened
from .norms import combine, joined, root, term
from .table import COUNT, LENGTH, STEP, TILE, Table, Variant, is_aligned, pointer, row_of_program, variant_of

# Columns of a row of the table where tiles hold the units, and where they do not.
TILE_COLUMNS, _PART_COLUMNS = tl.constexpr(4), tl.constexpr(6)
_PARTS, _TILES = tl.constexpr(4), tl.constexpr(5)
# Parts of a long unit; a program adds up all of its unit's sums at once.
_MOST_PARTS = tl.constexpr(256)


@triton.jit
def tile_of_program(rows, owners):
    """Tensor, variant and tile that a program works on, elements of a unit, and units of the tensor."""
    tensor, row, variant, tile = row_of_program(rows, owners, TILE_COLUMNS)
    return tensor, variant, tile, tl.load(row + LENGTH), tl.load(row + COUNT)


@triton.jit
def part_of_program(rows, owners):
    """Tensor, variant, unit and part that a program works on, elements of a unit, parts, and tiles of a part."""
    tensor, row, variant, i = row_of_program(rows, owners, _PART_COLUMNS)
    parts = tl.load(row + _PARTS)
    return tensor, variant, i // parts, i % parts, tl.load(row + LENGTH), parts, tl.load(row + _TILES)


@triton.jit
def _sum_part(x, start, length, tiles, p, NORM: tl.constexpr):
    """Sum, or largest, of a part of a long unit in float64."""
    total = tl.zeros((STEP,), tl.float64)
    for i in range(tiles * (TILE // STEP)):
        at = start + i * STEP + tl.arange(0, STEP)
        values = widened(tl.load(x + at, mask=at < length, other=0.0), tl.float64)
        total = joined(total, term(values, p, NORM), NORM)
    return combine(total, NORM, 0)


@triton.jit
def sum_parts_kernel(
    pointers, rows, owners, sums, p: tl.float64,
    VARIANTS: tl.constexpr, NORM: tl.constexpr, POINTERS: tl.constexpr,
):  # fmt: skip
    """First launch for long units: sums[program] = what a part adds to the norms of weight and gradient."""
    program = tl.program_id(0)
    tensor, variant, unit, part, length, _, tiles = part_of_program(rows, owners)
    p = scalar(p, tl.float64)
    for i in tl.static_range(len(VARIANTS)):
        if variant == i:
            weight = pointer(pointers, POINTERS * tensor, unit * length, VARIANTS[i][1], False)
            grad = pointer(pointers, POINTERS * tensor + 1, unit * length, VARIANTS[i][2], False)
            start = part * tiles * TILE
            tl.store(sums + 2 * program, _sum_part(weight, start, length, tiles, p, NORM))
            tl.store(sums + 2 * program + 1, _sum_part(grad, start, length, tiles, p, NORM))


@triton.jit
def norms_of_parts(sums, part, parts, p, NORM: tl.constexpr):
    """Norms of the program's unit: the sums of its parts, added in the same order in each of its programs."""
    others = tl.arange(0, _MOST_PARTS)
    of_unit = sums + 2 * (tl.program_id(0) - part + others)
    weight_sum = combine(tl.load(of_unit, mask=others < parts, other=0.0), NORM, 0)
    grad_sum = combine(tl.load(of_unit + 1, mask=others < parts, other=0.0), NORM, 0)
    return root(weight_sum, p, NORM, tl.float64), root(grad_sum, p, NORM, tl.float64)


class Structure(NamedTuple):
    """All that a plan depends on: what stays from step to step."""

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    weight_dtypes: tuple[torch.dtype, ...]
    grad_dtypes: tuple[torch.dtype, ...]
    misaligned: tuple[int, ...]
    """the tensors of which some address is not a multiple of 16"""
    pointers: int
    """addresses of each tensor"""
    group: Any = None
    """tells apart what would otherwise take turns with one table of pointers"""


def misaligned(*addresses: Sequence[int]) -> tuple[int, ...]:
    """The tensors that some of the lists have at no multiple of 16 bytes."""
    return tuple(i for i, of_tensor in enumerate(zip(*addresses, strict=True)) if not is_aligned(*of_tensor))


class _Share(NamedTuple):
    """The tensors that one path works on: those whose units a tile holds, or the others."""

    members: list[int]
    table: Table

    def launch(self, kernel: Any, addresses: Sequence[Sequence[int]], **arguments: Any) -> None:
        """Runs a kernel on the members of tensors at these addresses: one list for each pointer of a tensor."""
        pointers = [of_pointer[i] for i in self.members for of_pointer in addresses]
        self.table.launch(kernel, pointers, POINTERS=len(addresses), **arguments)


class Plan:
    """Which program works on what."""

    def __init__(self, structure: Structure, device: torch.device) -> None:
        misaligned = set(structure.misaligned)
        of_tensor = [
            variant_of(length, count, weight, grad, aligned=i not in misaligned)
            for i, (count, length, weight, grad) in enumerate(zip(*structure[:4], strict=True))
        ]
        self.short = _share(structure, of_tensor, [i for i, v in enumerate(of_tensor) if v.block], _short_row, device)
        self.long = _share(structure, of_tensor, [i for i, v in enumerate(of_tensor) if not v.block], _long_row, device)
        programs = self.long.table.programs if self.long else 0
        self.sums = torch.empty(2 * programs, dtype=torch.float64, device=device)

    def launch(
        self,
        tile_kernel: Any,
        part_kernel: Any,
        addresses: Sequence[Sequence[int]],
        of_norm: dict[str, Any],
        **options: Any,
    ) -> None:
        """Runs both paths on tensors at these addresses, weights first, then gradients; of_norm: p and NORM."""
        if self.short:
            self.short.launch(tile_kernel, addresses, **options)
        if self.long:
            self.long.launch(sum_parts_kernel, addresses, sums=self.sums, **of_norm)
            self.long.launch(part_kernel, addresses, sums=self.sums, **options)


def _short_row(count: int, length: int, variant: Variant) -> tuple[list[int], int]:
    """Own columns of a tensor's row, and its programs."""
    return [], ceil_div(count, variant.units)


def _long_row(count: int, length: int, variant: Variant) -> tuple[list[int], int]:
    tiles = ceil_div(length, TILE.value * _MOST_PARTS.value)
    parts = ceil_div(length, TILE.value * tiles)
    return [parts, tiles], count * parts


def _share(structure, of_tensor, members, row_of, device) -> _Share | None:
    if not members:
        return None
    rows, programs = [], []
    for i in members:
        count, length = structure.counts[i], structure.lengths[i]
        own, own_programs = row_of(count, length, of_tensor[i])
        rows.append([count, length, *own])
        programs.append(own_programs)
    return _Share(members, Table([of_tensor[i] for i in members], rows, programs, structure.pointers, device))
