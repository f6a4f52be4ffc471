"""The end of a residual block and the start of the next one: h = factor * f + bias + shortcut and a = scale * act(h).

All tensors are seen as (samples, rows, length), factor and bias being constant along dim 0, 1 or 2:

    contiguous order     (N, C, space), a factor per row
    channels-last order  (N, space, C), a factor per column; without se and keep (1, N * space, C)
    no se and no bias    (N, 1, C * space), one per sample; without keep too (1, 1, numel), one for all
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.residual import Branch
from ..reference.weight_standardize import accumulation_dtype
from .launch import TRITON_DTYPES, ceil_div, launch, narrowed, scalar, widened
from .scaled_activation import block_of, gradient, load, sigmoid, store, tile_of, unit_of, value

# Columns of a backward tile in channels-last order, 128 bytes of bfloat16: the program sums over the rows.
_COLUMNS = 64
# Tiles of a backward program, which leaves one partial sum per channel: a thousandth of what it reads and writes.
_TILES = 8
# Of the finishing kernel: partial sums and channels that a program reads at once.
_PARTS, _CHANNELS = 16, 128


@triton.jit
def _factor(skip_gain, se, keep, alpha, sample, channel, channels, mask, ACC: tl.constexpr):
    """alpha * skip_gain * keep * 2 sigmoid(se) of some channels of a sample; those that are None are 1."""
    product = scalar(alpha, ACC)
    if skip_gain is not None:
        product *= load(skip_gain, None, ACC)
    if keep is not None:
        product *= load(keep + sample, None, ACC)
    if se is not None:
        product *= 2.0 * sigmoid(load(se + sample * channels + channel, mask, ACC))
    return product


@triton.jit
def forward_kernel(
    f, shortcut, skip_gain, se, keep, bias, h, a, rows, units, alpha: tl.float64, scale: tl.float64,
    KEY: tl.constexpr, BY_COLUMN: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A program does one tile; length = units * UNIT tells the compiler how rows are aligned.

    Args:
        shortcut: None for zeros.
        h: None where it is not kept.
    """
    length = units * UNIT
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(length, COLUMNS)
    tile = tl.program_id(0)
    sample = (tile // (row_tiles * column_tiles)).to(tl.int64)
    row = (tile // column_tiles % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % column_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < length)
    at = sample * rows * length + row * length + column
    channel, channels = (column, length) if BY_COLUMN else (row, rows)
    there = channel < channels
    branch = load(f + at, mask, ACC) * _factor(skip_gain, se, keep, alpha, sample, channel, channels, there, ACC)
    if bias is not None:
        branch += load(bias + channel, there, ACC)
    if shortcut is not None:
        branch += load(shortcut + at, mask, ACC)
    if h is not None:
        stored = narrowed(branch, h.dtype.element_ty)
        tl.store(h + at, stored, mask=mask)
        branch = widened(stored, ACC)  # a backward pass that recomputes from h agrees
    store(a + at, scalar(scale, ACC) * value(branch, KEY), mask)


@triton.jit
def backward_kernel(
    grad_h, grad_a, f, saved, skip_gain, se, keep, bias, grad_shortcut, grad_f, partials, bias_partials,
    rows, units, parts, alpha: tl.float64, scale: tl.float64,
    KEY: tl.constexpr, BY_COLUMN: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program goes TILES tiles along space and sums grad * f and grad of its channels, no two programs in one place.

    Args:
        grad_h: None for zeros.
        f: None where nothing is summed.
        saved: h, or the activation's output where the gradient follows from it.
        bias: what h has more than saved, or None.
        grad_f: None where it is grad_shortcut.
        partials: (samples, parts, channels) in the accumulation dtype, or None as f.
        bias_partials: the same of grad, or None.
    """
    length = units * UNIT
    across = tl.cdiv(length, COLUMNS) if BY_COLUMN else tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    sample = (program // (parts * across)).to(tl.int64)
    part, group = program // across % parts, (program % across).to(tl.int64)
    row, column = tl.arange(0, ROWS)[:, None].to(tl.int64), tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    if BY_COLUMN:
        row += part.to(tl.int64) * TILES * ROWS
        column += group * COLUMNS
        channel, channels = column, length
    else:
        row += group * ROWS
        column += part.to(tl.int64) * TILES * COLUMNS
        channel, channels = row, rows
    there = channel < channels
    factor = _factor(skip_gain, se, keep, alpha, sample, channel, channels, there, ACC)
    scale = scalar(scale, ACC)
    start = sample * rows * length
    sums = tl.zeros((ROWS, COLUMNS), ACC)
    bias_sums = tl.zeros((ROWS, COLUMNS), ACC)
    for _ in range(TILES):
        mask = (row < rows) & (column < length)
        at = start + row * length + column
        inner = scale * load(grad_a + at, mask, ACC)
        point = load(saved + at, mask, ACC)
        if bias is not None:
            point += load(bias + channel, there, ACC)
        grad = gradient(inner, point, KEY)
        if grad_h is not None:
            grad += load(grad_h + at, mask, ACC)
        store(grad_shortcut + at, grad, mask)
        if grad_f is not None:
            store(grad_f + at, grad * factor, mask)
        if f is not None:
            sums += tl.where(mask, grad * load(f + at, mask, ACC), 0.0)
        if bias_partials is not None:
            bias_sums += tl.where(mask, grad, 0.0)
        if BY_COLUMN:
            row += ROWS
        else:
            column += COLUMNS
    at = (sample * parts + part) * channels + channel
    if f is not None:
        tl.store(partials + at, tl.sum(sums, axis=0 if BY_COLUMN else 1, keep_dims=True), mask=there)
    if bias_partials is not None:
        of_part = tl.sum(bias_sums, axis=0 if BY_COLUMN else 1, keep_dims=True)
        tl.store(bias_partials + at, of_part, mask=there)


@triton.jit
def finish_kernel(
    partials, skip_gain, se, keep, grad_skip_gain, grad_se, grad_keep, parts, channels, alpha: tl.float64,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program adds up the partial sums of one sample and goes back through `_factor`.

    Args:
        partials: (N, parts, channels).
        grad_skip_gain: (N,), what each sample adds to it.
        grad_se: (N, channels).
        grad_keep: (N,).
    """
    sample = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)[:, None]
    to_gain = tl.zeros((1, CHANNELS), ACC)
    to_keep = tl.zeros((1, CHANNELS), ACC)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        there = channel < channels
        block = tl.zeros((PARTS, CHANNELS), ACC)
        for i in range(0, parts, PARTS):
            at = (sample * parts + i + part) * channels + channel
            block += tl.load(partials + at, mask=there & (i + part < parts), other=0.0)
        sums = tl.sum(block, axis=0, keep_dims=True)
        if skip_gain is not None:
            factor = _factor(None, se, keep, alpha, sample, channel, channels, there, ACC)
            to_gain += tl.where(there, sums * factor, 0.0)
        if keep is not None:
            factor = _factor(skip_gain, se, None, alpha, sample, channel, channels, there, ACC)
            to_keep += tl.where(there, sums * factor, 0.0)
        if se is not None:
            at = sample * channels + channel
            gate = sigmoid(load(se + at, there, ACC))
            others = _factor(skip_gain, None, keep, alpha, sample, channel, channels, there, ACC)
            store(grad_se + at, sums * (2.0 * gate * (1.0 - gate)) * others, there)
    if skip_gain is not None:
        tl.store(grad_skip_gain + sample, tl.sum(to_gain))
    if keep is not None:
        store(grad_keep + sample, tl.sum(to_keep), None)


class _View(NamedTuple):
    samples: int
    rows: int
    length: int
    by_column: bool
    """whether factor and bias vary along a row"""


def _view(like: Tensor, branch: Branch, with_bias: bool) -> _View:
    samples, channels = like.shape[:2]
    of_samples = branch.se is not None or branch.keep is not None
    if branch.se is None and not with_bias:
        return _View(samples, 1, like.numel() // samples, False) if of_samples else _View(1, 1, like.numel(), False)
    space = like.numel() // (samples * channels)
    if space > 1 and like.is_contiguous():
        return _View(samples, channels, space, False)
    return _View(samples, space, channels, True) if of_samples else _View(1, samples * space, channels, True)


def _shared(branch: Branch, view: _View, tile: tuple[int, int], key: str, scale: float, dtype: torch.dtype) -> dict:
    """Arguments of both passes."""
    unit = unit_of(view.length, dtype)
    return {
        **_factors(branch, dtype),
        "rows": view.rows,
        "units": view.length // unit,
        "scale": scale,
        "KEY": key,
        "BY_COLUMN": view.by_column,
        "UNIT": unit,
        "ROWS": tile[0],
        "COLUMNS": tile[1],
    }


def _factors(branch: Branch, dtype: torch.dtype) -> dict:
    skip_gain, se, keep = (None if tensor is None else tensor.contiguous() for tensor in branch.tensors)
    return {
        "skip_gain": skip_gain,
        "se": se,
        "keep": keep,
        "alpha": branch.alpha,
        "ACC": TRITON_DTYPES[accumulation_dtype(dtype)],
    }


def residual(
    f: Tensor,
    shortcut: Tensor | None,
    branch: Branch,
    key: str,
    scale: float,
    bias: Tensor | None,
    h: Tensor | None,
    a: Tensor,
) -> None:
    """h = factor * f + bias + shortcut, a = scale * act(h).

    Args:
        f, shortcut, h, a: (N, C, ...), all in contiguous or all in channels-last order; h or a may be f. shortcut is
            None for zeros, h where it is not kept.
        branch: the factor.
        key: an elementwise key of `nfnets_kernels.reference.scaled_activation`.
        scale: any number.
        bias: (C,), or None.
    """
    if a.numel() == 0:
        return
    view = _view(a, branch, bias is not None)
    block = block_of(a.dtype, 1 if shortcut is None else 2)
    tile = tile_of(view.length, block, block)
    launch(
        forward_kernel,
        view.samples * ceil_div(view.rows, tile[0]) * ceil_div(view.length, tile[1]),
        a.device,
        f=f,
        shortcut=shortcut,
        bias=bias if bias is None else bias.contiguous(),
        h=h,
        a=a,
        **_shared(branch, view, tile, key, scale, a.dtype),
    )


def residual_backward(
    grad_h: Tensor | None,
    grad_a: Tensor,
    f: Tensor | None,
    saved: Tensor,
    branch: Branch,
    key: str,
    scale: float,
    grads: Sequence[Tensor],
    with_bias: bool,
    bias: Tensor | None,
) -> None:
    """Writes the gradients of shortcut, f (unless the factor is 1), where f is given of the branch's tensors, and bias.

    Args:
        grad_h: as f, or None for zeros.
        grad_a, saved: as f; saved is h, or the activation's output where the gradient follows from it.
        f: (N, C, ...), all in contiguous or all in channels-last order, or None.
        branch, key, scale: as in `residual`.
        grads: the results, as `nfnets_kernels.reference.residual.residual_backward` returns them.
        with_bias: whether the last of grads is that of bias.
        bias: (C,), what h has more than saved; None for zeros.
    """
    if saved.numel() == 0:
        for grad in grads:
            grad.zero_()
        return
    view = _view(saved, branch, with_bias or bias is not None)
    loads = 2 + (grad_h is not None) + (f is not None)
    block = block_of(saved.dtype, loads)
    tile = tile_of(view.length, block, _COLUMNS if view.by_column else block)
    along, across = (0, 1) if view.by_column else (1, 0)
    sizes = view.rows, view.length
    parts = ceil_div(sizes[along], tile[along] * _TILES)

    def partial_sums(needed: bool) -> Tensor | None:
        shape = view.samples, parts, sizes[across]
        return saved.new_empty(shape, dtype=accumulation_dtype(saved.dtype)) if needed else None

    partials, bias_partials = partial_sums(f is not None), partial_sums(with_bias)
    launch(
        backward_kernel,
        view.samples * parts * ceil_div(sizes[across], tile[across]),
        saved.device,
        grad_h=grad_h,
        grad_a=grad_a,
        f=f,
        saved=saved,
        bias=bias if bias is None else bias.contiguous(),
        grad_shortcut=grads[0],
        grad_f=None if branch.is_one else grads[1],
        partials=partials,
        bias_partials=bias_partials,
        parts=parts,
        TILES=min(_TILES, ceil_div(sizes[along], tile[along])),
        **_shared(branch, view, tile, key, scale, saved.dtype),
    )
    if partials is not None:
        _finish(partials, branch, saved.dtype, grads[2:])
    if bias_partials is not None:
        _add_up(bias_partials, (0, 1), grads[-1])


def _add_up(partials: Tensor, dims: int | tuple[int, ...], out: Tensor) -> None:
    """Sums over dims into out, in one launch where its dtype is the accumulation's."""
    if out.dtype == partials.dtype:
        torch.sum(partials, dims, out=out)
    else:
        out.copy_(partials.sum(dims))


def _finish(partials: Tensor, branch: Branch, dtype: torch.dtype, grads: Sequence[Tensor]) -> None:
    """Gradients of the branch's tensors from partial sums of grad_f's terms, (samples, parts, channels)."""
    samples, parts, channels = partials.shape
    if branch.se is None and branch.keep is None:  # many partial sums of one sample
        grads[0].copy_(partials.sum() * branch.alpha)
        return
    of_tensors = iter(grads)
    grad_skip_gain, grad_se, grad_keep = (None if x is None else next(of_tensors) for x in branch.tensors)
    of_samples = None if grad_skip_gain is None else partials.new_empty(samples)
    launch(
        finish_kernel,
        samples,
        partials.device,
        partials=partials,
        grad_skip_gain=of_samples,
        grad_se=grad_se,
        grad_keep=grad_keep,
        parts=parts,
        channels=channels,
        PARTS=_PARTS,
        CHANNELS=_CHANNELS,
        **_factors(branch, dtype),
    )
    if grad_skip_gain is not None and of_samples is not None:
        _add_up(of_samples, 0, grad_skip_gain)
