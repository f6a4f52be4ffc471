"""`ModelEMA`: the exponential moving average of a model, as a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .lookup import unwrapped


class ModelEMA(nn.Module):
    """The moving average `decay * average + (1 - decay) * model` of a model's parameters and buffers.

    timm's `ModelEmaV2` (its arguments, `module`, `update`, `set`, and a `state_dict` that loads both ways), with one
    multi-tensor call per device and dtype in place of three calls per tensor. The average starts as the model is. It
    takes what is inside `DistributedDataParallel` and `torch.compile`, whatever of these the model is in by then.
    Integer buffers are not averaged but copied.

    A 16-bit model's average is a float32 model: a bfloat16 number does not move by less than 0.2 %, so that in 16 bits
    the updates of the usual decays would round to nothing. Call it with float32 inputs or under autocast, or round a
    copy: `copy.deepcopy(ema.module).bfloat16()`.

    Args:
        model: is copied.
        decay: in [0, 1]; an attribute, for schedules.
        device: where to keep the average, None for where the model is.

    Raises:
        TypeError: model is not a module.
        ValueError: decay lies outside [0, 1].

    Examples:
        >>> ema = ModelEMA(model)
        >>> optimizer.step(); ema.update(model)
        >>> validate(ema.module)
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, device: Any = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self.decay = decay
        self.module = copy.deepcopy(unwrapped(model)).eval().to(device)
        self.module._apply(_widened)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged model's."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model; to be called after each step of the optimizer.

        Raises:
            ValueError: the model has other parameters and buffers than the average. Nothing is written then.
        """
        alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for average, value in self._pairs(model):
            if average.is_floating_point() or average.is_complex():
                averages, values = alike.setdefault((average.device, average.dtype), ([], []))
                averages.append(average)
                values.append(value.to(average))
            else:
                average.copy_(value)
        lerp = get_ema_multi_avg_fn(self.decay)
        for averages, values in alike.values():
            lerp(averages, values, None)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Makes the average what the model is now.

        Raises:
            ValueError: as `update`.
        """
        for average, value in self._pairs(model):
            average.copy_(value)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor of the average, and the model's."""
        averages, values = _tensors(self.module), _tensors(unwrapped(model))
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (averages, values)]
        if shapes[0] != shapes[1]:
            different = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
            raise ValueError(f"model must have the average's parameters and buffers; {different[0]} differs")
        return ((average, values[name]) for name, average in averages.items())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
