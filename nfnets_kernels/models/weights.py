"""Loading weights: what every layout shares, and the layout of the authors' published checkpoints (haiku)."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .network import NormalizerFreeNet

CLASSIFIER = ("fc.weight", "fc.bias")


class Converted(NamedTuple):
    """Somebody's weights under our names and in our shapes, as far as their names are known."""

    source: str
    """what to call the weights in an error"""
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    """our name to theirs, of all that the model and its classifier hold"""
    unexpected: list[str]
    """their names of what the model has no place for"""


def convert(
    source: str,
    model: nn.Module,
    theirs: Mapping[str, Any],
    key_of: Callable[[str], str],
    to_ours: Callable[[str, Any], Tensor],
) -> Converted:
    """Renames and reshapes; `key_of` gives their name of one of our parameters, `to_ours` our tensor of their value."""
    keys = {name: key_of(name) for name in dict.fromkeys([*model.state_dict(), *CLASSIFIER])}
    tensors = {name: to_ours(name, theirs[key]) for name, key in keys.items() if key in theirs}
    return Converted(source, tensors, keys, sorted(set(theirs) - set(keys.values())))


def fitting(model: nn.Module, weights: Converted, without: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors that `model.load_state_dict` takes; a model without a classifier leaves theirs.

    Args:
        model: takes the weights.
        weights: to be checked.
        without: names that may be missing.

    Raises:
        ValueError: naming every missing, unexpected and wrongly shaped tensor.
    """
    state, tensors = model.state_dict(), weights.tensors
    missing = sorted(weights.keys[name] for name in state if name not in tensors and name not in without)
    misshapen = [
        f"{weights.keys[name]}: {tuple(value.shape)} where the model has {tuple(state[name].shape)}"
        for name, value in tensors.items()
        if name in state and value.shape != state[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", weights.unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{weights.source} does not fit the model; {'; '.join(problems)}")
    return {name: value for name, value in tensors.items() if name in state}


def _haiku_name(name: str, model: NormalizerFreeNet) -> str:
    """The checkpoint's key of one of our parameters: haiku numbers repeated modules _1, _2, ... and nests with `~`."""
    path, _, leaf = name.rpartition(".")
    linear = re.search(r"\bfc\d?$", path)
    leaf = {"weight": "w", "bias": "b" if linear else "bias"}.get(leaf, leaf)
    root, block = model.haiku_names
    path = re.sub(r"^blocks\.0\b", block, path)
    path = re.sub(r"^blocks\.(\d+)", rf"{block}_\1", path)
    path = path.replace(".se.fc0", ".squeeze_excite.linear").replace(".se.fc1", ".squeeze_excite.linear_1")
    path = re.sub(r"^fc$", "linear", path)
    return "/".join([root, *(f"~/{part}" for part in path.split(".") if part), leaf])


def _to_torch(name: str, value: Any) -> Tensor:
    """HWIO to OIHW, IO to OI, everything else as it is."""
    tensor = torch.tensor(np.asarray(value))
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor.t() if tensor.ndim == 2 else tensor


def flatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """{module: {parameter: array}}, as haiku holds parameters, to {"module/parameter": array}; flat ones stay."""
    flat: dict[str, Any] = {}
    for key, value in arrays.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": array for name, array in value.items()}
        else:
            flat[key] = value
    return flat


def _restore_array(make: Callable[..., np.ndarray], args: Any, state: Any, attributes: Any = None) -> np.ndarray:
    """An array as dill pickles it, with which the authors wrote their files; attributes of subclasses are left."""
    array = make(*args)
    array.__setstate__(state)
    return array


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled arrays and containers of them, and nothing that could run code."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),  # bytes, where Python 2 must be able to read them
            ("collections", "OrderedDict"),
            *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
            *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("dill._dill", "_create_array"):
            return _restore_array
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"the file holds {module}.{name}, not only arrays, and is not read")
        return super().find_class(module, name)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Arrays of a `numpy.savez` file, or of the authors' files, which are called .npz but hold a pickled dict.

    Raises:
        OSError: there is no such file.
        pickle.UnpicklingError: a pickle that holds more than containers of arrays; nothing else in it is executed.
        ValueError: neither holds a mapping of arrays.
    """
    if zipfile.is_zipfile(path):
        with np.load(path) as file:
            return dict(file)
    with Path(path).open("rb") as stream:
        arrays = _ArrayUnpickler(stream).load()
    if not isinstance(arrays, Mapping):
        raise ValueError(f"{path} must hold a mapping of arrays, got {type(arrays).__name__}")
    return dict(arrays)


def check_model(model: nn.Module) -> None:
    """Raises TypeError unless the model is one of ours."""
    if not isinstance(model, NormalizerFreeNet):
        raise TypeError(f"model must be an NFResNet, an NFNet or an NFRegNet, got {type(model).__name__}")


def from_haiku(model: NormalizerFreeNet, arrays: Mapping[str, Any]) -> Converted:
    """The authors' arrays, flat or nested, under our names and in our layouts."""
    return convert("npz", model, flatten(arrays), lambda name: _haiku_name(name, model), _to_torch)


def haiku_state_dict(model: NormalizerFreeNet, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' arrays under our names and in our layouts, checked against the model.

    Args:
        model: of the arrays' architecture.
        arrays: `"module/parameter"` to array, or module to parameter to array.

    Raises:
        ValueError: naming every missing, unexpected and wrongly shaped array.
    """
    return fitting(model, from_haiku(model, arrays))


def load_haiku(
    model: NormalizerFreeNet, npz: str | os.PathLike[str] | Mapping[str, Any], *, prefix: str = ""
) -> NormalizerFreeNet:
    """Loads weights in the authors' layout: keys `<haiku module>/<parameter>`, convolutions HWIO, linear layers IO.

    The published files (dm-nfnets/F0_haiku.npz to F6_haiku.npz) are pickles despite their name. They are read as such,
    but only arrays, and dicts of them, are: a pickle that asks for anything else is refused before that is imported.

    Args:
        model: a network of the checkpoint's architecture; filled in place and returned. One without a classifier
            (num_classes=0, features_only) leaves the checkpoint's.
        npz: path of a published file or of a `numpy.savez` file, or a mapping: key to array, or haiku's module to
            parameter to array.
        prefix: only keys that start with it are read, without it.

    Raises:
        TypeError: the model is not one whose checkpoints are known.
        OSError: there is no such file.
        pickle.UnpicklingError: the file is neither, or holds more than arrays.
        ValueError: arrays are missing, unexpected or of another shape; all of them are named and nothing is written.
    """
    check_model(model)
    arrays = flatten(npz if isinstance(npz, Mapping) else read_arrays(npz))
    arrays = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    model.load_state_dict(haiku_state_dict(model, arrays))
    return model
