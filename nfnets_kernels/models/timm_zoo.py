"""timm's NF networks by name (the configurations of timm/models/nfnet.py), without timm."""

from __future__ import annotations

from functools import partial
from typing import Any

from . import nf_regnet, nf_resnet, nfnet
from .network import NormalizerFreeNet
from .nf_regnet import NFRegNet
from .nf_resnet import NFResNet
from .nfnet import NFNet
from .pretrained import create

_STEM_WIDTH = 128  # of all timm's NFNets, whatever their first stage
_LIGHT: dict[str, Any] = {"bottleneck": 0.25, "group_width": 64, "activation": "silu"}
_GATES: dict[str, dict[str, Any]] = {
    "": {},
    "se": {"use_se": True, "attention": "se", "se_ratio": 1 / 16},
    "eca": {"use_se": True, "attention": "eca"},
}

Maker = partial[Any]
"""of a network; its last positional argument is the depth"""


def _nfnet(depth: tuple[int, ...], width: tuple[int, ...] = nfnet.WIDTH, **options: Any) -> Maker:
    return partial(NFNet, width, depth, **{"numerics": "timm", "stem_width": _STEM_WIDTH, **options})


def _configurations() -> dict[str, Maker]:
    """Name to what makes the network."""
    makers: dict[str, Maker] = {}
    for variant, (depth, *_) in nfnet.VARIANTS.items():
        makers[f"nfnet_{variant}"] = _nfnet(depth)
        if variant != "f7":
            makers[f"dm_nfnet_{variant}"] = _nfnet(depth, numerics="timm_dm")
    makers["nfnet_l0"] = _nfnet((1, 2, 6, 3), final_conv_mult=1.5, se_ratio=0.25, **_LIGHT)
    for size, final_conv_mult in enumerate((1.5, 2.0, 2.0, 2.0)):
        depth = nfnet.VARIANTS[f"f{size}"].depth
        makers[f"eca_nfnet_l{size}"] = _nfnet(depth, final_conv_mult=final_conv_mult, attention="eca", **_LIGHT)
    for variant, (width, depth, *_) in nf_regnet.VARIANTS.items():
        makers[f"nf_regnet_{variant}"] = partial(NFRegNet, width, depth, numerics="timm")
    for gate, options in _GATES.items():
        for size in (26, 50, 101):
            makers[f"nf_{gate}resnet{size}"] = partial(
                NFResNet, nf_resnet.DEPTHS[size], numerics="timm", shortcut="avg_pool", **options
            )
    small = {**_LIGHT, "group_width": 8, "final_conv_mult": 1.5, "se_ratio": 0.25}
    makers["test_nfnet"] = _nfnet((1, 1, 1, 1), (32, 64, 96, 128), **small)
    return makers


CONFIGURATIONS = _configurations()


def like_timm(name: str, *, drop_path_rate: float = 0.0, **kwargs: Any) -> NormalizerFreeNet:
    """A network with the architecture and the numerics of timm's of that name, whose weights `load_timm` takes.

    Args:
        name: as timm's: dm_nfnet_f0 to f6, nfnet_f0 to f7, nfnet_l0, eca_nfnet_l0 to l3, nf_resnet26, 50 and 101,
            `nf_seresnet*` and `nf_ecaresnet*` of the same depths, nf_regnet_b0 to b5, test_nfnet.
        drop_path_rate: timm's stochastic depth, the rate of the last block; instead of stochdepth_rate, of which the
            last block gets (n - 1) / n.
        kwargs: of the network's class, and `pretrained` and `cache_dir` as `nfnets_kernels.models.pretrained.create`
            takes them.

    Raises:
        ValueError: another name, or what the class and `create` refuse.
        ImportError, OSError: see `nfnets_kernels.models.pretrained.create`.
    """
    if name not in CONFIGURATIONS:
        raise ValueError(f"name must be one of {', '.join(sorted(CONFIGURATIONS))}, got {name!r}")
    options = {"approximate": "none", "rescale_kept": True, **kwargs}
    if drop_path_rate:
        if "stochdepth_rate" in options:
            raise ValueError("give drop_path_rate or stochdepth_rate, not both")
        blocks = sum(CONFIGURATIONS[name].args[-1])
        options["stochdepth_rate"] = drop_path_rate * blocks / (blocks - 1)
    return create(CONFIGURATIONS[name], options, hub_name=name)
