"""NF-RegNet (nfnets/nf_regnet.py; Brock et al. 2021a, appendix): EfficientNet-like inverted bottlenecks with groups."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..modules import WSConv2d
from ..modules.standardized import Prepared
from .blocks import NFBlock, make_attention, plan_blocks
from .network import STAGES, NormalizerFreeNet
from .pretrained import create

STRIDES = (2, 2, 2, 2)


class Variant(NamedTuple):
    """What B0 to B5 differ in (nfnets/base.py, `nf_regnet_params`)."""

    width: tuple[int, int, int, int]
    depth: tuple[int, int, int, int]
    drop_rate: float
    train_size: int
    test_size: int


VARIANTS = {
    "b0": Variant((48, 104, 208, 440), (1, 3, 6, 6), 0.2, 192, 224),
    "b1": Variant((48, 104, 208, 440), (2, 4, 7, 7), 0.2, 224, 256),
    "b2": Variant((56, 112, 232, 488), (2, 4, 8, 8), 0.3, 240, 272),
    "b3": Variant((56, 128, 248, 528), (2, 5, 9, 9), 0.3, 288, 320),
    "b4": Variant((64, 144, 288, 616), (2, 6, 11, 11), 0.4, 320, 384),
    "b5": Variant((80, 168, 336, 704), (3, 7, 14, 14), 0.4, 384, 456),
}


class NFRegNet(NormalizerFreeNet):
    """NF-RegNet for (N, in_chans, H, W) images: blocks expand from their input, with the gate inside the bottleneck.

    Args:
        width: channels of each of the four stages before `width_factor`.
        depth: blocks of each stage.
        num_classes, in_chans: of the classifier and the images; 0 classes for pooled features.
        width_factor: multiplies all widths.
        expansion: channels of the 3x3 convolution over those of the block's input; 1 in the very first block.
        group_width: channels per group of the 3x3 convolutions.
        se_ratio: hidden width of squeeze and excite over channels.
        alpha, stochdepth_rate, rescale_kept, drop_rate, activation, approximate: see `NormalizerFreeNet`.
        numerics: "deepmind" (the authors'), or "timm" (its `nf_regnet_b*`, with channels rounded to multiples of 8).
        features_only: no head; `forward` gives the features of `feature_info`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown name, a rate outside [0, 1), or widths or depths that are not four.
    """

    haiku_names = ("NF_RegNet", "nf_block")

    def __init__(
        self,
        width: Sequence[int],
        depth: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width_factor: float = 0.75,
        expansion: float = 2.25,
        group_width: int = 8,
        se_ratio: float = 0.5,
        alpha: float = 0.2,
        stochdepth_rate: float = 0.0,
        rescale_kept: bool = False,
        drop_rate: float = 0.0,
        activation: str = "silu",
        approximate: str = "tanh",
        numerics: str = "deepmind",
        features_only: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        if len(width) != STAGES or min(width) * width_factor < group_width:
            raise ValueError(
                f"width must hold the channels of {STAGES} stages, times width_factor {width_factor} at least "
                f"group_width {group_width}, got {tuple(width)}"
            )
        super().__init__(
            depth,
            num_classes=num_classes,
            alpha=alpha,
            stochdepth_rate=stochdepth_rate,
            rescale_kept=rescale_kept,
            drop_rate=drop_rate,
            activation=activation,
            approximate=approximate,
            numerics=numerics,
            features_only=features_only,
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        conventions = self.conventions
        widths = [conventions.round_channels(channels * width_factor) for channels in width]
        scale = conventions.gamma_without_activation(self.gamma)
        channels = widths[0]
        self.initial_conv = conventions.convolution(in_chans, channels, 3, 2, gamma=scale, **factory)
        blocks: list[NFBlock] = []
        for plan in plan_blocks(depth, STRIDES, alpha, stochdepth_rate):
            expanded = conventions.round_channels(channels * (expansion if blocks else 1.0))
            groups = expanded // group_width
            blocks.append(
                NFBlock(
                    channels,
                    widths[plan.stage],
                    width=groups * group_width,
                    groups=groups,
                    attention=make_attention("se", groups * group_width, se_ratio, conventions, **factory),
                    gate_inside=True,
                    stride=plan.stride,
                    beta=plan.beta,
                    stochdepth_rate=plan.stochdepth_rate,
                    **self.block_options(),
                    **factory,
                )
            )
            channels = widths[plan.stage]
        if conventions.channel_divisor == 1:
            final_channels = 1280 * channels // 440
        else:
            final_channels = conventions.round_channels(width_factor * (1280 * width[-1] // 440))
        self._finish(blocks, final_channels, **factory)

    def reset_parameters(self) -> None:
        """The authors' initialization: as `NormalizerFreeNet`, with a classifier of zeros."""
        super().reset_parameters()
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.weight)

    def stem_convolutions(self) -> list[WSConv2d]:
        """The 3x3 convolution."""
        return [self.initial_conv]

    def forward_stem(self, x: Tensor, given: list[Prepared | None], tapped: bool) -> tuple[Tensor, Tensor]:
        """The 3x3 convolution of stride 2, whose output is the feature too."""
        out = self.initial_conv(x, prepared=given[0])
        return out, out


def _variant(name: str, options: dict[str, Any]) -> NFRegNet:
    variant = VARIANTS[name]
    options = {"drop_rate": variant.drop_rate, **options}
    make = partial(NFRegNet, variant.width, variant.depth)
    return create(make, options, hub_name=f"nf_regnet_{name}", needs={"numerics": "timm"})


def nf_regnet_b0(**kwargs: Any) -> NFRegNet:
    """NF-RegNet-B0; keyword arguments as `NFRegNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("b0", kwargs)


def nf_regnet_b1(**kwargs: Any) -> NFRegNet:
    """NF-RegNet-B1; keyword arguments as `NFRegNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("b1", kwargs)


def nf_regnet_b2(**kwargs: Any) -> NFRegNet:
    """NF-RegNet-B2; keyword arguments as `NFRegNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("b2", kwargs)


def nf_regnet_b3(**kwargs: Any) -> NFRegNet:
    """NF-RegNet-B3; keyword arguments as `NFRegNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("b3", kwargs)


def nf_regnet_b4(**kwargs: Any) -> NFRegNet:
    """NF-RegNet-B4; keyword arguments as `NFRegNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("b4", kwargs)


def nf_regnet_b5(**kwargs: Any) -> NFRegNet:
    """NF-RegNet-B5; keyword arguments as `NFRegNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("b5", kwargs)
