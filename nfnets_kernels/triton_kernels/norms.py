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
def decide(weight_norm, grad_norm, clip_factor, eps, ACC: tl.constexpr):
    """Whether a unit is clipped, by which factor, and whether ACC held everything on the way."""
    bound = at_least(weight_norm, scalar(eps, ACC))
    max_norm = scalar(clip_factor, ACC) * bound
    clipped = (grad_norm < max_norm) == 0  # true for a NaN norm, which must reach the gradient
    factor = quotient(max_norm, at_least(grad_norm, scalar(1e-6, ACC)), ACC)
    infinite = (weight_norm == float("inf")) | (grad_norm == float("inf"))
    # squares of norms below 1e-16, and factors below 1.2e-38, lose digits
    small = (bound <= 1e-16) | (max_norm <= 1e-16) | (clipped & (factor < 1.1754944e-38))
    return clipped, factor, (infinite | small) == 0 if ACC == tl.float32 else clipped == clipped


@triton.jit
def store_scaled(target, g, factor, mask, ACC: tl.constexpr, DTYPE: tl.constexpr):
    """target = g * factor where the mask is true, computed in ACC and rounded once."""
    tl.store(target, narrowed(widened(g, ACC) * factor, DTYPE), mask=mask)
