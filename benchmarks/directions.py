"""The forward pass, the backward pass or both of a function, as the benchmarks call them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import BenchmarkError, assert_all_close

FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "forward + backward")
Function = Callable[[], Sequence[Tensor]]


def timed(direction: str, function: Function, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Function:
    """Computes the outputs of a function of `inputs`, the inputs' gradients for these cotangents, or both.

    The backward pass alone starts, every time, from the graph of the forward pass of the first call. Cotangents lie in
    memory as the outputs do, which is how the next layer returns them.
    """
    if direction == FORWARD:
        return torch.no_grad()(function)
    kept: list[Tensor] = []
    grads: list[Tensor] = []

    def run() -> Sequence[Tensor]:
        outs = kept or function()
        if direction == BACKWARD:
            kept[:] = outs
        if not grads:
            grads.extend(torch.empty_like(out).copy_(grad) for out, grad in zip(outs, cotangents, strict=True))
        gradients = torch.autograd.grad(outs, inputs, grads, retain_graph=direction == BACKWARD)
        return gradients if direction == BACKWARD else (*(out.detach() for out in outs), *gradients)

    return run


def check_against(reference: Sequence[Tensor], tolerance: float) -> Callable[[str, Any], None]:
    """A comparison's check: the tensors that a contestant returned are the reference."""

    def check(contestant: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise BenchmarkError(f"{contestant}: returned {type(value).__name__} instead of tensors")
        assert_all_close(contestant, value, reference, tolerance)

    return check
