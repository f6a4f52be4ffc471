"""NF-ResNet in the authors' form (nfnets/nf_resnet.py; Brock et al. 2021a, "Characterizing signal propagation")."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..modules import WSConv2d
from ..modules.standardized import Prepared
from ..ops.library import check_choice
from .blocks import NFBlock, make_attention, plan_blocks
from .network import NormalizerFreeNet
from .numerics import numerics_of
from .pretrained import create

DEPTHS = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
}
STAGE_WIDTHS = (64, 128, 256, 512)
STRIDES = (1, 2, 2, 2)
SHORTCUTS = ("conv", "avg_pool")


def max_pool_same(x: Tensor) -> Tensor:
    """3x3/2 max pooling with TensorFlow's SAME padding: an even size pads one row after, an odd one on both sides."""
    height, width = (size % 2 for size in x.shape[-2:])
    return F.max_pool2d(x, 3, 2, padding=(height, width), ceil_mode=True)


class NFResNetBlock(NFBlock):
    """`NFBlock` with a bottleneck of out_channels / 4 and no groups.

    Args:
        in_channels, out_channels, stride, alpha, beta, activation, approximate, stochdepth_rate, rescale_kept, device,
            dtype: as `NFBlock`.
        use_se, se_ratio, attention: see `NFResNet`.
        shortcut: "conv", a strided 1x1 convolution, or "avg_pool", 2x2 average pooling before it.
        numerics: see `NFResNet`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        use_se: bool,
        se_ratio: float,
        shortcut: str,
        attention: str = "se",
        approximate: str = "tanh",
        numerics: str = "deepmind",
        device=None,
        dtype=None,
        **options: Any,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        conventions = numerics_of(numerics)
        super().__init__(
            in_channels,
            out_channels,
            width=conventions.round_channels(out_channels / 4),
            approximate=approximate,
            numerics=conventions,
            attention=make_attention(attention, out_channels, se_ratio, conventions, **factory) if use_se else None,
            pool_shortcut=shortcut == "avg_pool",
            **factory,
            **options,
        )


class NFResNet(NormalizerFreeNet):
    """Normalizer-free pre-activation ResNet for (N, in_chans, H, W) images.

    Args:
        depth: blocks per stage.
        width: multiplies the stage widths 64, 128, 256, 512; 4 is ResNet-50's.
        num_classes, in_chans: of the classifier and the images; 0 classes for pooled features.
        alpha: scale of the residual branches.
        use_se, se_ratio: squeeze and excite in every block.
        attention: what use_se stands for: "se", or "eca" for efficient channel attention.
        stochdepth_rate: of the last block; rises linearly from 0.
        rescale_kept: divide kept branches by the probability to keep them (timm's stochastic depth; not the authors').
        drop_rate: dropout before the classifier.
        activation: an elementwise name in `nfnets_kernels.functional.gamma`'s table.
        approximate: of gelu, "tanh" (the authors) or "none" (timm).
        shortcut: "conv", a strided 1x1 convolution as the authors', or "avg_pool", 2x2 average pooling before it.
        numerics: "deepmind" (the authors'), or "timm" (its `nf_resnet*`); see `NormalizerFreeNet`.
        features_only: no head; `forward` gives the features of `feature_info`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown name, a rate outside [0, 1), or a size that is not positive.
    """

    haiku_names = ("NF_ResNet", "nf_res_block")

    def __init__(
        self,
        depth: Sequence[int] = DEPTHS[50],
        width: int = 4,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        alpha: float = 0.2,
        use_se: bool = False,
        se_ratio: float = 0.25,
        attention: str = "se",
        stochdepth_rate: float = 0.0,
        rescale_kept: bool = False,
        drop_rate: float = 0.0,
        activation: str = "relu",
        approximate: str = "tanh",
        shortcut: str = "conv",
        numerics: str = "deepmind",
        features_only: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        check_choice("shortcut", shortcut, SHORTCUTS)
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
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
        scale = self.conventions.gamma_without_activation(self.gamma)
        channels = 16 * width
        self.initial_conv = self.conventions.convolution(in_chans, channels, 7, 2, gamma=scale, **factory)
        blocks: list[NFBlock] = []
        for plan in plan_blocks(depth, STRIDES, alpha, stochdepth_rate):
            out_channels = STAGE_WIDTHS[plan.stage] * width
            blocks.append(
                NFResNetBlock(
                    channels,
                    out_channels,
                    use_se=use_se,
                    se_ratio=se_ratio,
                    attention=attention,
                    shortcut=shortcut,
                    stride=plan.stride,
                    beta=plan.beta,
                    stochdepth_rate=plan.stochdepth_rate,
                    **{**self.block_options(), "numerics": numerics},
                    **factory,
                )
            )
            channels = out_channels
        self._finish(blocks, None, **factory)

    def stem_convolutions(self) -> list[WSConv2d]:
        """The 7x7 convolution."""
        return [self.initial_conv]

    def forward_stem(self, x: Tensor, given: list[Prepared | None], tapped: bool) -> tuple[Tensor, Tensor]:
        """The 7x7 convolution (stride 2) and the max pooling after it."""
        feature = self.initial_conv(x, prepared=given[0])
        if self.conventions.same_padding:
            return feature, max_pool_same(feature)
        return feature, F.max_pool2d(feature, 3, 2, padding=1)


def _variant(size: int, options: dict[str, Any]) -> NFResNet:
    needs = {"numerics": "timm", "shortcut": "avg_pool"}
    return create(partial(NFResNet, DEPTHS[size]), options, hub_name=f"nf_resnet{size}", needs=needs)


def nf_resnet26(**kwargs: Any) -> NFResNet:
    """NF-ResNet-26; keyword arguments as `NFResNet` and `pretrained.create`."""
    return _variant(26, kwargs)


def nf_resnet50(**kwargs: Any) -> NFResNet:
    """NF-ResNet-50; keyword arguments as `NFResNet` and `pretrained.create`."""
    return _variant(50, kwargs)


def nf_resnet101(**kwargs: Any) -> NFResNet:
    """NF-ResNet-101; keyword arguments as `NFResNet` and `pretrained.create`."""
    return _variant(101, kwargs)


def nf_resnet152(**kwargs: Any) -> NFResNet:
    """NF-ResNet-152; keyword arguments as `NFResNet` and `pretrained.create`."""
    return _variant(152, kwargs)


def nf_resnet200(**kwargs: Any) -> NFResNet:
    """NF-ResNet-200; keyword arguments as `NFResNet` and `pretrained.create`."""
    return _variant(200, kwargs)


def nf_resnet288(**kwargs: Any) -> NFResNet:
    """NF-ResNet-288; keyword arguments as `NFResNet` and `pretrained.create`."""
    return _variant(288, kwargs)
