"""What all NF networks share: stages of blocks, the head, features, and standardizing a stage's weights together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional, ops
from ..modules import WSConv2d
from ..modules.batched import prepare_together
from ..modules.standardized import Prepared, Request
from ..ops.library import check_choice, check_finite
from .blocks import NFBlock, activate, take_bias, takes_biases
from .numerics import numerics_of

STAGES = 4


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError unless rate is a probability below 1."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {rate}")


class NormalizerFreeNet(nn.Module):
    """Stem, stages of `NFBlock`s, an optional last convolution, average pooling, dropout, classifier.

    A subclass makes its stem, calls `_finish` with its blocks, and has `forward_stem` and `stem_convolutions`.

    Args:
        depth: blocks of each of the four stages.
        num_classes: of the classifier; 0 for none: the network then gives pooled features (N, channels).
        alpha: scale of the residual branches.
        stochdepth_rate: of the last block; rises linearly from 0.
        rescale_kept: divide kept branches by the probability to keep them (timm's stochastic depth; not the authors').
        drop_rate: dropout before the classifier.
        activation: an elementwise name in `nfnets_kernels.functional.gamma`'s table.
        approximate: of gelu, "tanh" (the authors) or "none" (timm).
        numerics: "deepmind" (the authors'), "timm_dm" (timm's `dm_nfnet_*`) or "timm" (its other NF networks): eps and
            padding of the convolutions, and where gamma and skip gain stand.
        features_only: no head; `forward` gives the features of `feature_info`.

    Raises:
        ValueError: an unknown name, a rate outside [0, 1), a depth that is not four positive numbers, an alpha that is
            not finite.
    """

    haiku_names: tuple[str, str]
    """haiku's names of the network and of its blocks, in the authors' checkpoints"""
    standardizes_by_stage = True
    blocks: nn.ModuleList
    final_conv: WSConv2d | None
    feature_info: list[dict[str, Any]]
    """channels ("num_chs") and stride ("reduction") of each feature of `forward_intermediates`, as timm names them"""

    def __init__(
        self,
        depth: Sequence[int],
        *,
        num_classes: int,
        alpha: float,
        stochdepth_rate: float,
        rescale_kept: bool,
        drop_rate: float,
        activation: str,
        approximate: str,
        numerics: str,
        features_only: bool,
    ) -> None:
        super().__init__()
        check_rate("stochdepth_rate", stochdepth_rate)
        check_rate("drop_rate", drop_rate)
        if len(depth) != STAGES or min(depth) < 1:
            raise ValueError(f"depth must hold the blocks of {STAGES} stages, got {tuple(depth)}")
        check_finite("alpha", alpha)
        check_choice("activation", activation, ops.residual.ACTIVATIONS)
        check_choice("approximate", approximate, ops.scaled_activation.APPROXIMATIONS)
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        self.depth = tuple(depth)
        self.num_classes = num_classes
        self.alpha = alpha
        self.stochdepth_rate = stochdepth_rate
        self.rescale_kept = rescale_kept
        self.drop_rate = drop_rate
        self.activation = activation
        self.approximate = approximate
        self.numerics = numerics
        self.conventions = numerics_of(numerics)
        self.gamma = functional.gamma(activation)
        self.features_only = features_only
        self.grad_checkpointing = False

    def block_options(self) -> dict[str, Any]:
        """What all blocks of the network have in common."""
        names = ("alpha", "activation", "approximate", "rescale_kept")
        return {**{name: getattr(self, name) for name in names}, "numerics": self.conventions}

    def _finish(self, blocks: list[NFBlock], final_channels: int | None, **factory: Any) -> None:
        """Takes the blocks, and makes the last convolution (of so many channels, None for none) and the classifier."""
        self.blocks = nn.ModuleList(blocks)
        channels = blocks[-1].conv2.out_channels
        self.final_conv = None
        if final_channels is not None:
            scale = self.conventions.gamma_without_activation(self.gamma)
            self.final_conv = self.conventions.convolution(channels, final_channels, 1, gamma=scale, **factory)
            channels = final_channels
        self.num_features = channels
        headless = self.features_only or self.num_classes == 0
        self.fc = nn.Identity() if headless else nn.Linear(channels, self.num_classes, **factory)
        self.feature_info = self._describe_features()
        self.reset_parameters()

    def _describe_features(self) -> list[dict[str, Any]]:
        stem = self.stem_convolutions()
        features = [{"num_chs": stem[-2 if len(stem) > 1 else -1].out_channels, "reduction": 2}]
        reduction = 4 if self.stages()[0][0].conv1.stride[0] == 1 else 2
        for blocks in self.stages():
            reduction *= blocks[0].conv1.stride[0]
            features.append({"num_chs": blocks[-1].conv2.out_channels, "reduction": reduction})
        features[-1]["num_chs"] = self.num_features
        return features

    def reset_parameters(self) -> None:
        """The authors' initialization: fan-in normal convolutions, N(0, 0.01^2) classifier, zero biases, skip gains."""
        for module in self.modules():
            if isinstance(module, WSConv2d):
                module.reset_parameters()
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5  # haiku's default
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(module.bias)
        for stage in self.stages():
            for block in stage:
                block.reset_parameters()
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=0.01)

    def stem_convolutions(self) -> list[WSConv2d]:
        """The convolutions before the first block, in order."""
        raise NotImplementedError

    def forward_stem(self, x: Tensor, given: list[Prepared | None], tapped: bool) -> tuple[Tensor, Tensor]:
        """The stem's feature of stride 2, which is left as it is only where it is `tapped`, and the stem's output."""
        raise NotImplementedError

    def stages(self) -> list[list[NFBlock]]:
        """The blocks stage by stage."""
        blocks: Iterator[Any] = iter(self.blocks)
        return [[next(blocks) for _ in range(count)] for count in self.depth]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside blocks for the backward pass, but compute them again (Chen et al. 2016)."""
        self.grad_checkpointing = enable

    def _run_block(
        self, block: NFBlock, h: Tensor, a: Tensor, prepared: Sequence[Prepared | None]
    ) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, a, prepared, use_reentrant=False)
        return block(h, a, prepared)

    def _forward(self, x: Tensor, features: list[Tensor] | None = None) -> Tensor:
        """Images to the last activation; the features of every stride are appended to `features` on the way.

        Weights are standardized stage by stage rather than for the model: under DistributedDataParallel the gradients
        of the last stages can then be reduced while the first ones are still being computed. Where a
        `BatchedWeightStandardization` owns the model, the layers hold theirs already.
        """
        tapped, separate = features is not None, takes_biases(x)
        stem, stages = self.stem_convolutions(), self.stages()
        first = stages[0][0]
        given = prepare_together([Request(conv) for conv in stem], x, kept=separate)
        # Behind a projection nothing but a of the stem's output is used, unless a hook looks at it.
        unseen = not tapped and first.conv_shortcut is not None and not first._forward_pre_hooks
        bias = take_bias(stem[-1], given, -1) if separate and unseen else None
        feature, h = self.forward_stem(x, given, tapped)
        if features is not None:
            features.append(feature)
        a = activate(h, self.activation, self.approximate, inplace=unseen, bias=bias)
        for stage, blocks in enumerate(stages, start=1):
            by_block = [block.requests() for block in blocks]
            last = [Request(self.final_conv)] if self.final_conv is not None and stage == STAGES else []
            given = prepare_together([request for block in by_block for request in block] + last, a, kept=separate)
            prepared = iter(given)
            for block, requests in zip(blocks, by_block, strict=True):
                h, a = self._run_block(block, h, a, [next(prepared) for _ in requests])
            if last:
                bias = take_bias(last[0].layer, given, -1) if separate and not tapped else None
                h = last[0].layer(h, prepared=given[-1])
                a = activate(h, self.activation, self.approximate, inplace=not tapped, bias=bias)
            if features is not None:
                features.append(h)
        return a

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Images to features, as timm taps them: in the stem at stride 2, then the residual stream after each stage.

        The last one is taken after the last convolution where there is one. None is activated.
        """
        features: list[Tensor] = []
        self._forward(x, features)
        return features

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to the last activation (N, num_features, h, w), without its gamma."""
        return self._forward(x)

    def forward_pool(self, x: Tensor) -> Tensor:
        """Images to pooled features (N, num_features): the average of the last activation, gamma included."""
        return self.forward_features(x).mean(dim=(2, 3)) * self.conventions.gamma_of_features(self.gamma)

    def forward(self, x: Tensor) -> Any:
        """Images (N, in_chans, H, W) to logits (N, num_classes), or to a list of features where features_only."""
        if self.features_only:
            return self.forward_intermediates(x)
        return self.fc(F.dropout(self.forward_pool(x), self.drop_rate, self.training))
