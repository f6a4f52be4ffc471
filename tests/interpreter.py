"""Makes Triton's interpreter round to bfloat16 as GPUs do: to nearest even, where its own cast truncates."""

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _rounding_cast(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
        return _cast(builder, source, target)
    rounded = torch.from_numpy(source.data).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def round_to_nearest() -> None:
    """Takes effect for all interpreted kernels of the process."""
    InterpreterBuilder.cast_impl = _rounding_cast
