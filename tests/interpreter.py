"""What Triton's interpreter lacks: rounding to bfloat16 as GPUs do, and some of its speed."""

from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl
_call = InterpretedFunction.__call__
_launch = GridExecutor.__call__
_patched: set[frozenset[int]] = set()


def _rounding_cast(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    """To nearest even, where the interpreter's own cast truncates."""
    if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
        return _cast(builder, source, target)
    rounded = torch.from_numpy(source.data).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def _call_patched(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """A nested call; the interpreter patches the language anew for each, which is most of its time."""
    modules = frozenset(id(value) for value in function.fn.__globals__.values() if value is tl or value is tl.core)
    if modules in _patched:
        return function.rewrite()(*args, **kwargs)
    _patched.add(modules)
    return _call(function, *args, **kwargs)


def _launch_unpatched(executor: GridExecutor, *args: Any, **kwargs: Any) -> Any:
    _patched.clear()
    return _launch(executor, *args, **kwargs)


def prepare_interpreter() -> None:
    """Takes effect for all interpreted kernels of the process."""
    InterpreterBuilder.cast_impl = _rounding_cast
    InterpretedFunction.__call__ = _call_patched
    GridExecutor.__call__ = _launch_unpatched
