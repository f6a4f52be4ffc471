"""How a kernel is launched, and what all kernels share."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# 16 bytes: the widest access of a thread, and what allocations of torch are always aligned to.
ACCESS_BYTES = 16


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; Triton's takes 2 us, since it is for kernels too."""
    return -(-a // b)


def launch(kernel: Any, grid: int, device: torch.device, *, num_warps: int = 4, **arguments: Any) -> None:
    """Runs `grid` programs of a kernel on the device's current stream; arguments by the kernel's parameter names."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[(grid,)](num_warps=num_warps, **arguments)


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """A number argument in DTYPE.

    Parameters that are annotated tl.float64 take a Python float unrounded; the interpreter hands over the float itself.
    """
    return tl.full((), value, DTYPE)


@triton.jit
def widened(x, ACC: tl.constexpr):
    """x in the accumulation dtype; bfloat16 by its bits, since the interpreter's cast misplaces subnormals."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True).to(ACC)
    else:
        return x.to(ACC)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """x rounded to a storage dtype; bfloat16 by way of float32, the one cast to it that the interpreter has right."""
    return x.to(tl.float32).to(DTYPE) if DTYPE == tl.bfloat16 else x.to(DTYPE)


@triton.jit
def at_least(x, low):
    """The larger of the two, NaN where x is NaN."""
    return tl.where(x < low, low, x)


@triton.jit
def quotient(x, y, ACC: tl.constexpr):
    """x / y rounded to nearest, which float32's plain division is not."""
    return tl.div_rn(x, y) if ACC == tl.float32 else x / y


@triton.jit
def square_root(x, ACC: tl.constexpr):
    """The square root rounded to nearest; see `quotient`."""
    return tl.sqrt_rn(x) if ACC == tl.float32 else tl.sqrt(x)
