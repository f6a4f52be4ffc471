"""What all weight-standardized modules share: gain, folding, autocast and the cache of eval mode."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import functional, ops
from ..ops.library import is_channels_last

# Fused optimizers write parameters without a new version: every step of any optimizer makes cached weights stale.
_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class _Cached(NamedTuple):
    key: tuple
    sources: tuple[Tensor, ...]  # kept alive, so that no new tensor can come to lie at a source's address
    weight: Tensor
    bias: Tensor | None


class Standardized(nn.Module):
    """Mixin before a torch layer with `weight` and `bias`: standardizes the weight on its way into the layer.

    `unit_axis_first` and `unit_axis_back` may be overridden where output units are not dim 0 of the weight.
    """

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None

    def _init_standardization(
        self, gain_shape: tuple[int, ...] | None, gamma: float, eps: float, eps_form: str, gain_init: float = 1.0
    ) -> None:
        if not math.isfinite(gamma):
            raise ValueError(f"gamma must be finite, got {gamma}")
        weight = self.unit_axis_first(self.weight)
        ops.weight_standardize.check([weight], [], [gamma], eps, eps_form, None, "preserve")
        self.gamma = gamma
        self.eps = eps
        self.eps_form = eps_form
        self.gain_init = gain_init
        self._cached: _Cached | None = None
        if gain_shape is None:
            self.register_parameter("gain", None)
        else:
            self.gain = nn.Parameter(self.weight.new_full(gain_shape, gain_init))

    def reset_parameters(self) -> None:
        """Resets the layer as torch does, and the gain."""
        super().reset_parameters()  # type: ignore[misc]
        if getattr(self, "gain", None) is not None:  # torch calls this before there is a gain
            nn.init.constant_(self.gain, self.gain_init)  # type: ignore[arg-type]

    def unit_axis_first(self, weight: Tensor) -> Tensor:
        """The weight as (output units, fan-in ...)."""
        return weight

    def unit_axis_back(self, weight: Tensor) -> Tensor:
        """Undoes `unit_axis_first`."""
        return weight

    def standardized(
        self, input: Tensor, skip_gain: Tensor | None = None, alpha: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that the layer computes with, prepared for this input.

        The weight comes in the autocast dtype, and in channels_last where the input is. With skip_gain (a scalar
        tensor) and alpha, both are multiplied by `alpha * skip_gain`: the output is scaled without a pass over it.
        In eval mode without grad the pair is kept until a parameter changes in place or is replaced.
        """
        dtype = self._compute_dtype(input)
        memory_format = torch.channels_last if is_channels_last(input) else torch.preserve_format
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._standardize(dtype, memory_format, skip_gain, alpha)
        sources = tuple(t for t in (self.weight, self.bias, self.gain, skip_gain) if t is not None)
        if any(t.is_inference() or type(t) is not nn.Parameter for t in sources):  # no version counter, no plain memory
            return self._standardize(dtype, memory_format, skip_gain, alpha)
        versions = tuple((t.data_ptr(), t.shape, t.stride(), t._version) for t in sources)
        key = (versions, _optimizer_steps, dtype, memory_format, alpha, self.gamma, self.eps, self.eps_form)
        cached = self._cached  # read once: another thread may replace it
        if cached is None or cached.key != key:
            weight, bias = self._standardize(dtype, memory_format, skip_gain, alpha)
            cached = self._cached = _Cached(key, tuple(t.detach() for t in sources), weight, bias)
        return cached.weight, cached.bias

    def _compute_dtype(self, input: Tensor) -> torch.dtype:
        device = input.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # meta has none
        if autocast and self.weight.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return self.weight.dtype

    def _standardize(
        self, dtype: torch.dtype, memory_format: torch.memory_format, skip_gain: Tensor | None, alpha: float
    ) -> tuple[Tensor, Tensor | None]:
        gain, bias = self.gain, self.bias
        if bias is not None and (skip_gain is not None or alpha != 1.0):
            bias = bias * (alpha if skip_gain is None else alpha * skip_gain)
        if skip_gain is not None:
            units = self.unit_axis_first(self.weight).shape[0]
            gain = skip_gain.expand(units) if gain is None else gain * skip_gain
        weight = functional.weight_standardize(
            self.unit_axis_first(self.weight),
            gain,
            scale=self.gamma * alpha,
            eps=self.eps,
            eps_form=self.eps_form,
            dtype=dtype,
            memory_format=memory_format,
        )
        return self.unit_axis_back(weight), bias

    def train(self, mode: bool = True) -> Any:
        """As nn.Module.train; drops the cached weight, which is eval mode's."""
        self._cached = None
        return super().train(mode)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # timm stores gains as (C, 1, 1, 1), the authors as (C,): both are C numbers.
        gain = state_dict.get(f"{prefix}gain")
        if self.gain is not None and isinstance(gain, Tensor) and gain.numel() == self.gain.numel():
            state_dict[f"{prefix}gain"] = gain.reshape(self.gain.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def extra_repr(self) -> str:
        """The torch layer's arguments and those of the standardization."""
        gain = "" if self.gain is not None else ", gain=False"
        return f"{super().extra_repr()}{gain}, gamma={self.gamma}, eps={self.eps}, eps_form={self.eps_form!r}"
