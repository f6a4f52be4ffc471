"""NFNet (nfnets/nfnet.py; Brock et al. 2021b, "High-Performance Large-Scale Image Recognition ...")."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..modules import WSConv2d
from ..modules.standardized import Prepared
from .blocks import NFBlock, activate, make_attention, plan_blocks, take_bias, takes_biases
from .network import STAGES, NormalizerFreeNet
from .pretrained import create

STRIDES = (1, 2, 2, 2)
STEM_WIDTHS = (16, 32, 64)
"""channels of the first three convolutions; the fourth has half of the first stage's"""
STEM_STRIDES = (2, 1, 1, 2)
WIDTH = (256, 512, 1536, 1536)
WIDTH_PLUS = (384, 768, 2048, 2048)


class Variant(NamedTuple):
    """What F0 to F7 differ in (nfnets/base.py, `nfnet_params`)."""

    depth: tuple[int, int, int, int]
    drop_rate: float
    train_size: int
    test_size: int


_REGIMES = (
    (0.2, 192, 256), (0.3, 224, 320), (0.4, 256, 352), (0.4, 320, 416),
    (0.5, 384, 512), (0.5, 416, 544), (0.5, 448, 576), (0.5, 480, 608),
)  # fmt: skip
VARIANTS = {f"f{k}": Variant((k + 1, 2 * k + 2, 6 * k + 6, 3 * k + 3), *regime) for k, regime in enumerate(_REGIMES)}


class NFNet(NormalizerFreeNet):
    """NFNet for (N, in_chans, H, W) images: four-convolution stem, grouped bottlenecks of two 3x3 convolutions, gates.

    Args:
        width: channels of each of the four stages.
        depth: blocks of each stage.
        num_classes, in_chans: of the classifier and the images; 0 classes for pooled features.
        group_width: channels per group of the 3x3 convolutions.
        bottleneck: channels of the 3x3 convolutions over those of the block, rounded down to whole groups.
        se_ratio: hidden width of squeeze and excite over channels.
        attention: "se", or "eca" for efficient channel attention (timm's `eca_nfnet_*`).
        alpha: scale of the residual branches.
        stochdepth_rate: of the last block; rises linearly from 0.
        rescale_kept: divide kept branches by the probability to keep them (timm's stochastic depth; not the authors').
        drop_rate: dropout before the classifier.
        activation: an elementwise name in `nfnets_kernels.functional.gamma`'s table.
        approximate: of gelu, "tanh" (the authors) or "none" (timm).
        stem_width: channels of the stem's last convolution; None for half of the first stage's.
        final_conv_mult: channels of the last convolution over those of the last stage.
        numerics: "deepmind" (the authors'), "timm_dm" (timm's `dm_nfnet_*`) or "timm" (`nfnet_*`, `eca_nfnet_*`); see
            `NormalizerFreeNet`.
        features_only: no head; `forward` gives the features of `feature_info`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown name, a rate outside [0, 1), widths or depths that are not four, or a stage narrower than
            a group.
    """

    haiku_names = ("NFNet", "nf_block")

    def __init__(
        self,
        width: Sequence[int],
        depth: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        group_width: int = 128,
        bottleneck: float = 0.5,
        se_ratio: float = 0.5,
        attention: str = "se",
        alpha: float = 0.2,
        stochdepth_rate: float = 0.0,
        rescale_kept: bool = False,
        drop_rate: float = 0.0,
        activation: str = "gelu",
        approximate: str = "tanh",
        stem_width: int | None = None,
        final_conv_mult: float = 2.0,
        numerics: str = "deepmind",
        features_only: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        if len(width) != STAGES or min(width) < 1:
            raise ValueError(f"width must hold the channels of {STAGES} stages, got {tuple(width)}")
        if group_width < 1 or int(min(width) * bottleneck) < group_width:
            raise ValueError(
                f"group_width must lie between 1 and the narrowest bottleneck {int(min(width) * bottleneck)}, "
                f"got {group_width}"
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
        channels = self._make_stem(in_chans, width[0] // 2 if stem_width is None else stem_width, **factory)
        blocks: list[NFBlock] = []
        for plan in plan_blocks(depth, STRIDES, alpha, stochdepth_rate):
            out_channels = width[plan.stage]
            groups = int(out_channels * bottleneck) // group_width
            blocks.append(
                NFBlock(
                    channels,
                    out_channels,
                    width=groups * group_width,
                    groups=groups,
                    extra_conv=True,
                    attention=make_attention(attention, out_channels, se_ratio, self.conventions, **factory),
                    stride=plan.stride,
                    beta=plan.beta,
                    stochdepth_rate=plan.stochdepth_rate,
                    **self.block_options(),
                    **factory,
                )
            )
            channels = out_channels
        self._finish(blocks, int(final_conv_mult * channels), **factory)

    def _make_stem(self, in_chans: int, stem_width: int, **factory: Any) -> int:
        """Makes the stem and returns its channels."""
        conv, scale = self.conventions.convolution, self.conventions.gamma_without_activation(self.gamma)
        for index, (out_channels, stride) in enumerate(zip((*STEM_WIDTHS, stem_width), STEM_STRIDES, strict=True)):
            setattr(self, f"stem_conv{index}", conv(in_chans, out_channels, 3, stride, gamma=scale, **factory))
            in_chans, scale = out_channels, self.gamma
        return in_chans

    def stem_convolutions(self) -> list[WSConv2d]:
        """stem_conv0 to stem_conv3."""
        return [getattr(self, f"stem_conv{index}") for index in range(len(STEM_STRIDES))]

    def forward_stem(self, x: Tensor, given: list[Prepared | None], tapped: bool) -> tuple[Tensor, Tensor]:
        """Four convolutions with activations between; the feature is the third one's output."""
        *inner, last = self.stem_convolutions()
        separate = takes_biases(x)
        for index, conv in enumerate(inner):
            seen = tapped and index == len(inner) - 1
            bias = take_bias(conv, given, index) if separate and not seen else None
            feature = conv(x, prepared=given[index])
            x = activate(feature, self.activation, self.approximate, inplace=not seen, bias=bias)
        return feature, last(x, prepared=given[-1])


def _variant(name: str, width: tuple[int, ...], options: dict[str, Any]) -> NFNet:
    variant = VARIANTS[name]
    options = {"drop_rate": variant.drop_rate, **options}
    hub_name = f"dm_nfnet_{name}" if width == WIDTH else None
    return create(partial(NFNet, width, variant.depth), options, hub_name=hub_name)


def nfnet_f0(**kwargs: Any) -> NFNet:
    """NFNet-F0; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f0", WIDTH, kwargs)


def nfnet_f1(**kwargs: Any) -> NFNet:
    """NFNet-F1; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f1", WIDTH, kwargs)


def nfnet_f2(**kwargs: Any) -> NFNet:
    """NFNet-F2; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f2", WIDTH, kwargs)


def nfnet_f3(**kwargs: Any) -> NFNet:
    """NFNet-F3; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f3", WIDTH, kwargs)


def nfnet_f4(**kwargs: Any) -> NFNet:
    """NFNet-F4; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f4", WIDTH, kwargs)


def nfnet_f5(**kwargs: Any) -> NFNet:
    """NFNet-F5; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f5", WIDTH, kwargs)


def nfnet_f6(**kwargs: Any) -> NFNet:
    """NFNet-F6; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f6", WIDTH, kwargs)


def nfnet_f7(**kwargs: Any) -> NFNet:
    """NFNet-F7; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f7", WIDTH, kwargs)


def nfnet_f0_plus(**kwargs: Any) -> NFNet:
    """NFNet-F0+; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f0", WIDTH_PLUS, kwargs)


def nfnet_f1_plus(**kwargs: Any) -> NFNet:
    """NFNet-F1+; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f1", WIDTH_PLUS, kwargs)


def nfnet_f2_plus(**kwargs: Any) -> NFNet:
    """NFNet-F2+; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f2", WIDTH_PLUS, kwargs)


def nfnet_f3_plus(**kwargs: Any) -> NFNet:
    """NFNet-F3+; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f3", WIDTH_PLUS, kwargs)


def nfnet_f4_plus(**kwargs: Any) -> NFNet:
    """NFNet-F4+; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f4", WIDTH_PLUS, kwargs)


def nfnet_f5_plus(**kwargs: Any) -> NFNet:
    """NFNet-F5+; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f5", WIDTH_PLUS, kwargs)


def nfnet_f6_plus(**kwargs: Any) -> NFNet:
    """NFNet-F6+; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f6", WIDTH_PLUS, kwargs)


def nfnet_f7_plus(**kwargs: Any) -> NFNet:
    """NFNet-F7+; keyword arguments as `NFNet` and `pretrained.create`, drop_rate from `VARIANTS`."""
    return _variant("f7", WIDTH_PLUS, kwargs)
