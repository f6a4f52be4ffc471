"""How many multiply-adds an image takes, as the authors count them (nfnets/base.py, count_conv_flops)."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# What convolutions and linear layers come down to; attention multiplies activations by bmm, and is not counted.
LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)

Module = TypeVar("Module", bound=nn.Module)


def count_flops(model: nn.Module, image_size: int | tuple[int, int], *, in_chans: int = 3) -> int:
    """Multiply-adds of the model's convolutions and linear layers for one image.

    A layer takes its output's elements times its fan-in; padding counts as pixels do, and what stands between the
    layers counts nothing. The model stays as it is: a copy without memory runs on the meta device, in eval mode.

    Args:
        model: takes images (N, in_chans, H, W).
        image_size: H = W, or (H, W).
        in_chans: channels of the image.

    Raises:
        TypeError: model is no module, or a size is no int.
        ValueError: a size is less than 1, or image_size is not one or two of them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    height, width = check_image_size(image_size)
    check_size("in_chans", in_chans)
    twin = on_meta(model).eval()
    dtype = next((parameter.dtype for parameter in twin.parameters() if parameter.is_floating_point()), None)
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        twin(torch.empty(1, in_chans, height, width, dtype=dtype))
    counts = counter.get_flop_counts().get("Global", {})
    return sum(counts.get(layer, 0) for layer in LAYERS) // 2  # the counter takes an addition for an operation too


def on_meta(model: Module) -> Module:
    """A copy whose parameters and buffers have no memory."""
    memo: dict[int, Tensor] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def check_image_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    sizes = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sizes) != 2:
        raise ValueError(f"image_size must be one size or (height, width), got {image_size}")
    for size in sizes:
        check_size("image_size", size)
    return sizes[0], sizes[1]


def check_size(name: str, size: int) -> None:
    """Raises unless the size is an int of at least 1."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be made of ints, got {size!r}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
