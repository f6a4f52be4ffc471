"""Scaled weight standardization of all weights of a model in one launch, and its gradient in another.

Per unit of N weights `out = scale * gain * (w - mean) * r` (Brock et al. 2021a, equation 1), in the output's dtype and
memory order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from .launch import at_least, ceil_div, narrowed, quotient, scalar, square_root, widened
from .table import (
    COUNT,
    LENGTH,
    STEP,
    Table,
    columns_of_tile,
    pointer,
    row_of_program,
    table_for,
    variant_of,
)

# Own columns: the bits of the scale as a float64, and the innermost dim of the weight in memory.
_SCALE, _INNER = tl.constexpr(4), tl.constexpr(5)
_COLUMNS = tl.constexpr(6)
# The pointers of a tensor: weight, gain, output or its gradient, and where the gradients of weight and gain go.
_POINTERS = tl.constexpr(5)


@triton.jit
def _inverse(squared, n, eps, ADD: tl.constexpr, ACC: tl.constexpr):
    """r of both forms of eps, and whether it depends on the weights."""
    if ADD:
        denominator = squared + n.to(ACC) * eps
        varies = squared == squared
    else:
        denominator = at_least(squared, eps)
        varies = (squared < eps) == 0
    return quotient(scalar(1.0, ACC), square_root(denominator, ACC), ACC), varies


@triton.jit
def _permuted(at, n, inner, PERMUTED: tl.constexpr):
    """Where the element at `at` of a unit lies in the other tensor; `inner` is the innermost dim of this one."""
    return at % inner * (n // inner) + at // inner if PERMUTED else at


@triton.jit
def _sum(block, tail):
    return tl.sum(block, axis=1) + tl.sum(tail, axis=1)


@triton.jit
def _centered(x, mean, mask):
    return tl.where(mask, x - mean[:, None], 0.0)


@triton.jit
def _gains(gain, rows, mask, W: tl.constexpr, ACC: tl.constexpr, HAS_GAIN: tl.constexpr):
    if HAS_GAIN:
        return widened(tl.load(gain + rows, mask=mask, other=0.0), ACC)
    else:
        return tl.full(rows.shape, 1.0, ACC)


@triton.jit
def _standardize_units(
    weight, gain, out, length, units, inner, scale, eps,
    BLOCK: tl.constexpr, W: tl.constexpr, OUT: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, PERMUTED: tl.constexpr, ADD: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """Up to UNITS units that lie one behind the other, in registers from the read to the write.

    In the output's order: the write is dense, and a permuted read finds what its neighbours fetched in the first cache.
    """
    n, columns, tail_columns = columns_of_tile(length, BLOCK, ALIGNED)
    units_at = tl.arange(0, UNITS)
    rows, there = units_at[:, None], units_at[:, None] < units
    mask, tail_mask = there & (columns < n), there & (tail_columns < n)
    outer = n // inner
    at = rows * n + _permuted(columns, n, outer, PERMUTED)
    tail_at = rows * n + _permuted(tail_columns, n, outer, PERMUTED)
    w = widened(tl.load(weight + at, mask=mask, other=0.0), ACC)
    w_tail = widened(tl.load(weight + tail_at, mask=tail_mask, other=0.0), ACC)

    mean = _sum(w, w_tail) / n
    w, w_tail = _centered(w, mean, mask), _centered(w_tail, mean, tail_mask)
    r, _ = _inverse(_sum(w * w, w_tail * w_tail), n, eps, ADD, ACC)
    factor = (scale * _gains(gain, units_at, units_at < units, W, ACC, HAS_GAIN) * r)[:, None]
    tl.store(out + rows * n + columns, narrowed(w * factor, OUT), mask=mask)
    tl.store(out + rows * n + tail_columns, narrowed(w_tail * factor, OUT), mask=tail_mask)


@triton.jit
def _standardize_units_backward(
    weight, gain, grad_out, grad_weight, grad_gain, length, units, inner, scale, eps,
    BLOCK: tl.constexpr, W: tl.constexpr, OUT: tl.constexpr, UNITS: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, PERMUTED: tl.constexpr, ADD: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """`_standardize_units` backward, in the weight's order."""
    n, columns, tail_columns = columns_of_tile(length, BLOCK, ALIGNED)
    units_at = tl.arange(0, UNITS)
    rows, there = units_at[:, None], units_at[:, None] < units
    mask, tail_mask = there & (columns < n), there & (tail_columns < n)
    at, tail_at = rows * n + columns, rows * n + tail_columns
    g_at = rows * n + _permuted(columns, n, inner, PERMUTED)
    g_tail_at = rows * n + _permuted(tail_columns, n, inner, PERMUTED)
    w = widened(tl.load(weight + at, mask=mask, other=0.0), ACC)
    w_tail = widened(tl.load(weight + tail_at, mask=tail_mask, other=0.0), ACC)
    g = widened(tl.load(grad_out + g_at, mask=mask, other=0.0), ACC)
    g_tail = widened(tl.load(grad_out + g_tail_at, mask=tail_mask, other=0.0), ACC)

    mean, grad_mean = _sum(w, w_tail) / n, (_sum(g, g_tail) / n)[:, None]
    w, w_tail = _centered(w, mean, mask), _centered(w_tail, mean, tail_mask)
    r, varies = _inverse(_sum(w * w, w_tail * w_tail), n, eps, ADD, ACC)
    projection = _sum(g * w, g_tail * w_tail)
    if HAS_GAIN:
        tl.store(grad_gain + units_at, narrowed(scale * r * projection, W), mask=units_at < units)
    factor = (scale * _gains(gain, units_at, units_at < units, W, ACC, HAS_GAIN) * r)[:, None]
    shrink = tl.where(varies, r * r * projection, 0.0)[:, None]  # d r / d w = -r^3 (w - mean)
    tl.store(grad_weight + at, narrowed((g - grad_mean - w * shrink) * factor, W), mask=mask)
    tl.store(grad_weight + tail_at, narrowed((g_tail - grad_mean - w_tail * shrink) * factor, W), mask=tail_mask)


@triton.jit
def _part(x, i, n, ACC: tl.constexpr):
    at = i * STEP + tl.arange(0, STEP)
    return widened(tl.load(x + at, mask=at < n, other=0.0), ACC), at, at < n


@triton.jit
def _statistics(weight, n, eps, ADD: tl.constexpr, ACC: tl.constexpr):
    """Mean, r, and whether it depends on the weights, of a unit longer than a tile."""
    total = tl.zeros((STEP,), ACC)
    for i in range(tl.cdiv(n, STEP)):
        w, _, _ = _part(weight, i, n, ACC)
        total += w
    mean = tl.sum(total, axis=0) / n
    squared = tl.zeros((STEP,), ACC)
    for i in range(tl.cdiv(n, STEP)):
        w, _, mask = _part(weight, i, n, ACC)
        deviation = tl.where(mask, w - mean, 0.0)
        squared += deviation * deviation
    r, varies = _inverse(tl.sum(squared, axis=0), n, eps, ADD, ACC)
    return mean, r, varies


@triton.jit
def _standardize_long_unit(
    weight, gain, out, n, inner, scale, eps,
    OUT: tl.constexpr, ACC: tl.constexpr, PERMUTED: tl.constexpr, ADD: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    mean, r, _ = _statistics(weight, n, eps, ADD, ACC)
    factor = scale * r
    if HAS_GAIN:
        factor *= widened(tl.load(gain), ACC)
    for i in range(tl.cdiv(n, STEP)):
        w, at, mask = _part(weight, i, n, ACC)
        tl.store(out + _permuted(at, n, inner, PERMUTED), narrowed((w - mean) * factor, OUT), mask=mask)


@triton.jit
def _standardize_long_unit_backward(
    weight, gain, grad_out, grad_weight, grad_gain, n, inner, scale, eps,
    W: tl.constexpr, ACC: tl.constexpr, PERMUTED: tl.constexpr, ADD: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    mean, r, varies = _statistics(weight, n, eps, ADD, ACC)
    grads = tl.zeros((STEP,), ACC)
    products = tl.zeros((STEP,), ACC)
    for i in range(tl.cdiv(n, STEP)):
        w, at, mask = _part(weight, i, n, ACC)
        g = widened(tl.load(grad_out + _permuted(at, n, inner, PERMUTED), mask=mask, other=0.0), ACC)
        grads += g
        products += g * tl.where(mask, w - mean, 0.0)
    grad_mean, projection = tl.sum(grads, axis=0) / n, tl.sum(products, axis=0)
    factor = scale * r
    if HAS_GAIN:
        tl.store(grad_gain, narrowed(factor * projection, W))
        factor *= widened(tl.load(gain), ACC)
    shrink = tl.where(varies, r * r * projection, 0.0)
    for i in range(tl.cdiv(n, STEP)):
        w, at, mask = _part(weight, i, n, ACC)
        g = widened(tl.load(grad_out + _permuted(at, n, inner, PERMUTED), mask=mask, other=0.0), ACC)
        tl.store(grad_weight + at, narrowed((g - grad_mean - (w - mean) * shrink) * factor, W), mask=mask)


@triton.jit
def _tile(
    pointers, row, first, tensor, eps,
    BLOCK: tl.constexpr, W: tl.constexpr, OUT: tl.constexpr, ALIGNED: tl.constexpr, UNITS: tl.constexpr,
    PERMUTED: tl.constexpr, ADD: tl.constexpr, HAS_GAIN: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """What one program does for a tensor of this variant."""
    ACC: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    length, units = tl.load(row + LENGTH), tl.load(row + COUNT)
    inner = tl.load(row + _INNER).to(tl.int32)
    scale = tl.load(row + _SCALE).to(tl.float64, bitcast=True).to(ACC)
    eps = scalar(eps, ACC)
    start = first * UNITS
    at = start * length
    left = tl.minimum(units - start, UNITS).to(tl.int32)
    of_tensor = pointers + tensor * _POINTERS
    weight = pointer(of_tensor, 0, at, W, ALIGNED)
    other = pointer(of_tensor, 2, at, OUT, ALIGNED)
    gain = pointer(of_tensor, 1, start, W, False)
    if BACKWARD:
        grad_weight = pointer(of_tensor, 3, at, W, ALIGNED)
        grad_gain = pointer(of_tensor, 4, start, W, False)
        if BLOCK > 0:
            _standardize_units_backward(
                weight, gain, other, grad_weight, grad_gain, length, left, inner, scale, eps,
                BLOCK, W, OUT, UNITS, ACC, ALIGNED, PERMUTED, ADD, HAS_GAIN,
            )  # fmt: skip
        else:
            _standardize_long_unit_backward(
                weight, gain, other, grad_weight, grad_gain, length, inner, scale, eps,
                W, ACC, PERMUTED, ADD, HAS_GAIN,
            )  # fmt: skip
    elif BLOCK > 0:
        _standardize_units(
            weight, gain, other, length, left, inner, scale, eps,
            BLOCK, W, OUT, UNITS, ACC, ALIGNED, PERMUTED, ADD, HAS_GAIN,
        )  # fmt: skip
    else:
        _standardize_long_unit(weight, gain, other, length, inner, scale, eps, OUT, ACC, PERMUTED, ADD, HAS_GAIN)


@triton.jit
def standardize_kernel(
    pointers, rows, owners, eps: tl.float64,
    VARIANTS: tl.constexpr, ADD: tl.constexpr, HAS_GAIN: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A program standardizes a tile of units of one weight, or takes the gradient."""
    tensor, row, variant, first = row_of_program(rows, owners, _COLUMNS)
    for i in tl.static_range(len(VARIANTS)):
        if variant == i:
            _tile(
                pointers, row, first, tensor, eps,
                VARIANTS[i][0], VARIANTS[i][1], VARIANTS[i][2], VARIANTS[i][3], VARIANTS[i][4],
                VARIANTS[i][5], ADD, HAS_GAIN, BACKWARD,
            )  # fmt: skip


class Weight(NamedTuple):
    """What stays of one weight from step to step."""

    units: int
    fan_in: int
    inner: int
    """elements of the innermost dim in memory: the kernel's area, or the channels in channels_last order"""
    scale: float
    dtype: torch.dtype
    other_dtype: torch.dtype
    """dtype of the output"""
    permuted: bool
    """whether weight and output have different memory orders"""
    aligned: bool
    """whether weight, output and gradients start at multiples of 16 bytes"""


def _build(structure: tuple[Weight, ...], device: torch.device) -> Table:
    of_weight = [variant_of(w.fan_in, w.units, w.dtype, w.other_dtype, w.aligned, w.permuted) for w in structure]
    bits = np.array([w.scale for w in structure], dtype=np.float64).view(np.int64).tolist()
    rows = [[w.units, w.fan_in, scale, w.inner] for w, scale in zip(structure, bits, strict=True)]
    programs = [ceil_div(w.units, variant.units) for w, variant in zip(structure, of_weight, strict=True)]
    return Table(of_weight, rows, programs, _POINTERS.value, device)


def weight_standardize(
    weights: Sequence[Weight],
    pointers: list[int],
    device: torch.device,
    eps: float,
    add: bool,
    has_gain: bool,
    backward: bool,
) -> None:
    """Standardizes weights of a device or, backward, takes the gradients.

    Args:
        weights: none of them empty.
        pointers: of each weight in turn those of weight, gain, output or its gradient, and gradients; 0 for none.
        device: the device of all.
        eps: added to the variance where `add`, otherwise the least sum of squared deviations.
        add: the form of eps.
        has_gain: whether the weights have gains.
        backward: whether to take gradients.
    """
    table = table_for(_build, tuple(weights), device)
    table.launch(standardize_kernel, pointers, eps=eps, ADD=add, HAS_GAIN=has_gain, BACKWARD=backward)
