"""Adaptive gradient clipping of all parameters of a device in one launch (Brock et al. 2021, equation 3)."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import scalar, widened
from .norms import count, decide, norm, norms_in_float64, statistics_of, store_scaled
from .plan import Plan, Structure, misaligned, norms_of_parts, part_of_program, tile_of_program
from .table import STEP, TILE, elements_of_tile, pointer, table_for


@triton.jit
def _clip_units(
    weight, grad, statistics, length, units, clip_factor, eps,
    BLOCK: tl.constexpr, G: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Clips up to UNITS units that lie one behind the other; they stay in registers between norm and scaling.

    Returns whether ACC held everything on the way; where it did not, nothing was written.
    """
    at, mask, tail_at, tail_mask = elements_of_tile(length, units, BLOCK, UNITS, ALIGNED)
    w, w_tail = tl.load(weight + at, mask=mask, other=0.0), tl.load(weight + tail_at, mask=tail_mask, other=0.0)
    g, g_tail = tl.load(grad + at, mask=mask, other=0.0), tl.load(grad + tail_at, mask=tail_mask, other=0.0)
    weight_norm, grad_norm = norm(w, w_tail, NORM, ACC), norm(g, g_tail, NORM, ACC)
    clipped, factor, ratio, held = decide(weight_norm, grad_norm, clip_factor, eps, ACC)
    exact = tl.min(held.to(tl.int32), axis=0)
    all_exact = tl.full((UNITS,), exact, tl.int32) == 1
    if statistics is not None:
        unit = tl.arange(0, UNITS)
        count(statistics, unit, clipped, ratio, (unit < units) & all_exact)
    clipped, factor = (clipped & all_exact)[:, None], factor[:, None]
    store_scaled(grad + at, g, factor, mask & clipped, ACC, G)
    store_scaled(grad + tail_at, g_tail, factor, tail_mask & clipped, ACC, G)
    return exact == 1


@triton.jit
def _clip_units_in_float64(
    weight, grad, statistics, length, units, clip_factor, eps, p,
    BLOCK: tl.constexpr, G: tl.constexpr, UNITS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """`_clip_units` for what float32 does not hold, and any p: reads twice, an eighth of a block at a time."""
    p = scalar(p, tl.float64)
    weight_norm, grad_norm = norms_in_float64(weight, grad, length, units, p, BLOCK, UNITS, NORM)
    clipped, factor, ratio, _ = decide(weight_norm, grad_norm, clip_factor, eps, tl.float64)
    if statistics is not None:
        unit = tl.arange(0, UNITS)
        count(statistics, unit, clipped, ratio, unit < units)
    rows, columns = tl.arange(0, UNITS)[:, None], tl.arange(0, BLOCK // 8)[None, :]
    for i in range(9):
        at = i * (BLOCK // 8) + columns
        mask = (rows < units) & (at < length) & clipped[:, None]
        target = grad + rows * length + at
        store_scaled(target, tl.load(target, mask=mask, other=0.0), factor[:, None], mask, tl.float64, G)


@triton.jit
def _clip_single_elements(
    weight, grad, statistics, units, clip_factor, eps, G: tl.constexpr, UNITS: tl.constexpr, ALIGNED: tl.constexpr
):
    """Units of one element, whose norm of any p is the absolute value: one unit per lane."""
    units = tl.multiple_of(units, ALIGNED) if ALIGNED else units
    at = tl.arange(0, UNITS)
    mask = at < units
    w, g = tl.load(weight + at, mask=mask, other=0.0), tl.load(grad + at, mask=mask, other=0.0)
    # float64 costs nothing here: the elements of all gains together are some thousandths of a model
    clipped, factor, ratio, _ = decide(
        tl.abs(widened(w, tl.float64)),
        tl.abs(widened(g, tl.float64)),
        clip_factor,
        eps,
        tl.float64,
    )
    if statistics is not None:
        count(statistics, at, clipped, ratio, mask)
    store_scaled(grad + at, g, factor, mask & clipped, tl.float64, G)


@triton.jit
def _clip_tile(
    pointers, tensor, length, units, tile, clip_factor, eps, p,
    BLOCK: tl.constexpr, W: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, UNITS: tl.constexpr,
    NORM: tl.constexpr, POINTERS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if W == tl.float64 or G == tl.float64 else tl.float32
    start = tile * UNITS
    weight = pointer(pointers, POINTERS * tensor, start * length, W, ALIGNED)
    grad = pointer(pointers, POINTERS * tensor + 1, start * length, G, ALIGNED)
    statistics = statistics_of(pointers, POINTERS * tensor + 2, start) if POINTERS == 3 else None
    left = tl.minimum(units - start, UNITS).to(tl.int32)
    if BLOCK == 1:
        _clip_single_elements(weight, grad, statistics, left, clip_factor, eps, G, UNITS, ALIGNED)
    elif NORM == "p":  # in float32 an exponential loses digits in proportion to its argument
        _clip_units_in_float64(weight, grad, statistics, length, left, clip_factor, eps, p, BLOCK, G, UNITS, NORM)
    elif ACC == tl.float64:
        _clip_units(weight, grad, statistics, length, left, clip_factor, eps, BLOCK, G, UNITS, ACC, ALIGNED, NORM)
    else:  # squares above 3.4e38 or factors below 1.2e-38: once more in float64, which holds them
        if not _clip_units(
            weight, grad, statistics, length, left, clip_factor, eps, BLOCK, G, UNITS, ACC, ALIGNED, NORM
        ):
            _clip_units_in_float64(weight, grad, statistics, length, left, clip_factor, eps, p, BLOCK, G, UNITS, NORM)


@triton.jit
def clip_kernel(
    pointers, rows, owners, clip_factor: tl.float64, eps: tl.float64, p: tl.float64,
    VARIANTS: tl.constexpr, NORM: tl.constexpr, POINTERS: tl.constexpr,
):  # fmt: skip
    """A program clips a tile of units of one tensor: one read of weight and gradient, a write where clipped."""
    tensor, variant, tile, length, units = tile_of_program(rows, owners)
    for i in tl.static_range(len(VARIANTS)):
        if variant == i:
            _clip_tile(
                pointers, tensor, length, units, tile, clip_factor, eps, p,
                VARIANTS[i][0], VARIANTS[i][1], VARIANTS[i][2], VARIANTS[i][3], VARIANTS[i][4], NORM, POINTERS,
            )  # fmt: skip


@triton.jit
def clip_parts_kernel(
    pointers, rows, owners, sums, clip_factor: tl.float64, eps: tl.float64, p: tl.float64,
    VARIANTS: tl.constexpr, NORM: tl.constexpr, POINTERS: tl.constexpr,
):  # fmt: skip
    """A program scales a part of a long unit; the unit's first one counts."""
    tensor, variant, unit, part, length, parts, tiles = part_of_program(rows, owners)
    weight_norm, grad_norm = norms_of_parts(sums, part, parts, scalar(p, tl.float64), NORM)
    clipped, factor, ratio, _ = decide(weight_norm, grad_norm, clip_factor, eps, tl.float64)
    if POINTERS == 3:
        count(statistics_of(pointers, POINTERS * tensor + 2, unit), 0, clipped, ratio, part == 0)
    for i in tl.static_range(len(VARIANTS)):
        if clipped & (variant == i):
            grad = pointer(pointers, POINTERS * tensor + 1, unit * length, VARIANTS[i][2], False)
            for j in range(tiles * (TILE // STEP)):
                at = part * tiles * TILE + j * STEP + tl.arange(0, STEP)
                g = tl.load(grad + at, mask=at < length, other=0.0)
                store_scaled(grad + at, g, factor, at < length, tl.float64, VARIANTS[i][2])


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
    statistics: Sequence[int] = (),
) -> None:
    """Clips the gradients at these addresses of a device, each of `counts` units of `lengths` dense elements.

    Args:
        statistics: addresses of float32 triples per unit, contiguous (units, 3): steps, clipped steps, and the largest
            ratio of gradient norm to parameter norm; 0 for a tensor without, empty where nothing is counted.
    """
    addresses = (weights, grads, statistics) if any(statistics) else (weights, grads)
    of_tensors = (tuple(counts), tuple(lengths), tuple(weight_dtypes), tuple(grad_dtypes))
    structure = Structure(*of_tensors, misaligned(weights, grads), len(addresses))
    norm = {2.0: "2", 1.0: "1", math.inf: "inf"}.get(norm_type, "p")
    of_norm = {"p": norm_type if norm == "p" else 0.0, "NORM": norm}
    plan = table_for(Plan, structure, device)
    plan.launch(clip_kernel, clip_parts_kernel, addresses, of_norm, clip_factor=clip_factor, eps=eps, **of_norm)
