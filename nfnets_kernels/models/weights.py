"""Loading the authors' published checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from .nf_resnet import NFResNet


def _haiku_name(name: str, model: nn.Module) -> str:
    """The checkpoint's key of one of our parameters: haiku numbers repeated modules _1, _2, ... and nests with `~`."""
    path, _, leaf = name.rpartition(".")
    linear = isinstance(model.get_submodule(path), nn.Linear)
    leaf = {"weight": "w", "bias": "b" if linear else "bias"}.get(leaf, leaf)
    path = re.sub(r"^blocks\.0\b", "nf_res_block", path)
    path = re.sub(r"^blocks\.(\d+)", r"nf_res_block_\1", path)
    path = path.replace(".se.fc0", ".squeeze_excite.linear").replace(".se.fc1", ".squeeze_excite.linear_1")
    path = re.sub(r"^fc$", "linear", path)
    return "/".join(["NF_ResNet", *(f"~/{part}" for part in path.split(".") if part), leaf])


def _to_torch(value: np.ndarray) -> Tensor:
    """HWIO to OIHW, IO to OI, everything else as it is."""
    tensor = torch.tensor(value)
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor.t() if tensor.ndim == 2 else tensor


def haiku_state_dict(model: NFResNet, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The authors' arrays under our names and in our layouts, checked against the model.

    Raises:
        ValueError: naming every missing, unexpected and wrongly shaped array.
    """
    state = model.state_dict()
    keys = {name: _haiku_name(name, model) for name in state}
    missing = sorted(key for key in keys.values() if key not in arrays)
    unexpected = sorted(set(arrays) - set(keys.values()))
    converted = {name: _to_torch(np.asarray(arrays[key])) for name, key in keys.items() if key in arrays}
    misshapen = [
        f"{keys[name]}: {tuple(value.shape)} where the model has {tuple(state[name].shape)}"
        for name, value in converted.items()
        if value.shape != state[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"npz does not fit the model; {'; '.join(problems)}")
    return converted


def load_haiku(
    model: NFResNet, npz: str | os.PathLike[str] | Mapping[str, np.ndarray], *, prefix: str = ""
) -> NFResNet:
    """Loads weights in the authors' layout: keys `<haiku module>/<parameter>`, convolutions HWIO, linear layers IO.

    Args:
        model: an `NFResNet` of the checkpoint's architecture; filled in place and returned.
        npz: path of a `numpy.savez` file, or a mapping from key to array.
        prefix: only keys that start with it are read, without it.

    Raises:
        TypeError: the model is not one whose checkpoints are known.
        ValueError: arrays are missing, unexpected or of another shape; all of them are named and nothing is written.
    """
    if not isinstance(model, NFResNet):
        raise TypeError(f"model must be an NFResNet, got {type(model).__name__}")
    if isinstance(npz, Mapping):
        arrays = dict(npz)
    else:
        with np.load(npz) as file:
            arrays = dict(file)
    arrays = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    model.load_state_dict(haiku_state_dict(model, arrays))
    return model
