"""Norms of units and what follows from them: whether a gradient is clipped, and by which factor."""

import triton
import triton.language as tl

from .launch import at_least, narrowed, quotient, scalar, square_root, widened


@triton.jit
def term(x, p, NORM: tl.constexpr):
    """What a norm sums or, for infinity, takes the largest of."""
    if NORM == "2":
        return x * x
    elif NORM == "p":
        return tl.exp2(p * tl.log2(tl.abs(x)))
    else:
        return tl.abs(x)


@triton.jit
def _largest(x, AXIS: tl.constexpr):
    """Maximum over an axis, NaN where there is one: hardware maxima pass over it."""
    has_nan = tl.max((x != x).to(tl.int32), axis=AXIS) > 0
    return tl.where(has_nan, float("nan"), tl.max(x, axis=AXIS))


@triton.jit
def combine(x, NORM: tl.constexpr, AXIS: tl.constexpr):
    """Sum, or largest, of terms over an axis."""
    return _largest(x, AXIS) if NORM == "inf" else tl.sum(x, axis=AXIS)


@triton.jit
def joined(x, y, NORM: tl.constexpr):
    """Sum, or largest, of two results of `combine` or two terms."""
    return tl.where((y > x) | (y != y), y, x) if NORM == "inf" else x + y


@triton.jit
def root(x, p, NORM: tl.constexpr, ACC: tl.constexpr):
    """The norm that a unit's terms add up to."""
    if NORM == "2":
        return square_root(x, ACC)
    elif NORM == "p":
        return tl.exp2(tl.log2(x) / p)
    else:
        return x


@triton.jit
def norm(block, tail, NORM: tl.constexpr, ACC: tl.constexpr):
    """(UNITS,) norms of units that consist of a block and a tail."""
    total = combine(term(widened(block, ACC), 2.0, NORM), NORM, 1)
    rest = combine(term(widened(tail, ACC), 2.0, NORM), NORM, 1)
    return root(joined(total, rest, NORM), 2.0, NORM, ACC)


@triton.jit
def norms_in_float64(weight, grad, length, units, p, BLOCK: tl.constexpr, UNITS: tl.constexpr, NORM: tl.constexpr):
    """(UNITS,) norms of weight and gradient, of any p: reads them an eighth of a block at a time."""
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
    weight_norm = root(combine(weight_sum, NORM, 1), p, NORM, tl.float64)
    return weight_norm, root(combine(grad_sum, NORM, 1), p, NORM, tl.float64)


@triton.jit
def decide(weight_norm, grad_norm, clip_factor, eps, ACC: tl.constexpr):
    """Whether a unit is clipped, by which factor, the ratio of its norms, and whether ACC held all on the way."""
    bound = at_least(weight_norm, scalar(eps, ACC))
    max_norm = scalar(clip_factor, ACC) * bound
    clipped = (grad_norm < max_norm) == 0  # true for a NaN norm, which must reach the gradient
    factor = quotient(max_norm, at_least(grad_norm, scalar(1e-6, ACC)), ACC)
    ratio = tl.where(grad_norm == 0, grad_norm, quotient(grad_norm, bound, ACC))  # also where eps = 0 lets both be 0
    infinite = (weight_norm == float("inf")) | (grad_norm == float("inf"))
    # squares of norms below 1e-16, and factors below 1.2e-38, lose digits
    small = (bound <= 1e-16) | (max_norm <= 1e-16) | (clipped & (factor < 1.1754944e-38))
    return clipped, factor, ratio, (infinite | small) == 0 if ACC == tl.float32 else clipped == clipped


@triton.jit
def statistics_of(pointers, i, first):
    """Address of the statistics of a tensor's units from `first` on; 0 where the i-th pointer of the table is."""
    address = tl.load(pointers + i)
    return tl.where(address != 0, address + 3 * 4 * first, 0)


@triton.jit
def count(statistics, unit, clipped, ratio, mask):
    """Adds a step to the float32 triples (steps, clipped, largest ratio) of these units, from `statistics_of`."""
    if statistics != 0:
        at = statistics.to(tl.pointer_type(tl.float32)) + 3 * unit
        steps, times = tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)
        largest = tl.load(at + 2, mask=mask, other=0.0)
        new = ratio.to(tl.float32)
        tl.store(at, steps + 1.0, mask=mask)
        tl.store(at + 1, times + clipped.to(tl.float32), mask=mask)
        tl.store(at + 2, tl.where((new > largest) | (new != new), new, largest), mask=mask)


@triton.jit
def store_scaled(target, g, factor, mask, ACC: tl.constexpr, DTYPE: tl.constexpr):
    """target = g * factor where the mask is true, computed in ACC and rounded once."""
    tl.store(target, narrowed(widened(g, ACC) * factor, DTYPE), mask=mask)
