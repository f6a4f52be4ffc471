"""Adaptive gradient clipping of all parameters of a device in one launch (Brock et al. 2021, equation 3)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import scalar, widened
from .norms import combine, decide, joined, norm, root, store_scaled, term
from .table import (
    COUNT,
    LENGTH,
    STEP,
    TILE,
    Table,
    Variant,
    columns_of_tile,
    is_aligned,
    pointer,
    row_of_program,
    table_for,
    variant_of,
)

_COLUMNS = tl.constexpr(4)
# Parts of a long unit; a program adds up all of its unit's sums at once.
_MOST_PARTS = tl.constexpr(256)
_PARTS, _TILES = tl.constexpr(4), tl.constexpr(5)
_LONG_COLUMNS = tl.constexpr(6)


@triton.jit
def _clip_units(
    weight, grad, length, units, clip_factor, eps,
    BLOCK: tl.constexpr, G: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Clips up to UNITS units that lie one behind the other; they stay in registers between norm and scaling.

    Returns whether ACC held everything on the way; where it did not, nothing was written.
    """
    n, columns, tail_columns = columns_of_tile(length, BLOCK, ALIGNED)
    rows = tl.arange(0, UNITS)[:, None]
    there = rows < units
    mask, tail_mask = there & (columns < n), there & (tail_columns < n)
    at, tail_at = rows * n + columns, rows * n + tail_columns
    w, w_tail = tl.load(weight + at, mask=mask, other=0.0), tl.load(weight + tail_at, mask=tail_mask, other=0.0)
    g, g_tail = tl.load(grad + at, mask=mask, other=0.0), tl.load(grad + tail_at, mask=tail_mask, other=0.0)
    weight_norm, grad_norm = norm(w, w_tail, NORM, ACC), norm(g, g_tail, NORM, ACC)
    clipped, factor, held = decide(weight_norm, grad_norm, clip_factor, eps, ACC)
    exact = tl.min(held.to(tl.int32), axis=0)
    clipped, factor = (clipped & (tl.full((UNITS,), exact, tl.int32) == 1))[:, None], factor[:, None]
    store_scaled(grad + at, g, factor, mask & clipped, ACC, G)
    store_scaled(grad + tail_at, g_tail, factor, tail_mask & clipped, ACC, G)
    return exact == 1


@triton.jit
def _clip_units_in_float64(
    weight, grad, length, units, clip_factor, eps, p,
    BLOCK: tl.constexpr, G: tl.constexpr, UNITS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """`_clip_units` for what float32 does not hold, and any p: reads twice, an eighth of a block at a time."""
    p = scalar(p, tl.float64)
    rows, columns = tl.arange(0, UNITS)[:, None], tl.arange(0, BLOCK // 8)[None, :]
    weight_sum = tl.zeros((UNITS, BLOCK // 8), tl.float64)
    grad_sum = tl.zeros((UNITS, BLOCK // 8), tl.float64)
    for i in range(9):
        at = i * (BLOCK // 8) + columns
        mask = (rows < units) & (at < length)
        w = widened(tl.load(weight + rows * length + at, mask=mask, other=0.0), tl.float64)
        g = widened(tl.load(grad + rows * length + at, mask=mask, other=0.0), tl.float64)
        weight_sum = joined(weight_sum, term(w, p, NORM), NORM)
        grad_sum = joined(grad_sum, term(g, p, NORM), NORM)
    clipped, factor, _ = decide(
        root(combine(weight_sum, NORM, 1), p, NORM, tl.float64),
        root(combine(grad_sum, NORM, 1), p, NORM, tl.float64),
        clip_factor,
        eps,
        tl.float64,
    )
    for i in range(9):
        at = i * (BLOCK // 8) + columns
        mask = (rows < units) & (at < length) & clipped[:, None]
        target = grad + rows * length + at
        store_scaled(target, tl.load(target, mask=mask, other=0.0), factor[:, None], mask, tl.float64, G)


@triton.jit
def _clip_single_elements(
    weight, grad, units, clip_factor, eps, G: tl.constexpr, UNITS: tl.constexpr, ALIGNED: tl.constexpr
):
    """Units of one element, whose norm of any p is the absolute value: one unit per lane."""
    units = tl.multiple_of(units, ALIGNED) if ALIGNED else units
    at = tl.arange(0, UNITS)
    mask = at < units
    w, g = tl.load(weight + at, mask=mask, other=0.0), tl.load(grad + at, mask=mask, other=0.0)
    # float64 costs nothing here: the elements of all gains together are some thousandths of a model
    clipped, factor, _ = decide(
        tl.abs(widened(w, tl.float64)),
        tl.abs(widened(g, tl.float64)),
        clip_factor,
        eps,
        tl.float64,
    )
    store_scaled(grad + at, g, factor, mask & clipped, tl.float64, G)


@triton.jit
def _clip_tile(
    pointers, tensor, length, units, first, clip_factor, eps, p,
    BLOCK: tl.constexpr, W: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, UNITS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if W == tl.float64 or G == tl.float64 else tl.float32
    start = first * UNITS
    weight = pointer(pointers, 2 * tensor, start * length, W, ALIGNED)
    grad = pointer(pointers, 2 * tensor + 1, start * length, G, ALIGNED)
    left = tl.minimum(units - start, UNITS).to(tl.int32)
    if BLOCK == 1:
        _clip_single_elements(weight, grad, left, clip_factor, eps, G, UNITS, ALIGNED)
    elif NORM == "p":  # in float32 an exponential loses digits in proportion to its argument
        _clip_units_in_float64(weight, grad, length, left, clip_factor, eps, p, BLOCK, G, UNITS, NORM)
    elif ACC == tl.float64:
        _clip_units(weight, grad, length, left, clip_factor, eps, BLOCK, G, UNITS, ACC, ALIGNED, NORM)
    else:  # squares above 3.4e38 or factors below 1.2e-38: once more in float64, which holds them
        if not _clip_units(weight, grad, length, left, clip_factor, eps, BLOCK, G, UNITS, ACC, ALIGNED, NORM):
            _clip_units_in_float64(weight, grad, length, left, clip_factor, eps, p, BLOCK, G, UNITS, NORM)


@triton.jit
def clip_kernel(
    pointers,
    rows,
    owners,
    clip_factor: tl.float64,
    eps: tl.float64,
    p: tl.float64,
    VARIANTS: tl.constexpr,
    NORM: tl.constexpr,
):
    """A program clips a tile of units of one tensor: one read of weight and gradient, a write where clipped."""
    tensor, row, variant, first = row_of_program(rows, owners, _COLUMNS)
    length, units = tl.load(row + LENGTH), tl.load(row + COUNT)
    for i in tl.static_range(len(VARIANTS)):
        if variant == i:
            _clip_tile(
                pointers, tensor, length, units, first, clip_factor, eps, p,
                VARIANTS[i][0], VARIANTS[i][1], VARIANTS[i][2], VARIANTS[i][3], VARIANTS[i][4], NORM,
            )  # fmt: skip


@triton.jit
def _part_of_program(rows, owners):
    """Tensor, variant, unit and part that a program works on, elements of a unit, parts, and tiles of a part."""
    tensor, row, variant, i = row_of_program(rows, owners, _LONG_COLUMNS)
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
def sum_parts_kernel(pointers, rows, owners, sums, p: tl.float64, VARIANTS: tl.constexpr, NORM: tl.constexpr):
    """Units that no tile holds, first launch: sums[program] = what a part adds to the norms of weight and gradient."""
    program = tl.program_id(0)
    tensor, variant, unit, part, length, _, tiles = _part_of_program(rows, owners)
    p = scalar(p, tl.float64)
    for i in tl.static_range(len(VARIANTS)):
        if variant == i:
            weight = pointer(pointers, 2 * tensor, unit * length, VARIANTS[i][1], False)
            grad = pointer(pointers, 2 * tensor + 1, unit * length, VARIANTS[i][2], False)
            start = part * tiles * TILE
            tl.store(sums + 2 * program, _sum_part(weight, start, length, tiles, p, NORM))
            tl.store(sums + 2 * program + 1, _sum_part(grad, start, length, tiles, p, NORM))


@triton.jit
def clip_parts_kernel(
    pointers, rows, owners, sums, clip_factor: tl.float64, eps: tl.float64, p: tl.float64,
    VARIANTS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Second launch: adds up the parts of a unit, in the same order in each of its programs, and scales one part."""
    program = tl.program_id(0)
    tensor, variant, unit, part, length, parts, tiles = _part_of_program(rows, owners)
    others = tl.arange(0, _MOST_PARTS)
    of_unit = sums + 2 * (program - part + others)
    p = scalar(p, tl.float64)
    weight_sum = combine(tl.load(of_unit, mask=others < parts, other=0.0), NORM, 0)
    grad_sum = combine(tl.load(of_unit + 1, mask=others < parts, other=0.0), NORM, 0)
    clipped, factor, _ = decide(
        root(weight_sum, p, NORM, tl.float64),
        root(grad_sum, p, NORM, tl.float64),
        clip_factor,
        eps,
        tl.float64,
    )
    for i in tl.static_range(len(VARIANTS)):
        if clipped & (variant == i):
            grad = pointer(pointers, 2 * tensor + 1, unit * length, VARIANTS[i][2], False)
            for j in range(tiles * (TILE // STEP)):
                at = part * tiles * TILE + j * STEP + tl.arange(0, STEP)
                g = tl.load(grad + at, mask=at < length, other=0.0)
                store_scaled(grad + at, g, factor, at < length, tl.float64, VARIANTS[i][2])


class Structure(NamedTuple):
    """All that a plan depends on: what stays from step to step."""

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    weight_dtypes: tuple[torch.dtype, ...]
    grad_dtypes: tuple[torch.dtype, ...]
    misaligned: tuple[int, ...]
    """the tensors whose weight or gradient does not start at a multiple of 16 bytes"""


class _Share(NamedTuple):
    """The tensors that one path clips: those whose units a tile holds, or the others."""

    members: list[int]
    table: Table

    def launch(self, kernel: Any, weights: Sequence[int], grads: Sequence[int], **arguments: Any) -> None:
        """Runs a kernel on the members of tensors at these addresses."""
        self.table.launch(kernel, [x for i in self.members for x in (weights[i], grads[i])], **arguments)


class Plan:
    """Which program clips what."""

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

    def clip_(self, weights: Sequence[int], grads: Sequence[int], **options: Any) -> None:
        """Clips the gradients at these addresses; options: clip_factor, eps, p and NORM of the kernels."""
        if self.short:
            self.short.launch(clip_kernel, weights, grads, **options)
        if self.long:
            of_sum = {"p": options["p"], "NORM": options["NORM"]}
            self.long.launch(sum_parts_kernel, weights, grads, sums=self.sums, **of_sum)
            self.long.launch(clip_parts_kernel, weights, grads, sums=self.sums, **options)


def _short_row(count: int, length: int, variant: Variant) -> tuple[list[int], int]:
    """Own columns of a tensor's row, and its programs."""
    return [], triton.cdiv(count, variant.units)


def _long_row(count: int, length: int, variant: Variant) -> tuple[list[int], int]:
    tiles = triton.cdiv(length, TILE.value * _MOST_PARTS.value)
    parts = triton.cdiv(length, TILE.value * tiles)
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
    return _Share(members, Table([of_tensor[i] for i in members], rows, programs, 2, device))


def agc(
    weights: Sequence[int],
    grads: Sequence[int],
    counts: Sequence[int],
    lengths: Sequence[int],
    weight_dtypes: Sequence[torch.dtype],
    grad_dtypes: Sequence[torch.dtype],
    device: torch.device,
    clip_factor: float,
    eps: float,
    norm_type: float,
) -> None:
    """Clips the gradients at these addresses of a device, each of `counts` units of `lengths` dense elements."""
    misaligned = tuple(i for i, pair in enumerate(zip(weights, grads, strict=True)) if not is_aligned(*pair))
    structure = Structure(tuple(counts), tuple(lengths), tuple(weight_dtypes), tuple(grad_dtypes), misaligned)
    norm = {2.0: "2", 1.0: "1", math.inf: "inf"}.get(norm_type, "p")
    p = norm_type if norm == "p" else 0.0
    table_for(Plan, structure, device).clip_(weights, grads, clip_factor=clip_factor, eps=eps, p=p, NORM=norm)
