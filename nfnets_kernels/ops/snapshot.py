"""What a training loop reuses from step to step: how parameters and gradients lay, and whether they still do."""

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend as backends
from .library import is_unit_dense


def same_objects(a: Collection[Any], b: Collection[Any]) -> bool:
    """Whether both hold the very same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _layout(tensor: Tensor | None) -> Any:
    """What a snapshot holds of a tensor, but for its address; sparse ones are not compared, they never fit."""
    if tensor is None or tensor.layout is not torch.strided:
        return tensor if tensor is None else tensor.layout
    return type(tensor), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


class Snapshot:
    """How plain parameters and their gradients lie; csrc/python/snapshot.h is the same, in a tenth of the time."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._grad_layouts = [_layout(parameter.grad) for parameter in parameters]
        self._state = self._state_of_those_with_gradient()

    def _state_of_those_with_gradient(self) -> list[Any]:
        """The others may be anything: nothing is done to them."""
        pairs = zip(self._parameters, self._grad_layouts, strict=True)
        return [(_layout(parameter), parameter.data_ptr()) for parameter, grad in pairs if grad is not None]

    def gradients(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], Iterable[int]] | None:
        """The gradients that are not None, and their addresses.

        None where these are other parameters, a parameter's memory or layout changed, or a gradient's layout did.
        Memory alone says little: a parameter that was given other data may lie where it lay, in a view of the old, or
        in memory that was freed and given out again.
        """
        if not same_objects(parameters, self._parameters):
            return None
        grads = [parameter.grad for parameter in parameters]
        if list(map(_layout, grads)) != self._grad_layouts or self._state_of_those_with_gradient() != self._state:
            return None
        there = [grad for grad in grads if grad is not None]
        return there, [grad.data_ptr() for grad in there]


def snapshot_of(parameters: list[Tensor]) -> Any:
    """The compiled Snapshot where torch (2.11 and newer) describes its tensors to it, else the one above."""
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    compiled = backends.extension.Snapshot.take(parameters, api) if backends.extension and api else None
    return compiled or Snapshot(parameters)


def is_plain(weight: Tensor, grad: Tensor, device: torch.device) -> bool:
    """Whether a kernel takes both as they lie."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and type(grad) is Tensor
        and weight.layout is grad.layout is torch.strided
        and weight.device == grad.device == device
        and {weight.dtype, grad.dtype} <= backends.DTYPE_CODES.keys()
        and weight.shape == grad.shape
        and weight.numel() > 0
        and is_unit_dense(weight)
        and is_unit_dense(grad)
        and not (weight.is_neg() or grad.is_neg())
    )
