"""`scale * f(x)` for each of the 16 activations, and its gradient: one read per operand and one write."""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.weight_standardize import accumulation_dtype
from .launch import ACCESS_BYTES, TRITON_DTYPES, ceil_div, launch, narrowed, scalar, widened

# What a program of 4 warps has in flight: up to 2048 bytes per warp. An H200 covers its latency of some 0.7 us at
# 4.8 TB/s with 3.4 MB in flight, 25 KB per multiprocessor, where 8 and more programs are resident.
_BYTES = 8192
# 16 elements per thread in float32: of 32 the compiler spills some.
_MOST_ELEMENTS = 2048
# Columns of a tile where rows are short or strided apart: 128 bytes of bfloat16, one line of the cache.
_LINE = 64


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0; by a Taylor series where the subtraction would cancel."""
    TERMS: tl.constexpr = 13 if x.dtype == tl.float64 else 7  # leave less than an ulp at 0.35
    series = x * (1.0 / TERMS) + 1.0
    for i in tl.static_range(TERMS - 1, 1, -1):
        series = series * x * (1.0 / i) + 1.0
    return tl.where(x > -0.35, series * x, tl.exp(x) - 1.0)


@triton.jit
def _log1p_exp(x):
    """log(1 + exp(x)) for x <= 0, as 2 artanh(e / (2 + e)): 1 + e would round a small e away."""
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 7  # of a series in at most 1/9
    e = tl.exp(x)
    z = e / (2.0 + e)
    square = z * z
    series = square * (1.0 / (2 * TERMS + 1)) + 1.0 / (2 * TERMS - 1)
    for i in tl.static_range(TERMS - 1, 0, -1):
        series = series * square + 1.0 / (2 * i - 1)
    return 2.0 * z * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gate(x):
    """sigmoid(x) and its derivative, from e = exp(-|x|): 1 - sigmoid(x) would cancel, and x magnify the error."""
    e = tl.exp(-tl.abs(x))
    d = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * d, d), e * d * d


@triton.jit
def _normal(x):
    """The normal distribution function and density.

    In float32 by csrc/kernels/scaled_activation.h's fit to the tail, from which 1 + erf(x) would cancel away.
    """
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if x.dtype == tl.float64:
        distribution = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        u = 1.0 / (1.0 + 0.21 * tl.abs(x))
        p = u * -0.07203421741724014 + 0.28545454144477844
        p = p * u - 0.3341919481754303
        p = p * u + 0.35403624176979065
        p = p * u - 0.09724748134613037
        p = p * u + 0.12635590136051178
        p = p * u + 0.06878984719514847
        p = p * u + 0.08512943238019943
        p = p * u + 0.08370769768953323
        tail = density * 2.5066282746 * (p * u)
        distribution = tl.where(x < 0, tail, 1.0 - tail)
    return distribution, density


@triton.jit
def value(x, KEY: tl.constexpr):
    """f(x) of an elementwise activation; KEY as in `nfnets_kernels.reference.scaled_activation`."""
    if KEY == "identity":
        y = x
    elif KEY == "celu" or KEY == "elu":
        y = tl.where(x < 0, _expm1(x), x)
    elif KEY == "gelu":
        y = x * _normal(x)[0]
    elif KEY == "gelu_tanh":  # 0.5 x (1 + tanh z) = x sigmoid(2 z), without the cancellation of tanh z near -1
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KEY == "leaky_relu":
        y = tl.where(x > 0, x, 0.01 * x)
    elif KEY == "log_sigmoid":
        y = tl.minimum(x, 0.0) - _log1p_exp(-tl.abs(x))
    elif KEY == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif KEY == "relu6":
        y = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif KEY == "selu":
        y = tl.where(x < 0, 1.7580993408473766 * _expm1(x), 1.0507009873554805 * x)
    elif KEY == "sigmoid":
        y = sigmoid(x)
    elif KEY == "silu":
        y = x * sigmoid(x)
    elif KEY == "softsign":
        y = x / (1.0 + tl.abs(x))
    elif KEY == "softplus":
        y = tl.where(x > 20, x, tl.maximum(x, 0.0) + _log1p_exp(-tl.abs(x)))
    else:
        tl.static_assert(KEY == "tanh")
        t = _expm1(-2.0 * tl.abs(x))
        y = tl.where(x < 0, t, -t) / (2.0 + t)
    return y


@triton.jit
def gradient(grad, x, KEY: tl.constexpr):
    """`grad * f'(x)`; no product where f' is 0 on a half-line, so that an infinite gradient is masked too.

    x may be the output where `nfnets_kernels.ops.scaled_activation.saves_output` holds.
    """
    if KEY == "identity":
        y = grad
    elif KEY == "celu" or KEY == "elu":
        y = tl.where(x > 0, grad, grad * tl.exp(x))
    elif KEY == "gelu":
        distribution, density = _normal(x)
        y = grad * (distribution + x * density)
    elif KEY == "gelu_tanh":  # far out the slope is 0, and the bounded square keeps it from meeting an infinity
        square = tl.minimum(x * x, 1e4)
        gate, slope = _gate(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        y = grad * (gate + x * (1.5957691216057308 * (1.0 + 0.134145 * square) * slope))
    elif KEY == "leaky_relu":
        y = tl.where(x > 0, grad, 0.01 * grad)
    elif KEY == "log_sigmoid":
        y = grad * sigmoid(-x)
    elif KEY == "relu":
        y = tl.where(x <= 0, 0.0, grad)
    elif KEY == "relu6":
        y = tl.where((x > 0) & (x < 6), grad, 0.0)
    elif KEY == "selu":
        y = tl.where(x > 0, 1.0507009873554805 * grad, 1.7580993408473766 * grad * tl.exp(x))
    elif KEY == "sigmoid":
        y = grad * _gate(x)[1]
    elif KEY == "silu":
        gate, slope = _gate(x)
        y = grad * (gate + x * slope)
    elif KEY == "softsign":
        d = 1.0 + tl.abs(x)
        y = grad / (d * d)
    elif KEY == "softplus":
        y = tl.where(x > 20, grad, grad * sigmoid(x))
    else:
        tl.static_assert(KEY == "tanh")
        y = grad * (4.0 * _gate(2.0 * x)[1])
    return y


@triton.jit
def load(x, mask, ACC: tl.constexpr):
    """Values in the accumulation dtype; any where the mask is false."""
    return widened(tl.load(x, mask=mask), ACC)


@triton.jit
def store(out, values, mask):
    """Stores values of the accumulation dtype, rounded once."""
    tl.store(out, narrowed(values, out.dtype.element_ty), mask=mask)


@triton.jit
def _elementwise_block(x, grad, out, scale, mask, KEY: tl.constexpr, ACC: tl.constexpr):
    values = load(x, mask, ACC)
    if grad is None:
        store(out, scale * value(values, KEY), mask)
    else:
        store(out, gradient(scale * load(grad, mask, ACC), values, KEY), mask)


@triton.jit(do_not_specialize=["numel"])
def elementwise_kernel(
    x, grad, out, numel, scale: tl.float64, KEY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = scale * f(x), or f'(x) * scale * grad; out may be x."""
    scale = scalar(scale, ACC)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    x, out, at = x + start, out + start, tl.arange(0, BLOCK)
    grad_at = None if grad is None else grad + start + at
    if numel - start >= BLOCK:  # without a mask the accesses are wide whatever numel is
        _elementwise_block(x + at, grad_at, out + at, scale, None, KEY, ACC)
    else:
        _elementwise_block(x + at, grad_at, out + at, scale, at < numel - start, KEY, ACC)


@triton.jit
def glu_kernel(
    x, grad, out, rows, units, scale: tl.float64,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x is (rows, 2, length) for a length of units * UNIT: out = scale * x[:, 0] * sigmoid(x[:, 1]), or its gradient.

    Args:
        x: (rows, 2, length).
        grad: (rows, length), or None.
        out: (rows, length), or as x where grad is given.
    """
    scale = scalar(scale, ACC)
    length = units * UNIT
    tiles = tl.cdiv(length, COLUMNS)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < length)
    narrow, wide = row * length + column, row * 2 * length + column
    half = load(x + wide, mask, ACC)
    gate, slope = _gate(load(x + wide + length, mask, ACC))
    if grad is None:
        store(out + narrow, scale * (half * gate), mask)
    else:
        g = scale * load(grad + narrow, mask, ACC)
        store(out + wide, g * gate, mask)
        store(out + wide + length, g * (half * slope), mask)


@triton.jit
def log_softmax_kernel(
    x, grad, out, channels, channel_stride, positions, position_stride, scale: tl.float64,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """scale * log_softmax over the channels of each position, or its gradient; samples lie one behind the other."""
    scale = scalar(scale, ACC)
    tiles = tl.cdiv(positions, POSITIONS)
    program = tl.program_id(0)
    start = (program // tiles).to(tl.int64) * channels * positions
    position = (program % tiles).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :].to(tl.int64)
    at = start + position * position_stride + channel * channel_stride

    largest = tl.full((POSITIONS, CHANNELS), float("-inf"), ACC)
    for i in range(0, channels, CHANNELS):
        mask = (position < positions) & (i + channel < channels)
        values = widened(tl.load(x + at + i * channel_stride, mask=mask, other=float("-inf")), ACC)
        largest = tl.maximum(largest, values)
    top = tl.max(largest, axis=1)[:, None]

    exponentials = tl.zeros((POSITIONS, CHANNELS), ACC)
    grads = tl.zeros((POSITIONS, CHANNELS), ACC)
    for i in range(0, channels, CHANNELS):
        mask = (position < positions) & (i + channel < channels)
        values = widened(tl.load(x + at + i * channel_stride, mask=mask, other=float("-inf")), ACC)
        exponentials += tl.exp(values - top)
        if grad is not None:
            grads += widened(tl.load(grad + at + i * channel_stride, mask=mask, other=0.0), ACC)
    log_sum = tl.log(tl.sum(exponentials, axis=1))[:, None]
    grad_sum = scale * tl.sum(grads, axis=1)[:, None]

    for i in range(0, channels, CHANNELS):
        mask = (position < positions) & (i + channel < channels)
        values = load(x + at + i * channel_stride, mask, ACC) - top - log_sum
        if grad is None:
            store(out + at + i * channel_stride, scale * values, mask)
        else:
            g = scale * load(grad + at + i * channel_stride, mask, ACC)
            store(out + at + i * channel_stride, g - tl.exp(values) * grad_sum, mask)


# Triton's own cdiv and next_power_of_2 take 2 us on the host, which wraps their arguments; a tile is chosen once.
@functools.cache
def block_of(dtype: torch.dtype, loads: int) -> int:
    """Elements of a program that loads that many tensors, a power of 2."""
    return min(_MOST_ELEMENTS, _BYTES // triton.next_power_of_2(loads) // dtype.itemsize)


def unit_of(length: int, dtype: torch.dtype) -> int:
    """Elements of the widest access that rows of that length allow."""
    return math.gcd(length, ACCESS_BYTES // dtype.itemsize)


@functools.lru_cache(maxsize=4096)
def tile_of(length: int, block: int, most_columns: int) -> tuple[int, int]:
    """Rows and columns of a tile of `block` elements: the widest of those that waste the fewest lanes on such rows."""
    whole = triton.next_power_of_2(length)
    widest, narrowest = min(whole, block, most_columns), min(whole, _LINE)
    choices = [widest >> i for i in range(widest.bit_length()) if widest >> i >= narrowest]
    columns = min(choices, key=lambda columns: ceil_div(length, columns) * columns)
    return block // columns, columns


def scaled_activation(x: Tensor, grad: Tensor | None, key: str, scale: float, out: Tensor) -> None:
    """out = scale * f(x), or where grad is given the gradient of x.

    Args:
        x: (...), dense; for glu and log_softmax (N, C, ...) in contiguous or channels-last order.
        grad: as the output of f, or None.
        key: a key of `nfnets_kernels.reference.scaled_activation`.
        scale: any number.
        out: as x; for glu and no grad (N, C / 2, ...). In x's memory order, as grad is.
    """
    if out.numel() == 0:
        return
    acc = TRITON_DTYPES[accumulation_dtype(x.dtype)]
    launch_kernel = {"glu": _glu, "log_softmax": _log_softmax}.get(key, _elementwise)
    launch_kernel(x, grad, key, out, {"scale": scale, "ACC": acc})


def _elementwise(x: Tensor, grad: Tensor | None, key: str, out: Tensor, shared: dict) -> None:
    block = block_of(x.dtype, 1 if grad is None else 2)
    launch(
        elementwise_kernel,
        ceil_div(x.numel(), block),
        x.device,
        num_warps=8 if x.dtype.itemsize == 2 else 4,  # 8 values a thread, one access: of 16 the compiler spills some
        x=x,
        grad=grad,
        out=out,
        numel=x.numel(),
        KEY=key,
        BLOCK=block,
        **shared,
    )


def _glu(x: Tensor, grad: Tensor | None, key: str, out: Tensor, shared: dict) -> None:
    samples, channels = x.shape[:2]
    rows = samples if x.is_contiguous() else x.numel() // channels
    length = x.numel() // rows // 2
    block = block_of(x.dtype, 2 if grad is None else 3)
    tile_rows, columns = tile_of(length, block, block)
    unit = unit_of(length, x.dtype)
    launch(
        glu_kernel,
        ceil_div(rows, tile_rows) * ceil_div(length, columns),
        x.device,
        x=x,
        grad=grad,
        out=out,
        rows=rows,
        units=length // unit,
        UNIT=unit,
        ROWS=tile_rows,
        COLUMNS=columns,
        **shared,
    )


def _log_softmax(x: Tensor, grad: Tensor | None, key: str, out: Tensor, shared: dict) -> None:
    samples, channels = x.shape[:2]
    space = x.numel() // (samples * channels)
    block = block_of(x.dtype, 1 if grad is None else 2)
    if x.is_contiguous() and space > 1:
        tile_channels, tile_positions = tile_of(space, block, _LINE)
        view = {"channel_stride": space, "positions": space, "position_stride": 1}
    else:
        samples, space = 1, samples * space
        tile_positions, tile_channels = tile_of(channels, block, block)
        view = {"channel_stride": 1, "positions": space, "position_stride": channels}
    launch(
        log_softmax_kernel,
        samples * ceil_div(space, tile_positions),
        x.device,
        x=x,
        grad=grad,
        out=out,
        channels=channels,
        CHANNELS=tile_channels,
        POSITIONS=tile_positions,
        **view,
        **shared,
    )
