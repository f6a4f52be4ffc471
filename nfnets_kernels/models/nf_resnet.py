"""NF-ResNet in the authors' form (nfnets/nf_resnet.py; Brock et al. 2021a, "Characterizing signal propagation").

Pre-activation bottleneck blocks `h + alpha * skip_gain * f(beta * act(h))` without normalization. The scalings cost no
pass over activations: gamma of the activation and beta = 1 / expected std of the block's input are folded into the
standardized weight of the convolution that follows, alpha and skip_gain into the last convolution of the branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, ops
from ..modules import SqueezeExcite, WSConv2d
from ..modules.standardized import Prepared, Request, can_standardize_together, standardize_together
from ..ops.library import check_choice, check_finite

DEPTHS = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
}
STAGE_WIDTHS = (64, 128, 256, 512)
SHORTCUTS = ("conv", "avg_pool")


def activate(x: Tensor, name: str, inplace: bool = False) -> Tensor:
    """The unscaled activation; a convolution's output may be overwritten, since no convolution needs it again."""
    if name == "relu":
        return F.relu(x, inplace)
    return functional.scaled_activation(x, name, gamma=1.0, approximate="tanh")


def max_pool_same(x: Tensor) -> Tensor:
    """3x3/2 max pooling with TensorFlow's SAME padding: an even size pads one row after, an odd one on both sides."""
    height, width = (size % 2 for size in x.shape[-2:])
    return F.max_pool2d(x, 3, 2, padding=(height, width), ceil_mode=True)


class NFResNetBlock(nn.Module):
    """One residual block; takes and returns the residual stream h and its activation a = act(h).

    Args:
        in_channels, out_channels: of the block; the bottleneck has out_channels / 4.
        stride: of the 3x3 convolution and the shortcut.
        alpha: scale of the residual branch.
        beta: 1 / expected standard deviation of h.
        activation: name in `nfnets_kernels.functional.gamma`'s table.
        use_se, se_ratio: squeeze and excite on the branch.
        stochdepth_rate: probability to drop the branch of a sample in training; no rescaling, as the authors.
        shortcut: "conv", a strided 1x1 convolution, or "avg_pool", 2x2 average pooling before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        alpha: float,
        beta: float,
        activation: str,
        use_se: bool,
        se_ratio: float,
        stochdepth_rate: float,
        shortcut: str,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        gamma = functional.gamma(activation)
        width = out_channels // 4
        self.alpha = alpha
        self.activation = activation
        self.stochdepth_rate = stochdepth_rate
        self.conv0 = WSConv2d(in_channels, width, 1, gamma=gamma * beta, **factory)
        self.conv1 = WSConv2d(width, width, 3, stride, padding="SAME", gamma=gamma, **factory)
        self.conv2 = WSConv2d(width, out_channels, 1, gamma=gamma, **factory)
        self.se = SqueezeExcite(out_channels, se_ratio, **factory) if use_se else None
        self.skip_gain = nn.Parameter(torch.zeros((), **factory))
        self.pool = None
        self.conv_shortcut = None
        if stride > 1 or in_channels != out_channels:
            pools = stride > 1 and shortcut == "avg_pool"
            self.pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if pools else None
            shortcut_stride = 1 if pools else stride
            self.conv_shortcut = WSConv2d(in_channels, out_channels, 1, shortcut_stride, gamma=gamma * beta, **factory)

    def requests(self) -> list[Request]:
        """The weights that `forward` takes prepared; alpha and skip_gain are folded where no gate stands between."""
        folded = Request(self.conv2, self.skip_gain, self.alpha) if self.se is None else Request(self.conv2)
        shortcut = [] if self.conv_shortcut is None else [Request(self.conv_shortcut)]
        return [Request(self.conv0), Request(self.conv1), folded, *shortcut]

    def _bottleneck(self, a: Tensor, conv0: Prepared | None = None, conv1: Prepared | None = None) -> Tensor:
        out = activate(self.conv0(a, prepared=conv0), self.activation, inplace=True)
        return activate(self.conv1(out, prepared=conv1), self.activation, inplace=True)

    def branch(self, a: Tensor) -> Tensor:
        """The residual branch before stochastic depth, skip_gain and alpha, as the authors' signal metrics see it."""
        f = self.conv2(self._bottleneck(a))
        return f if self.se is None else 2.0 * torch.sigmoid(self.se(f))[:, :, None, None] * f

    def _shortcut(self, h: Tensor, a: Tensor, prepared: Prepared | None) -> Tensor:
        if self.conv_shortcut is None:
            return h
        return self.conv_shortcut(a if self.pool is None else self.pool(a), prepared=prepared)

    def _keep(self, a: Tensor) -> Tensor | None:
        if not self.training or self.stochdepth_rate == 0.0:
            return None
        return (torch.rand(a.shape[0], device=a.device) >= self.stochdepth_rate).to(a.dtype)

    def forward(self, h: Tensor, a: Tensor, prepared: Sequence[Prepared] = ()) -> tuple[Tensor, Tensor]:
        """h, a: (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).

        `prepared` holds the standardized weights of `requests`; without them each convolution standardizes its own.
        """
        conv0, conv1, conv2, conv_shortcut = [*prepared, None, None, None, None][:4]
        shortcut, keep = self._shortcut(h, a, conv_shortcut), self._keep(a)
        out = self._bottleneck(a, conv0, conv1)
        if self.se is not None:
            f = self.conv2(out, prepared=conv2)
            factors = {"skip_gain": self.skip_gain, "se": self.se(f), "keep": keep, "alpha": self.alpha}
            return functional.residual(f, shortcut, activation=self.activation, approximate="tanh", **factors)
        f = self.conv2(out, skip_gain=self.skip_gain, alpha=self.alpha, prepared=conv2)
        if keep is not None:
            return functional.residual(f, shortcut, keep=keep, activation=self.activation, approximate="tanh")
        # With every factor folded away, adding into the convolution's own output saves a tensor of h's size: the
        # whole step at batch 8 on two cores takes 1.5 % less than with the out-of-place fused op.
        h = f.add_(shortcut)
        return h, activate(h, self.activation)

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return f"alpha={self.alpha}, activation={self.activation!r}, stochdepth_rate={self.stochdepth_rate}"


class NFResNet(nn.Module):
    """Normalizer-free pre-activation ResNet for (N, in_chans, H, W) images.

    Args:
        depth: blocks per stage.
        width: multiplies the stage widths 64, 128, 256, 512; 4 is ResNet-50's.
        num_classes, in_chans: of the classifier and the images.
        alpha: scale of the residual branches.
        use_se, se_ratio: squeeze and excite in every block.
        stochdepth_rate: of the last block; rises linearly from 0.
        drop_rate: dropout before the classifier.
        activation: an elementwise name in `nfnets_kernels.functional.gamma`'s table; "gelu" is the authors' tanh form.
        shortcut: "conv", a strided 1x1 convolution as the authors', or "avg_pool", 2x2 average pooling before it.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation or shortcut, or a rate outside [0, 1).
    """

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
        stochdepth_rate: float = 0.0,
        drop_rate: float = 0.0,
        activation: str = "relu",
        shortcut: str = "conv",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice("shortcut", shortcut, SHORTCUTS)
        for name, rate in (("stochdepth_rate", stochdepth_rate), ("drop_rate", drop_rate)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {rate}")
        if len(depth) != len(STAGE_WIDTHS):
            raise ValueError(f"depth must hold the blocks of {len(STAGE_WIDTHS)} stages, got {tuple(depth)}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        check_finite("alpha", alpha)
        check_choice("activation", activation, ops.residual.ACTIVATIONS)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.depth = tuple(depth)
        self.activation = activation
        self.gamma = functional.gamma(activation)
        self.drop_rate = drop_rate
        channels = 16 * width
        self.initial_conv = WSConv2d(in_chans, channels, 7, 2, padding="SAME", **factory)
        blocks: list[nn.Module] = []
        expected_std = 1.0
        for stage, (stage_depth, stage_width) in enumerate(zip(depth, STAGE_WIDTHS, strict=True)):
            for index in range(stage_depth):
                blocks.append(
                    NFResNetBlock(
                        channels,
                        stage_width * width,
                        stride=2 if stage > 0 and index == 0 else 1,
                        alpha=alpha,
                        beta=1.0 / expected_std,
                        activation=activation,
                        use_se=use_se,
                        se_ratio=se_ratio,
                        stochdepth_rate=stochdepth_rate * len(blocks) / sum(depth),
                        shortcut=shortcut,
                        **factory,
                    )
                )
                channels = stage_width * width
                # A projection resets the variance to 1; every block then adds alpha^2.
                expected_std = ((1.0 if index == 0 else expected_std**2) + alpha**2) ** 0.5
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(channels, num_classes, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialization: fan-in normal convolutions, N(0, 0.01^2) classifier, zero biases, skip gains."""
        for module in self.modules():
            if isinstance(module, WSConv2d):
                module.reset_parameters()
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, NFResNetBlock):
                nn.init.zeros_(module.skip_gain)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5  # haiku's default
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def _stages(self) -> list[list[NFResNetBlock]]:
        blocks: Iterator[Any] = iter(self.blocks)
        return [[next(blocks) for _ in range(count)] for count in self.depth]

    def _prepare(self, stage: list[NFResNetBlock], a: Tensor) -> list[list[Prepared]]:
        """The standardized weights of each block of a stage in one pass, unless its layers have them kept.

        Stage by stage rather than for the model: under DistributedDataParallel the gradients of the last stages can
        then be reduced while the first ones are still being computed.
        """
        if stage[0].conv0.keeps_standardized():
            return [[] for _ in stage]
        by_block = [block.requests() for block in stage]
        requests = [request for block in by_block for request in block]
        if not can_standardize_together([request.layer for request in requests]):
            return [[] for _ in stage]
        prepared = iter(standardize_together(requests, a))
        return [[next(prepared) for _ in block] for block in by_block]

    def forward_pool(self, x: Tensor) -> Tensor:
        """Images to pooled features (N, channels): the average of the last activation, gamma included."""
        h = max_pool_same(self.initial_conv(x))
        a = activate(h, self.activation)
        for stage in self._stages():
            for block, prepared in zip(stage, self._prepare(stage, a), strict=True):
                h, a = block(h, a, prepared)
        return a.mean(dim=(2, 3)) * self.gamma

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.fc(F.dropout(self.forward_pool(x), self.drop_rate, self.training))


def nf_resnet50(**kwargs: Any) -> NFResNet:
    """NF-ResNet-50; keyword arguments as `NFResNet`."""
    return NFResNet(DEPTHS[50], **kwargs)


def nf_resnet101(**kwargs: Any) -> NFResNet:
    """NF-ResNet-101; keyword arguments as `NFResNet`."""
    return NFResNet(DEPTHS[101], **kwargs)


def nf_resnet152(**kwargs: Any) -> NFResNet:
    """NF-ResNet-152; keyword arguments as `NFResNet`."""
    return NFResNet(DEPTHS[152], **kwargs)


def nf_resnet200(**kwargs: Any) -> NFResNet:
    """NF-ResNet-200; keyword arguments as `NFResNet`."""
    return NFResNet(DEPTHS[200], **kwargs)


def nf_resnet288(**kwargs: Any) -> NFResNet:
    """NF-ResNet-288; keyword arguments as `NFResNet`."""
    return NFResNet(DEPTHS[288], **kwargs)
