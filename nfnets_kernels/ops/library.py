"""The torch.library namespace `nfnets_kernels`, and what all ops share."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The Library object must live as long as its registrations.
LIBRARY = torch.library.Library("nfnets_kernels", "DEF")

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines an op for every device and returns its callable; the implementation chooses the backend."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nfnets_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.nfnets_kernels, name).default


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Registers the gradient of an op defined above."""
    torch.library.register_autograd(f"nfnets_kernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def check_float(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is a dense one of a floating dtype that the kernels know."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {FLOAT_DTYPES}, got {tensor.dtype}")


def check_finite(name: str, value: float) -> None:
    """Raises ValueError for NaN and infinity; by comparison, since math.isfinite breaks a dynamic compile's graph."""
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {tensor.device}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def channels_last_format(tensor: Tensor) -> torch.memory_format:
    """The channels-last memory format of that many dims, contiguous where there is none."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim, torch.contiguous_format)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor lies in channels-last order and not in contiguous order too."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=channels_last_format(tensor))


def dense_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in the memory order of a contiguous or channels-last tensor; contiguous for any other."""
    if not is_unit_dense(tensor):
        return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.empty_like(tensor) if dtype is None else torch.empty_like(tensor, dtype=dtype)  # a keyword: 0.2 us


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in one order; strides of dims of size 1 do not tell."""
    if a.stride() == b.stride():
        return True
    return all(size < 2 or i == j for size, i, j in zip(a.shape, a.stride(), b.stride(), strict=True))


def aligned(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor itself if its elements lie in the order of `like`, a dense tensor; otherwise a copy whose do."""
    lies = same_order(tensor, like) and not tensor.is_neg()
    return tensor if lies else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def unit_dense(tensor: Tensor) -> Tensor:
    """The tensor itself if its units are dense; otherwise a contiguous copy.

    Also of a tensor that is negated when it is read, such as the imaginary part of a conjugate: see `Tensor.is_neg`.
    """
    lies = is_unit_dense(tensor) and not tensor.is_neg()
    return tensor if lies else tensor.clone(memory_format=torch.contiguous_format)


def is_unit_dense(tensor: Tensor) -> bool:
    """Whether each index of dim 0 is one dense run of memory and the runs lie one behind the other."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=channels_last_format(tensor))


def queue(device: torch.device) -> tuple[int, int]:
    """A tensor's device as the CUDA extension wants it: index, and address of its current stream."""
    if device.type == "cpu":  # CUDA kernels meet CPU tensors in the tests' emulator
        return 0, 0
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)
