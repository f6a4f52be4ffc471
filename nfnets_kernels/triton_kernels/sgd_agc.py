"""A step of stochastic gradient descent with adaptive gradient clipping: one launch for each parameter group.

Clip, decay, momentum, update and average of a unit in one pass; csrc/kernels/sgd_agc.h is the same for one unit.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..reference.sgd_agc import Hyperparameters
from .launch import narrowed, scalar, widened
from .norms import count, decide, norm, norms_in_float64, statistics_of
from .plan import Plan, Structure, misaligned, norms_of_parts, part_of_program, tile_of_program
from .table import STEP, TILE, elements_of_tile, pointer, table_for

# Weight, gradient, momentum, average, statistics.
_POINTERS = tl.constexpr(5)
# Gradients near float32's end have factors below its beginning: these are taken in two.
_TINY, _SMALL, _LARGE = tl.constexpr(1e-30), tl.constexpr(2.0**-100), tl.constexpr(2.0**100)
# A tile's weights and gradients wait in registers while its momenta and averages arrive: 16 of each in a thread.
_WARPS = 8
# Arguments that are addresses: what they are multiples of is no reason to compile once more.
_ADDRESSES = ("lr_factor", "grad_scale", "found_inf")


class _Step(NamedTuple):
    """What a step does to all elements of a group, in float64."""

    lr: Any
    grad_factor: Any
    """1 / loss scale, negative where the objective is maximized"""
    momentum: Any
    share: Any
    """of the new direction in the momentum"""
    weight_decay: Any
    average_share: Any
    """of the new weight in the average"""
    clip_factor: Any
    eps: Any


class _Kind(NamedTuple):
    """What a launch is compiled for."""

    nesterov: bool
    has_momentum: bool
    has_average: bool
    clips: bool
    counted: bool


class _Tensors(NamedTuple):
    """Pointers to a tensor's elements, from one of them on; those that are not there point nowhere."""

    weight: Any
    grad: Any
    momentum: Any
    average: Any


@triton.jit
def _scalar_at(address, default):
    """The float32 at an address, in float64; the default where the address is 0."""
    address = scalar(address, tl.int64)
    value = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=default)
    return value.to(tl.float64)


@triton.jit
def _tensors(pointers, tensor, start, W: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr):
    AVERAGED: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    first = _POINTERS * tensor
    return _Tensors(
        pointer(pointers, first, start, W, ALIGNED),
        pointer(pointers, first + 1, start, G, ALIGNED),
        pointer(pointers, first + 2, start, W, ALIGNED),
        pointer(pointers, first + 3, start, AVERAGED, ALIGNED),
    )


@triton.jit
def _descend(tensors, at, mask, w, g, factor, step, KIND: tl.constexpr, ACC: tl.constexpr):
    """Updates the elements `at`, whose weights w and gradients g have been read; factor: of the gradients, float64."""
    tiny = tl.abs(factor) < _TINY
    scale, factor = tl.where(tiny, _SMALL, 1.0).to(ACC), (factor * tl.where(tiny, _LARGE, 1.0)).to(ACC)
    wide = widened(w, ACC)
    direction = widened(g, ACC) * scale * factor + scalar(step.weight_decay, ACC) * wide
    if KIND.has_momentum:
        coefficient = scalar(step.momentum, ACC)
        before = widened(tl.load(tensors.momentum + at, mask=mask, other=0.0), ACC)
        after = coefficient * before + scalar(step.share, ACC) * direction
        tl.store(tensors.momentum + at, narrowed(after, w.dtype), mask=mask)
        direction = direction + coefficient * after if KIND.nesterov else after
    stored = narrowed(wide - scalar(step.lr, ACC) * direction, w.dtype)
    tl.store(tensors.weight + at, stored, mask=mask)
    if KIND.has_average:
        average = tl.load(tensors.average + at, mask=mask, other=0.0)
        moved = scalar(step.average_share, average.dtype) * (widened(stored, average.dtype) - average)
        tl.store(tensors.average + at, average + moved, mask=mask)


@triton.jit
def _decide(weight_norm, grad_norm, step, ACC: tl.constexpr):
    """Whether units are clipped, what their gradients are multiplied by, and the ratios of the norms, both in float64.

    grad_norm: of the gradients as they are stored. The last result: whether ACC held everything on the way.
    """
    scaled_norm = scalar(tl.abs(step.grad_factor), ACC) * grad_norm
    clipped, factor, ratio, held = decide(weight_norm, scaled_norm, step.clip_factor, step.eps, ACC)
    factor = step.grad_factor * tl.where(clipped, factor, 1.0).to(tl.float64)
    return clipped, factor, ratio.to(tl.float64), held


@triton.jit
def _step_units(
    tensors, statistics, length, units, step,
    BLOCK: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Up to UNITS units that lie one behind the other; they stay in registers between norm and update."""
    weight, grad = tensors.weight, tensors.grad
    at, mask, tail_at, tail_mask = elements_of_tile(length, units, BLOCK, UNITS, ALIGNED)
    w, w_tail = tl.load(weight + at, mask=mask, other=0.0), tl.load(weight + tail_at, mask=tail_mask, other=0.0)
    g, g_tail = tl.load(grad + at, mask=mask, other=0.0), tl.load(grad + tail_at, mask=tail_mask, other=0.0)
    clipped, factor, ratio, held = _decide(norm(w, w_tail, "2", ACC), norm(g, g_tail, "2", ACC), step, ACC)
    if ACC == tl.float32:  # noqa: SIM102, for the first one is the compiler's
        if tl.min(held.to(tl.int32), axis=0) == 0:
            weight_norm, grad_norm = norms_in_float64(weight, grad, length, units, 2.0, BLOCK, UNITS, "2")
            clipped, factor, ratio, _ = _decide(weight_norm, grad_norm, step, tl.float64)
    if statistics is not None:
        unit = tl.arange(0, UNITS)
        count(statistics, unit, clipped, ratio, unit < units)
    factor = factor[:, None]
    _descend(tensors, at, mask, w, g, factor, step, KIND, ACC)
    _descend(tensors, tail_at, tail_mask, w_tail, g_tail, factor, step, KIND, ACC)


@triton.jit
def _step_single_elements(
    tensors, statistics, units, step,
    UNITS: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Units of one element, or the elements of tensors that are not clipped: one per lane."""
    units = tl.multiple_of(units, ALIGNED) if ALIGNED else units
    at = tl.arange(0, UNITS)
    mask = at < units
    w, g = tl.load(tensors.weight + at, mask=mask, other=0.0), tl.load(tensors.grad + at, mask=mask, other=0.0)
    factor = step.grad_factor
    if KIND.clips:
        weight_norm, grad_norm = tl.abs(widened(w, tl.float64)), tl.abs(widened(g, tl.float64))
        clipped, factor, ratio, _ = _decide(weight_norm, grad_norm, step, tl.float64)
        if statistics is not None:
            count(statistics, at, clipped, ratio, mask)
    _descend(tensors, at, mask, w, g, factor, step, KIND, ACC)


@triton.jit
def _step_tile(
    pointers, tensor, length, units, tile, step,
    BLOCK: tl.constexpr, W: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, UNITS: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if W == tl.float64 or G == tl.float64 else tl.float32
    start = tile * UNITS
    left = tl.minimum(units - start, UNITS).to(tl.int32)
    tensors = _tensors(pointers, tensor, start * length, W, G, ALIGNED)
    statistics = statistics_of(pointers, _POINTERS * tensor + 4, start) if KIND.counted else None
    if BLOCK == 1:
        _step_single_elements(tensors, statistics, left, step, UNITS, ACC, ALIGNED, KIND)
    else:
        _step_units(tensors, statistics, length, left, step, BLOCK, UNITS, ACC, ALIGNED, KIND)


@triton.jit
def _step_part(
    pointers, tensor, unit, length, first, tiles, factor, step,
    W: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Updates the elements of a unit from `first` on, STEP at a time."""
    ACC: tl.constexpr = tl.float64 if W == tl.float64 or G == tl.float64 else tl.float32
    tensors = _tensors(pointers, tensor, unit * length, W, G, False)
    for i in range(tiles * (TILE // STEP)):
        at = first + i * STEP + tl.arange(0, STEP)
        mask = at < length
        w, g = tl.load(tensors.weight + at, mask=mask, other=0.0), tl.load(tensors.grad + at, mask=mask, other=0.0)
        _descend(tensors, at, mask, w, g, factor, step, KIND, ACC)


@triton.jit(do_not_specialize=_ADDRESSES)
def step_kernel(
    pointers, rows, owners, lr: tl.float64, lr_factor: tl.int64, grad_sign: tl.float64, grad_scale: tl.int64,
    found_inf: tl.int64, momentum: tl.float64, share: tl.float64, weight_decay: tl.float64, average_share: tl.float64,
    clip_factor: tl.float64, eps: tl.float64,
    VARIANTS: tl.constexpr, POINTERS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A program updates a tile of units of one tensor: one read and one write of all that a step changes."""
    tensor, variant, tile, length, units = tile_of_program(rows, owners)
    if _scalar_at(found_inf, 0.0) == 0:
        lr, grad_factor = lr * _scalar_at(lr_factor, 1.0), grad_sign / _scalar_at(grad_scale, 1.0)
        step = _Step(lr, grad_factor, momentum, share, weight_decay, average_share, clip_factor, eps)
        for i in tl.static_range(len(VARIANTS)):
            if variant == i:
                _step_tile(
                    pointers, tensor, length, units, tile, step,
                    VARIANTS[i][0], VARIANTS[i][1], VARIANTS[i][2], VARIANTS[i][3], VARIANTS[i][4], KIND,
                )  # fmt: skip


@triton.jit(do_not_specialize=_ADDRESSES)
def step_parts_kernel(
    pointers, rows, owners, sums, lr: tl.float64, lr_factor: tl.int64, grad_sign: tl.float64, grad_scale: tl.int64,
    found_inf: tl.int64, momentum: tl.float64, share: tl.float64, weight_decay: tl.float64, average_share: tl.float64,
    clip_factor: tl.float64, eps: tl.float64,
    VARIANTS: tl.constexpr, POINTERS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A program updates a part of a long unit; the unit's first one counts."""
    tensor, variant, unit, part, length, parts, tiles = part_of_program(rows, owners)
    if _scalar_at(found_inf, 0.0) == 0:
        lr, grad_factor = lr * _scalar_at(lr_factor, 1.0), grad_sign / _scalar_at(grad_scale, 1.0)
        step = _Step(lr, grad_factor, momentum, share, weight_decay, average_share, clip_factor, eps)
        weight_norm, grad_norm = norms_of_parts(sums, part, parts, 2.0, "2")
        clipped, factor, ratio, _ = _decide(weight_norm, grad_norm, step, tl.float64)
        if KIND.counted:
            count(statistics_of(pointers, _POINTERS * tensor + 4, unit), 0, clipped, ratio, part == 0)
        for i in tl.static_range(len(VARIANTS)):
            if variant == i:
                first = part * tiles * TILE
                _step_part(
                    pointers, tensor, unit, length, first, tiles, factor, step, VARIANTS[i][1], VARIANTS[i][2], KIND
                )


def _subset(column: Sequence[Any], members: Sequence[int]) -> tuple[Any, ...]:
    return tuple(column[i] for i in members)


def sgd_agc(
    weights: Sequence[int],
    grads: Sequence[int],
    momenta: Sequence[int],
    averages: Sequence[int],
    statistics: Sequence[int],
    counts: Sequence[int],
    lengths: Sequence[int],
    weight_dtypes: Sequence[torch.dtype],
    grad_dtypes: Sequence[torch.dtype],
    groups: Sequence[int],
    device: torch.device,
    configs: Sequence[Hyperparameters],
    lrs: Sequence[int],
    grad_scale: int,
    found_inf: int,
) -> None:
    """Steps the weights at these addresses of a device, each of `counts` units of `lengths` dense elements.

    Args:
        weights, grads, momenta, averages: addresses; momenta have the weights' dtypes, averages float32 or, of float64
            weights, float64; 0 for none.
        statistics: as of `agc`, counted for the units of groups that are clipped.
        groups: index into `configs` and `lrs` of each tensor.
        configs: of each group.
        lrs: address of a float32 scalar on the device that multiplies the lr, of each group; 0: none.
        grad_scale, found_inf: addresses of float32 scalars on the device; 0: none. Gradients are divided by the first;
            nothing is written where the second is not 0.
    """
    launches: dict[tuple[int, bool, bool], list[int]] = {}
    for i, key in enumerate(zip(groups, map(bool, momenta), map(bool, averages), strict=True)):
        launches.setdefault(key, []).append(i)
    for key, members in launches.items():
        group, has_momentum, has_average = key
        config = configs[group]
        clips = config.clip_factor is not None
        addresses = [_subset(column, members) for column in (weights, grads, momenta, averages, statistics)]
        units = _subset(counts, members), _subset(lengths, members)
        if not clips:  # every element is a unit
            units = tuple(map(operator.mul, *units)), (1,) * len(members)
        dtypes = _subset(weight_dtypes, members), _subset(grad_dtypes, members)
        structure = Structure(*units, *dtypes, misaligned(*addresses[:4]), _POINTERS.value, key)
        table_for(Plan, structure, device).launch(
            step_kernel,
            step_parts_kernel,
            addresses,
            {"p": 0.0, "NORM": "2"},
            lr=config.lr,
            lr_factor=lrs[group],
            grad_sign=-1.0 if config.maximize else 1.0,
            grad_scale=grad_scale,
            found_inf=found_inf,
            momentum=config.momentum,
            share=1.0 - config.dampening,
            weight_decay=config.weight_decay,
            average_share=1.0 - config.average_decay,
            clip_factor=config.clip_factor or 0.0,
            eps=config.eps,
            KIND=_Kind(config.nesterov, has_momentum, has_average, clips, clips and any(addresses[4])),
            num_warps=_WARPS,
        )
