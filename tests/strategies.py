"""What hypothesis draws for the property tests of every op: shapes, places in memory, values, factors."""

import math
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from .helpers import DEVICE, INFINITY, NAN

# Static factors, away from those that are subnormal in float32.
FACTORS = st.sampled_from([0.0, 1.0]) | st.floats(0.01, 4.0) | st.floats(-4.0, -0.01)
# 1e-40 is subnormal in float32 and bfloat16, 3e-6 in float16.
NO_SUBNORMALS = (NAN, 0.0, -0.0)
SMALL_SPECIALS = (*NO_SUBNORMALS, 1e-40, -3e-6)
SPECIALS = (*SMALL_SPECIALS, INFINITY, -INFINITY)

# Of a tensor's longest dim, where kernels run and where every thread or program of theirs is emulated.
_LONG = {False: [1023, 4097, 65_536, 131_073], True: [1023, 2048, 5001]}
_SELDOM = st.sampled_from([False] * 15 + [True])


def is_emulated(target: str) -> bool:
    """Whether CUDA or Triton kernels serve tensors of the CPU."""
    return target in ("cuda", "triton") and DEVICE == "cpu"


@st.composite
def shapes(draw, target: str, min_dims: int = 0, max_dims: int = 5, side: int = 7) -> tuple[int, ...]:
    """Mostly small; seldom one dim is long, of more than 100,000 at times, and the others are short."""
    dims = draw(st.lists(st.integers(0, side), min_size=min_dims, max_size=max_dims))
    if dims and draw(_SELDOM):
        dims = [min(size, 2 if axis < 2 else 1) for axis, size in enumerate(dims)]
        dims[draw(st.integers(0, len(dims) - 1))] = draw(st.sampled_from(_LONG[is_emulated(target)]))
    return tuple(dims)


@st.composite
def places(draw, shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Copies a tensor of that shape to where any order of the axes, any gaps and any offset are; gaps hold NaN."""
    dims = len(shape)
    channels_last = [0, *range(2, dims), 1][:dims]
    order = draw(st.sampled_from([list(range(dims)), channels_last]) | st.permutations(range(dims)))
    steps = draw(st.sampled_from([[1] * dims] * 2) | st.lists(st.integers(1, 2), min_size=dims, max_size=dims))
    offset = draw(st.integers(0, 3))

    def place(x: Tensor) -> Tensor:
        padded = [shape[axis] * steps[axis] for axis in order]
        memory = x.new_full((math.prod(padded) + offset,), NAN)
        view = memory[offset:].view(padded).permute([order.index(axis) for axis in range(dims)])
        view = view[tuple(slice(None, None, step) for step in steps)]
        # No view in the eyes of autograd, which lets functions overwrite few views.
        placed = x.new_empty(0).set_(memory.untyped_storage(), view.storage_offset(), view.shape, view.stride())
        return placed.copy_(x)

    return place


@st.composite
def tensors(
    draw,
    shape: Sequence[int],
    dtype: torch.dtype,
    magnitude: float = 1.0,
    shift: float = 0.0,
    specials: Sequence[float] = (),
    read_only: bool = False,
) -> Tensor:
    """Normal numbers around shift, seldom some specials among them.

    Of those that are only read, seldom all indices of a dim are one in memory, and some are negated when they are read,
    as the imaginary part of a conjugate is.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = shift + magnitude * torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
    if specials and x.numel() and draw(_SELDOM):
        for special in draw(st.lists(st.sampled_from(specials), min_size=1, max_size=3)):
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = special
    x = x.to(DEVICE, dtype)
    # The roundings in a long sum of equal terms are not independent, as tolerances.py has it.
    axes = [axis for axis, size in enumerate(shape) if 0 < size < 64]
    if read_only and axes and x.numel() and draw(_SELDOM):
        x = x.narrow(draw(st.sampled_from(axes)), 0, 1)
    negated = read_only and draw(_SELDOM)
    placed = draw(places(x.shape))(-x if negated else x).expand(shape)
    return torch._neg_view(placed) if negated else placed
