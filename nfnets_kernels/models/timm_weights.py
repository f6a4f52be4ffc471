"""Weights in timm's layout (timm/models/nfnet.py, `NormFreeNet`), both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate

from torch import Tensor, nn

from .network import NormalizerFreeNet
from .weights import Converted, check_model, convert, fitting

_BLOCK_PARTS = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "conv_shortcut": "downsample.conv",
    "skip_gain": "skipinit_gain",
}
_GATE_PARTS = {"fc0": "fc1", "fc1": "fc2", "conv": "conv"}


def _block_path(index: int, model: NormalizerFreeNet) -> str:
    """blocks.<index> as timm counts: by stage and place in it."""
    ends = list(accumulate(model.depth))
    stage = next(stage for stage, end in enumerate(ends) if index < end)
    return f"stages.{stage}.{index - ends[stage] + model.depth[stage]}"


def timm_name(name: str, model: NormalizerFreeNet) -> str:
    """timm's name of one of our parameters."""
    if in_block := re.match(r"blocks\.(\d+)\.(\w+)(.*)", name):
        index, part, rest = int(in_block[1]), in_block[2], in_block[3]
        if part == "se":
            gate = "attn" if model.blocks[index].gate_inside else "attn_last"
            _, layer, leaf = rest.split(".")
            return f"{_block_path(index, model)}.{gate}.{_GATE_PARTS[layer]}.{leaf}"
        return f"{_block_path(index, model)}.{_BLOCK_PARTS[part]}{rest}"
    if in_stem := re.match(r"stem_conv(\d+)(.*)", name):
        return f"stem.conv{int(in_stem[1]) + 1}{in_stem[2]}"
    return re.sub(r"^initial_conv", "stem.conv", re.sub(r"^fc\.", "head.fc.", name))


def _ones_after(name: str) -> int:
    """Dimensions of size 1 that timm's shape has after ours: gains are (C, 1, 1, 1), gates are 1x1 convolutions."""
    if name.endswith(".gain"):
        return 3
    return 2 if re.search(r"\.se\.fc\d\.weight$", name) else 0


def _from_timm(name: str, value: Tensor) -> Tensor:
    ones = _ones_after(name)
    if ones and value.ndim > ones and value.shape[-ones:] == (1,) * ones:
        return value.reshape(value.shape[:-ones])
    return value


def from_timm(model: NormalizerFreeNet, state: Mapping[str, Tensor]) -> Converted:
    """timm's tensors under our names and in our shapes."""
    return convert("timm's state_dict", model, state, lambda name: timm_name(name, model), _from_timm)


def load_timm(model: NormalizerFreeNet, source: nn.Module | Mapping[str, Tensor]) -> NormalizerFreeNet:
    """Loads the weights of a timm NF network, whatever the name that `like_timm` knows.

    Outputs are timm's too where the model computes as timm's, as `like_timm` makes it: options that have no weights,
    such as numerics or shortcut, cannot be told from them.

    Args:
        model: a network of the source's architecture; filled in place and returned. One without a classifier
            (num_classes=0, features_only) leaves the source's.
        source: timm's network, or its state_dict.

    Raises:
        TypeError: the model is not one of ours, or the source neither a module nor a mapping.
        ValueError: tensors are missing, unexpected or of another shape; all of them are named by timm's names, shapes
            are ours, and nothing is written.
    """
    check_model(model)
    state = source.state_dict() if isinstance(source, nn.Module) else source
    if not isinstance(state, Mapping):
        raise TypeError(f"source must be a timm network or its state_dict, got {type(source).__name__}")
    model.load_state_dict(fitting(model, from_timm(model, state)))
    return model


def timm_state_dict(model: NormalizerFreeNet) -> dict[str, Tensor]:
    """The model's weights under timm's names and in timm's shapes; they share memory with the model's.

    `timm.create_model(name).load_state_dict(timm_state_dict(like_timm(name)))` fits.

    Raises:
        TypeError: the model is not one of ours.
    """
    check_model(model)
    state = model.state_dict()
    return {timm_name(name, model): t.reshape((*t.shape, *(1,) * _ones_after(name))) for name, t in state.items()}
