"""What all weight-standardized modules share: gain, folding, autocast and the cache of eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import functional, ops
from ..ops.library import check_finite, is_channels_last

# Fused optimizers write parameters without a new version: every step of any optimizer makes cached weights stale.
_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


Prepared = tuple[Tensor, Tensor | None]
"""Standardized weight and bias."""


class Request(NamedTuple):
    """A layer whose standardized weight is wanted, its output multiplied by `alpha * skip_gain`."""

    layer: Standardized
    skip_gain: Tensor | None = None
    alpha: float = 1.0


class _Cached(NamedTuple):
    key: tuple
    sources: tuple[Tensor, ...]  # kept alive, so that no new tensor can come to lie at a source's address
    prepared: Prepared


class _Held(NamedTuple):
    """What a layer was given for one forward pass, and for what it holds."""

    sources: tuple[Tensor | None, ...]
    alpha: float
    with_grad: bool
    context: Any
    prepared: Prepared


@torch.compiler.assume_constant_result  # torch.compile of torch 2.10 and 2.11 cannot trace the call
def _has_autocast(device: str) -> bool:
    """Whether there is autocast for the device type; meta has none."""
    return torch.amp.is_autocast_available(device)


def _saving_context() -> Any:
    """The innermost hooks on tensors saved for backward.

    A checkpoint installs its own, and computes in the backward pass what ran under them again, on its own: a weight
    that was prepared outside would then be missing. A compiler sees the whole.
    """
    return None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(False)


def can_standardize_together(layers: Sequence[nn.Module]) -> bool:
    """Whether all are standardized layers of one eps and eps_form, as the op takes one of each."""
    standardized = [layer for layer in layers if isinstance(layer, Standardized)]
    return len(standardized) == len(layers) and len({(layer.eps, layer.eps_form) for layer in standardized}) == 1


def standardize_together(requests: Sequence[Request], input: Tensor | None) -> list[Prepared]:
    """The standardized weights of several layers in one pass, prepared for inputs like this one.

    They come in channels_last where the input is, else in their own memory format.

    Raises:
        ValueError: the layers differ in eps or eps_form.
    """
    first = requests[0].layer
    if not can_standardize_together([request.layer for request in requests]):
        raise ValueError("requests must be layers of one eps and eps_form")
    folded = [layer.folded(skip_gain, alpha) for layer, skip_gain, alpha in requests]
    weights = functional.weight_standardize_many(
        [layer.unit_axis_first(layer.weight) for layer, _, _ in requests],
        [gain for gain, _ in folded],
        scales=[layer.gamma * alpha for layer, _, alpha in requests],
        eps=first.eps,
        eps_form=first.eps_form,
        dtype=first.compute_dtype(),
        memory_format=torch.channels_last if input is not None and is_channels_last(input) else torch.preserve_format,
    )
    return [
        (request.layer.unit_axis_back(weight), bias)
        for request, weight, (_, bias) in zip(requests, weights, folded, strict=True)
    ]


class Standardized(nn.Module):
    """Mixin before a torch layer with `weight` and `bias`: standardizes the weight on its way into the layer.

    `unit_axis_first` and `unit_axis_back` may be overridden where output units are not dim 0 of the weight.
    """

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    gamma: float
    eps: float
    eps_form: str
    _cached: _Cached | None = None
    _held: _Held | None = None

    def _init_standardization(
        self, gain_shape: tuple[int, ...] | None, gamma: float, eps: float, eps_form: str, gain_init: float = 1.0
    ) -> None:
        check_finite("gamma", gamma)
        weight = self.unit_axis_first(self.weight)
        ops.weight_standardize.check([weight], [], [gamma], eps, eps_form, None, "preserve")
        self.gamma = gamma
        self.eps = eps
        self.eps_form = eps_form
        self.gain_init = gain_init
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

    def standardized(self, input: Tensor, skip_gain: Tensor | None = None, alpha: float = 1.0) -> Prepared:
        """The weight and bias that the layer computes with, prepared for this input.

        The weight comes in the autocast dtype, and in channels_last where the input is. With skip_gain (a scalar
        tensor) and alpha, both are multiplied by `alpha * skip_gain`: the output is scaled without a pass over it.
        In eval mode without grad the pair is kept until a parameter changes in place or is replaced.
        """
        held = self.held(skip_gain, alpha)
        if held is not None:
            return held
        request = Request(self, skip_gain, alpha)
        if not self.keeps_standardized() or torch.compiler.is_compiling():
            return standardize_together([request], input)[0]
        sources = tuple(t for t in (self.weight, self.bias, self.gain, skip_gain) if t is not None)
        if any(t.is_inference() or type(t) is not nn.Parameter for t in sources):  # no version counter, no plain memory
            return standardize_together([request], input)[0]
        versions = tuple((t.data_ptr(), t.shape, t.stride(), t._version) for t in sources)
        wanted = (self.compute_dtype(), is_channels_last(input), alpha, self.gamma, self.eps, self.eps_form)
        key = (versions, _optimizer_steps, wanted)
        cached = self._cached  # read once: another thread may replace it
        if cached is None or cached.key != key:
            prepared = standardize_together([request], input)[0]
            cached = self._cached = _Cached(key, tuple(t.detach() for t in sources), prepared)
        return cached.prepared

    def hold(self, prepared: Prepared, skip_gain: Tensor | None = None, alpha: float = 1.0) -> None:
        """Compute with this pair until `let_go`: what `standardize_together` made for the layer as it is now."""
        sources = (self.weight, self.bias, self.gain, skip_gain)
        self._held = _Held(sources, alpha, torch.is_grad_enabled(), _saving_context(), prepared)

    def let_go(self) -> None:
        """Forgets what `hold` was given."""
        self._held = None

    def held(self, skip_gain: Tensor | None = None, alpha: float = 1.0) -> Prepared | None:
        """The pair of `hold`, or None where it would not be exactly what the layer computes with by itself.

        So it is when a hook of the layer has made another weight, another factor or dtype is wanted, or gradients are
        and were not; and in a checkpoint inside the module for whose forward pass the pair was made.
        """
        held = self._held
        if held is None or held.alpha != alpha or held.prepared[0].dtype != self.compute_dtype():
            return None
        sources = (self.weight, self.bias, self.gain, skip_gain)
        same = all(source is now for source, now in zip(held.sources, sources, strict=True))
        if not same or (torch.is_grad_enabled() and not held.with_grad) or held.context != _saving_context():
            return None
        return held.prepared

    def keeps_standardized(self) -> bool:
        """Whether the next forward pass may use a weight that an earlier one standardized."""
        return not (self.training or torch.is_grad_enabled())

    def compute_dtype(self) -> torch.dtype:
        """The dtype that the layer computes in: autocast's, or its own."""
        weight = self.weight  # once: nn.Module's lookup takes longer than all the rest
        device = weight.device.type
        autocast = _has_autocast(device) and torch.is_autocast_enabled(device)
        if autocast and weight.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return weight.dtype

    def folded(self, skip_gain: Tensor | None, alpha: float) -> tuple[Tensor | None, Tensor | None]:
        """Gain and bias of the layer whose output is multiplied by skip_gain, and the bias by alpha too."""
        gain, bias = self.gain, self.bias
        if bias is not None and (skip_gain is not None or alpha != 1.0):
            bias = bias * (alpha if skip_gain is None else alpha * skip_gain)
        if skip_gain is not None:
            units = self.unit_axis_first(self.weight).shape[0]
            gain = skip_gain.expand(units) if gain is None else gain * skip_gain
        return gain, bias

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
        return {**self.__dict__, "_cached": None, "_held": None}

    def extra_repr(self) -> str:
        """The torch layer's arguments and those of the standardization."""
        gain = "" if self.gain is not None else ", gain=False"
        return f"{super().extra_repr()}{gain}, gamma={self.gamma}, eps={self.eps}, eps_form={self.eps_form!r}"
