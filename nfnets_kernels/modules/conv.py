"""Weight-standardized convolutions: drop-in for torch's and timm's.

The standardized weight of each output unit of N = fan-in weights is `gamma * gain * (w - mean) * r`
(Brock et al. 2021a, "Characterizing signal propagation to close the performance gap in unnormalized ResNets",
equation 1).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pointwise import pays, pointwise
from .standardized import Prepared, Standardized

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def same_padding(size: int, kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's SAME padding before and after one dim: ceil(size / stride) outputs, the odd pixel after."""
    total = max((-(-size // stride) - 1) * stride + (kernel_size - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class _BiasGradient(torch.autograd.Function):
    """The gradient of a bias that a convolution has added already: the sum over samples and space."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor, space: int) -> Tensor:
        ctx.channel_dim = output.ndim - space - 1
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        return grad, grad.sum([dim for dim in range(grad.ndim) if dim != ctx.channel_dim]), None


def sums_bias_gradient(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `_BiasGradient` pays: oneDNN's own bias gradients take 26 of an NF-ResNet-50's 583 ms, a sum takes 10.

    In bfloat16 they are the faster ones; on GPUs torch sums by itself.
    """
    return (
        bias is not None
        and bias.requires_grad
        and torch.is_grad_enabled()
        and input.device.type == "cpu"
        and weight.dtype == bias.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class _WSConv(Standardized):
    """The forward pass of WSConv1d, 2d and 3d, before the torch class in the bases."""

    _same: bool

    def _init_conv(self, gain: tuple[int, ...] | None, same: bool, gamma: float, eps: float, eps_form: str, **kw: Any):
        self._same = same
        self._init_standardization(gain, gamma, eps, eps_form, **kw)

    def _convolve_same(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sizes = input.shape[-len(self.kernel_size) :]  # type: ignore[arg-type]
        arguments = zip(sizes, self.kernel_size, self.stride, self.dilation, strict=True)  # type: ignore[arg-type]
        pads = [same_padding(*argument) for argument in arguments]
        padding = [before for before, _ in pads]
        if self.padding_mode != "zeros" or any(before != after for before, after in pads):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, [pad for pair in reversed(pads) for pad in pair], mode=mode)  # type: ignore[arg-type]
            padding = [0] * len(pads)
        convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[len(pads) - 1]
        return convolution(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def forward(
        self,
        input: Tensor,
        *,
        skip_gain: Tensor | None = None,
        alpha: float = 1.0,
        prepared: Prepared | None = None,
    ) -> Tensor:
        """The convolution of `input` with the standardized weight, times `alpha * skip_gain` where one is given.

        skip_gain is a scalar tensor; it scales weight and bias, so the output is not read again (see `standardized`).
        `prepared` is what `standardize_together` made for this layer.
        """
        weight, bias = self.standardized(input, skip_gain, alpha) if prepared is None else prepared
        if pays(input, weight, self.stride, self.padding, self.groups):  # type: ignore[arg-type]
            return pointwise(input, weight, bias, self.stride)  # type: ignore[arg-type]
        convolve: Any = self._convolve_same if self._same else self._conv_forward
        if bias is None or not sums_bias_gradient(input, weight, bias):
            return convolve(input, weight, bias)
        return _BiasGradient.apply(convolve(input, weight, bias.detach()), bias, weight.ndim - 2)

    def extra_repr(self) -> str:
        """As torch, with the padding that was asked for."""
        return super().extra_repr() + (", padding='SAME'" if self._same else "")


class _WSConvNd(_WSConv):
    """The constructor of WSConv1d, 2d and 3d."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device=None,
        dtype=None,
        *,
        gain: bool = True,
        gamma: float = 1.0,
        eps: float = 1e-4,
        eps_form: str = "clamp",
    ) -> None:
        same = padding == "SAME"
        super().__init__(
            in_channels, out_channels, kernel_size, stride, 0 if same else padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._init_conv((out_channels,) if gain else None, same, gamma, eps, eps_form)


class WSConv1d(_WSConvNd, nn.Conv1d):
    """`nn.Conv1d` with a standardized weight; arguments and errors as `WSConv2d`."""


class WSConv2d(_WSConvNd, nn.Conv2d):
    """`nn.Conv2d` with a standardized weight, the WSConv2D of the authors' code (nfnets/base.py).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            `nn.Conv2d`; padding may also be "SAME", TensorFlow's padding that depends on the input's size.
        gain: learn one gain per output channel, shape (out_channels,), from 1.
        gamma: static scale, for instance the gain of the activation before the convolution.
        eps: bound of N * var ("clamp"), or addition to var ("add").
        eps_form: "clamp", the authors' `rsqrt(max(N*var, eps))`, or "add", timm's `rsqrt(N*(var + eps))`.

    Under autocast the weight is standardized in its own dtype and rounded once, to the autocast dtype.

    Raises:
        ValueError: a fan-in of 1 (its standardized weight is zero), or gamma, eps or eps_form is not accepted.
    """


class WSConv3d(_WSConvNd, nn.Conv3d):
    """`nn.Conv3d` with a standardized weight; arguments and errors as `WSConv2d`."""


class WSConvTranspose2d(Standardized, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a standardized weight.

    Its weight is (in_channels, out_channels / groups, kH, kW): a unit is an output channel, the fan-in is
    in_channels / groups * kH * kW. Arguments as `nn.ConvTranspose2d`, the rest and errors as `WSConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: PaddingMode = "zeros",
        device=None,
        dtype=None,
        *,
        gain: bool = True,
        gamma: float = 1.0,
        eps: float = 1e-4,
        eps_form: str = "clamp",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._init_standardization((out_channels,) if gain else None, gamma, eps, eps_form)

    def unit_axis_first(self, weight: Tensor) -> Tensor:
        """(in, out/g, ...) to (out, in/g, ...)."""
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def unit_axis_back(self, weight: Tensor) -> Tensor:
        """(out, in/g, ...) to (in, out/g, ...): the same exchange of the two axes inside each group."""
        return self.unit_axis_first(weight)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As `nn.ConvTranspose2d`, with the standardized weight."""
        weight, bias = self.standardized(input)
        padding: Any = self.padding
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            padding,
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return F.conv_transpose2d(input, weight, bias, self.stride, padding, output_padding, self.groups, self.dilation)


def _timm_padding(kernel_size: Any, stride: Any, dilation: Any) -> tuple[int, int]:
    """timm's default: symmetric padding that keeps ceil(size / stride) for odd kernels (timm/layers/padding.py)."""
    pairs = [value if isinstance(value, (tuple, list)) else (value, value) for value in (kernel_size, stride, dilation)]
    height, width = (((s - 1) + d * (k - 1)) // 2 for k, s, d in zip(*pairs, strict=True))
    return height, width


class ScaledStdConv2d(_WSConv, nn.Conv2d):
    """timm's ScaledStdConv2d: its signature, numerics (eps_form "add") and state_dict (gain of shape (C, 1, 1, 1)).

    Loads gains of shape (C,) too. padding=None is timm's symmetric default; "SAME" gives timm's ScaledStdConv2dSame.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        gamma: float = 1.0,
        eps: float = 1e-6,
        gain_init: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        same = padding == "SAME"
        padding = _timm_padding(kernel_size, stride, dilation) if padding is None else 0 if same else padding
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self._init_conv((out_channels, 1, 1, 1), same, gamma, eps, "add", gain_init=gain_init)


class StdConv2d(_WSConv, nn.Conv2d):
    """timm's StdConv2d, unscaled weight standardization (Qiao et al. 2019): `(w - mean) / sqrt(var + eps)`, no gain."""

    def __init__(
        self,
        in_channel: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-6,
        device=None,
        dtype=None,
    ) -> None:
        same = padding == "SAME"
        padding = _timm_padding(kernel_size, stride, dilation) if padding is None else 0 if same else padding
        super().__init__(
            in_channel, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        fan_in = self.weight[0].numel()
        self._init_conv(None, same, fan_in**0.5, eps, "add")  # the op divides by sqrt(fan_in), which is undone here
