"""Plain torch layers for standardized ones, and SAME padding as arithmetic that a traced graph can hold."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.standardized import Prepared, Request, Standardized, standardize_together


def bake(layer: Standardized, skip_gain: Tensor | None, alpha: float) -> Prepared:
    """The weight, in the parameter's dtype and memory format, and bias of the layer times `alpha * skip_gain`."""
    with torch.autocast(layer.weight.device.type, enabled=False):
        return standardize_together([Request(layer, skip_gain, alpha)], None)[0]


def plain_layer(layer: Standardized, prepared: Prepared, **changed: Any) -> nn.Module:
    """The torch layer that `layer` is built on, in eval mode, with the prepared weight and bias.

    Its parameters require grad where one of the layer's does, much as in torch.ao's fusion of BatchNorm.

    Args:
        layer: gives the class and its arguments.
        prepared: weight and bias.
        changed: arguments that differ from the layer's.
    """
    weight, bias = prepared
    torch_class: Any = next(base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn.modules."))
    of_parameters = ("bias", "device", "dtype")
    names = [name for name in inspect.signature(torch_class).parameters if name not in of_parameters]
    arguments = {name: getattr(layer, name) for name in names} | changed
    plain = torch_class(**arguments, bias=bias is not None, device="meta").eval()
    requires_grad = any(parameter.requires_grad for parameter in layer.parameters())
    plain.weight = nn.Parameter(weight, requires_grad)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad)
    return plain


def _same_padding(x: Any, dim: int, kernel_size: int, stride: int, dilation: int) -> tuple[Any, Any]:
    """`modules.conv.same_padding` of a dim whose size is not known, without a branch on the size.

    Both are ints where they do not depend on it. Nothing is added: torch.ao's quantization takes an addition for one of
    tensors.
    """
    extent = (kernel_size - 1) * dilation + 1
    total: Any = extent - 1
    if stride > 1 and extent > 1:  # one pixel per output never needs more than the input
        total = total - (x.shape[dim] - 1) % stride
        if extent < stride:
            total = torch.sym_max(total, 0)
    before = total // 2
    return before, total - before


def pad_same(x: Any, layer: Any) -> tuple[Any, tuple[int, ...]]:
    """What a convolution with padding="SAME" convolves, and the padding that is left to the plain convolution."""
    dims = len(layer.kernel_size)
    arguments = zip(range(-dims, 0), layer.kernel_size, layer.stride, layer.dilation, strict=True)
    pads = [_same_padding(x, *argument) for argument in arguments]
    if all(isinstance(before, int) and before == after for before, after in pads):
        return x, tuple(before for before, _ in pads)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, [pad for pair in reversed(pads) for pad in pair], mode=mode), (0,) * dims
