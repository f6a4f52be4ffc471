"""Published weights, which timm keeps on the Hugging Face hub, and weights from local files, for the factories."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .network import NormalizerFreeNet
from .timm_weights import from_timm
from .weights import CLASSIFIER, Converted, convert, fitting, from_haiku, read_arrays

HUB_TAGS = {
    **{f"dm_nfnet_f{k}": "dm_in1k" for k in range(7)},
    "nfnet_l0": "ra2_in1k",
    "eca_nfnet_l0": "ra2_in1k",
    "eca_nfnet_l1": "ra2_in1k",
    "eca_nfnet_l2": "ra3_in1k",
    "nf_regnet_b1": "ra2_in1k",
    "nf_resnet50": "ra2_in1k",
    "test_nfnet": "r160_in1k",
}
"""timm's names of the networks that have weights, and the weights' tags (timm/models/nfnet.py, `default_cfgs`)"""

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
INSTALL = 'pip install "nfnets-kernels[pretrained]"'

Net = TypeVar("Net", bound=NormalizerFreeNet)


def _optional(module: str) -> Any:
    """Imports what only pretrained weights need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"pretrained weights need {package}, which is not installed: {INSTALL}") from error


def download(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The local copy of the weights that timm publishes for `name`, a key of `HUB_TAGS`; downloaded where need be.

    Args:
        name: timm's.
        cache_dir: in place of the hub's own cache, $HF_HOME/hub.

    Raises:
        ImportError: huggingface_hub is not installed.
        OSError: the hub cannot be reached, or has no such file, and the cache does not hold it.
    """
    hub, errors = _optional("huggingface_hub"), _optional("huggingface_hub.errors")
    repo = f"timm/{name}.{HUB_TAGS[name]}"
    cause: Exception | None = None
    for file in HUB_FILES:
        try:
            return Path(hub.hf_hub_download(repo, file, cache_dir=cache_dir))
        except (errors.EntryNotFoundError, OSError) as error:
            cause = cause or error
            if not isinstance(error, errors.EntryNotFoundError):
                break  # of no file: no such repository, no permission, no space
    raise OSError(
        f"cannot get {' or '.join(HUB_FILES)} of https://huggingface.co/{repo}: {cause}. Without a network, give the "
        "path of a copy as pretrained=, or the cache that holds one as cache_dir= or HF_HOME; HF_HUB_OFFLINE=1 then "
        "keeps the hub from being asked"
    ) from cause


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of one by `torch.save`, which is read without unpickling other objects.

    A state_dict under the key "state_dict" or "model", as training loops store it, is taken out.

    Raises:
        ImportError: safetensors is not installed and the file is one.
        OSError: there is no such file.
        ValueError: it holds no state_dict.
    """
    if Path(path).suffix == ".safetensors":
        return _optional("safetensors.torch").load_file(path, device="cpu")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state_dict, a mapping from names to tensors")
    return dict(state)


def read_weights(model: NormalizerFreeNet, path: str | os.PathLike[str]) -> Converted:
    """Weights of a file under our names: the authors' (.npz), timm's or our own (.safetensors, `torch.save`)."""
    if Path(path).suffix == ".npz":
        return from_haiku(model, read_arrays(path))
    state = read_state_dict(path)
    if any(key.startswith("stem.") for key in state):
        return from_timm(model, state)
    return convert("the state_dict", model, state, lambda name: name, lambda name, value: value)


def adapt_input(weight: Tensor, in_chans: int) -> Tensor:
    """A first convolution (O, I, H, W) for other images, by timm's rule (`timm.models.adapt_input_conv`).

    One channel takes the sum over all; more channels take the trained ones in turn, scaled by I / in_chans. It is a
    start for training: standardization rescales the adapted weights, so outputs for grey images are not those for
    three copies of them.
    """
    trained = weight.shape[1]
    if in_chans == trained:
        return weight
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.repeat(1, math.ceil(in_chans / trained), 1, 1)[:, :in_chans]
    return (repeated.float() * (trained / in_chans)).to(weight.dtype)


def fill(model: NormalizerFreeNet, weights: Converted) -> None:
    """Loads weights; for other images the first convolution is adapted, for other classes the classifier is left.

    Raises:
        ValueError: naming everything else that does not fit; nothing is written then.
    """
    tensors = dict(weights.tensors)
    stem = model.stem_convolutions()[0]
    first = next(f"{name}.weight" for name, module in model.named_modules() if module is stem)
    if first in tensors and tensors[first].ndim == 4:
        tensors[first] = adapt_input(tensors[first], stem.in_channels)
    without: tuple[str, ...] = ()
    if CLASSIFIER[1] in tensors and tensors[CLASSIFIER[1]].shape != (model.num_classes,):
        without = CLASSIFIER
        tensors = {name: value for name, value in tensors.items() if name not in CLASSIFIER}
    model.load_state_dict(fitting(model, weights._replace(tensors=tensors), without), strict=not without)


def create(
    make: Callable[..., Net],
    options: Mapping[str, Any],
    *,
    hub_name: str | None,
    needs: Mapping[str, Any] | None = None,
) -> Net:
    """Makes a network, and fills it where the options ask for it.

    Two options are for here, the others for `make`:

    - pretrained: True for the weights that timm publishes, or the path of a .safetensors file, of one by `torch.save`
      (timm's names or ours), or of the authors' .npz. For num_classes other than the weights' the classifier stays
      freshly initialized; for other in_chans the first convolution is adapted as timm does, see `adapt_input`.
    - cache_dir: where downloads are kept, in place of the hub's own cache.

    Args:
        make: takes the other options.
        options: keyword arguments of a factory.
        hub_name: timm's name of the published weights' network.
        needs: options without which the network computes something else than the published weights were trained for.

    Raises:
        ImportError: huggingface_hub or safetensors is needed and not installed.
        OSError: the file does not exist, or cannot be downloaded.
        pickle.UnpicklingError: the file holds other objects than tensors or arrays.
        ValueError: no weights are published for this network, or they do not fit.
    """
    options = dict(options)
    pretrained, cache_dir = options.pop("pretrained", False), options.pop("cache_dir", None)
    if pretrained is True:
        check_published(hub_name, needs or {}, options)
    model = make(**options)
    if pretrained is True:
        fill(model, read_weights(model, download(str(hub_name), cache_dir)))
    elif pretrained:
        fill(model, read_weights(model, pretrained))
    return model


def check_published(hub_name: str | None, needs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises ValueError unless weights are published for the network of that name and those options."""
    if hub_name not in HUB_TAGS:
        raise ValueError(
            f"pretrained=True: no weights are published for {hub_name or 'this network'}, only for "
            f"{', '.join(sorted(HUB_TAGS))}; a path of yours may stand in its place"
        )
    differing = {name: value for name, value in needs.items() if options.get(name) != value}
    if differing:
        wanted = ", ".join(f"{name}={value!r}" for name, value in differing.items())
        raise ValueError(
            f"pretrained=True: the authors published no weights of this network; timm's need {wanted}, as "
            f'like_timm("{hub_name}", pretrained=True) has it'
        )
