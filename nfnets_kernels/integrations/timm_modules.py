"""timm's NF layers and blocks with this package's arithmetic: subclasses that add no parameter, buffer or submodule.

An instance of timm's class becomes one of these by assignment to its `__class__`, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath, EcaModule, ScaledStdConv2d, ScaledStdConv2dSame
from timm.models.nfnet import GammaAct, NormFreeBlock
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..models.blocks import ResidualBlock, activate, takes_biases
from ..modules.batched import prepare_together
from ..modules.conv import _WSConv
from ..modules.standardized import Prepared, Request, Standardized


class _Conv(_WSConv):
    """timm's `scale` is gamma / sqrt(fan-in); the op divides by sqrt(fan-in) itself."""

    scale: float
    factor: float = 1.0
    """of what happens to the input before, such as gamma and beta of the activation"""
    eps_form = "add"

    @property
    def gamma(self) -> float:  # type: ignore[override]
        """Scale of the standardized weight."""
        return self.factor * self.scale * math.sqrt(self.weight.shape[1:].numel())


class AcceleratedConv(_Conv, ScaledStdConv2d):  # type: ignore[misc]
    """timm's ScaledStdConv2d."""

    _same = False


class AcceleratedConvSame(_Conv, ScaledStdConv2dSame):  # type: ignore[misc]
    """timm's ScaledStdConv2dSame."""

    same_pad: bool

    @property
    def _same(self) -> bool:  # type: ignore[override]
        return self.same_pad


class AcceleratedGammaAct(GammaAct):
    """timm's GammaAct in one pass."""

    activation: str
    approximate: str

    def forward(self, x: Tensor) -> Tensor:
        """`gamma * f(x)`."""
        return functional.scaled_activation(x, self.activation, self.gamma, approximate=self.approximate)


def _linear(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def attention_logits(attention: Any, x: Tensor) -> Tensor:
    """(N, C, H, W) to the logits (N, C) of timm's SEModule or EcaModule."""
    pooled = x.mean((2, 3))
    if isinstance(attention, EcaModule):
        logits = attention.conv(pooled[:, None])
        return (logits if attention.conv2 is None else attention.conv2(attention.act(logits)))[:, 0]
    # Of one pixel each, timm's 1x1 convolutions are linear layers, in which oneDNN is twice as fast.
    hidden = attention.act(attention.bn(_linear(attention.fc1, pooled)[:, :, None, None]))
    return _linear(attention.fc2, hidden[:, :, 0, 0])


class AcceleratedBlock(ResidualBlock, NormFreeBlock):
    """timm's NormFreeBlock; gamma and beta are in its convolutions' `factor`, which its activations leave out."""

    activation: str
    approximate: str

    @property
    def stochdepth_rate(self) -> float:  # type: ignore[override]
        """Of DropPath."""
        return self.drop_path.drop_prob if isinstance(self.drop_path, DropPath) else 0.0

    @property
    def gate_gain(self) -> float:  # type: ignore[override]
        """timm's name."""
        return self.attn_gain

    @property
    def skip_gain(self) -> Tensor | None:  # type: ignore[override]
        """timm's name."""
        return self.skipinit_gain

    @property
    def pool(self) -> nn.Module:  # type: ignore[override]
        """Of the shortcut."""
        return self.downsample.pool

    @property
    def conv_shortcut(self) -> Any:
        """Of the shortcut."""
        return None if self.downsample is None else self.downsample.conv

    def convolutions(self) -> list[Any]:
        """conv1, conv2, conv2b where there is one, conv3."""
        extra = [] if self.conv2b is None else [self.conv2b]
        return [self.conv1, self.conv2, *extra, self.conv3]

    def has_inner_gate(self) -> bool:
        """Whether there is an `attn`."""
        return self.attn is not None

    def has_outer_gate(self) -> bool:
        """Whether there is an `attn_last`."""
        return self.attn_last is not None

    def inner_gate(self, f: Tensor) -> Tensor | None:
        """Logits of `attn`."""
        return None if self.attn is None else attention_logits(self.attn, f)

    def outer_gate(self, f: Tensor) -> Tensor | None:
        """Logits of `attn_last`."""
        return None if self.attn_last is None else attention_logits(self.attn_last, f)

    def _keep(self, a: Tensor) -> Tensor | None:
        """timm's `drop_path`, random number by random number."""
        if not self.training or self.stochdepth_rate == 0.0:
            return None
        kept = 1.0 - self.stochdepth_rate
        keep = a.new_empty(a.shape[0]).bernoulli_(kept)
        return keep.div_(kept) if kept > 0.0 and self.drop_path.scale_by_keep else keep

    def forward(self, h: Tensor, a: Tensor | None = None, prepared: Sequence[Prepared] = ()) -> Any:
        """timm's forward pass, h to h; with a = act(h) to (h, a), as inside an `AcceleratedStage`."""
        if a is not None:
            return super().forward(h, a, prepared)
        h, _ = super().forward(h, activate(h, self.activation, self.approximate), prepared)
        return h


class AcceleratedStem(nn.Sequential):
    """A stem whose convolutions are standardized together."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to the output of the last module."""
        convolutions = [module for module in self if isinstance(module, Standardized)]
        prepared = iter(prepare_together([Request(conv) for conv in convolutions], x))
        for module in self:
            x = module(x, prepared=next(prepared)) if isinstance(module, Standardized) else module(x)
        return x


class AcceleratedStage(nn.Sequential):
    """A stage of blocks, standardized together; each block hands its output on activated too, from one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the residual stream after the last block."""
        blocks: list[Any] = list(self)
        by_block = [block.requests() for block in blocks]
        wanted = [request for requests in by_block for request in requests]
        prepared = iter(prepare_together(wanted, x, kept=takes_biases(x)))
        a = activate(x, blocks[0].activation, blocks[0].approximate)
        for block, requests in zip(blocks, by_block, strict=True):
            x, a = block(x, a, [next(prepared) for _ in requests])
        return x


ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {
    AcceleratedConv: ScaledStdConv2d,
    AcceleratedConvSame: ScaledStdConv2dSame,
    AcceleratedGammaAct: GammaAct,
    AcceleratedBlock: NormFreeBlock,
    AcceleratedStage: nn.Sequential,
    AcceleratedStem: nn.Sequential,
}
"""what an instance of each was and becomes again"""
ATTRIBUTES = ("factor", "activation", "approximate", "_cached", "_held")
"""what instances of these have in addition"""
