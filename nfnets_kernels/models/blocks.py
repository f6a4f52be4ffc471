"""The residual block of all NF networks: `h + alpha * skip_gain * keep * gate * f(beta * act(h))`, not normalized.

The scalings cost no pass over activations: gamma of the activation and beta = 1 / expected std of the block's input are
folded into the standardized weight of the convolution that follows, alpha and skip_gain into the last convolution of
the branch where no gate stands between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..modules import EfficientChannelAttention, SqueezeExcite
from ..modules.squeeze_excite import pool_through
from ..modules.standardized import Prepared, Request
from ..ops.library import check_choice
from .numerics import Numerics

ATTENTIONS = ("se", "eca")


def activate(
    x: Tensor, name: str, approximate: str = "tanh", inplace: bool = False, bias: Tensor | None = None
) -> Tensor:
    """The unscaled activation of x + bias; a convolution's output may be overwritten, since none needs it again."""
    if name == "relu" and bias is None:
        return F.relu(x, inplace)
    inplace = inplace and name == "relu"
    return functional.scaled_activation(x, name, gamma=1.0, bias=bias, approximate=approximate, inplace=inplace)


def make_attention(kind: str, channels: int, se_ratio: float, numerics: Numerics, **factory: Any) -> nn.Module:
    """The gate of a block: "se", squeeze and excite of channels * se_ratio hidden neurons, or "eca".

    Raises:
        ValueError: another kind.
    """
    check_choice("attention", kind, ATTENTIONS)
    if kind == "eca":
        return EfficientChannelAttention(channels, **factory)
    hidden = max(1, numerics.round_channels(channels * se_ratio, at_least=0.0))
    return SqueezeExcite(channels, hidden=hidden, **factory)


def takes_biases(input: Tensor) -> bool:
    """Whether activations had better add the biases of the convolutions before them, and sum the gradients of these.

    So it is on GPUs, where cuDNN's convolutions add none, and torch does in passes of its own. oneDNN adds them for
    nothing: on a CPU a float32 step of NF-ResNet-50 would take 1 % longer. A compiler fuses them with what is around.
    """
    if torch.compiler.is_compiling() or not isinstance(input, Tensor):  # a proxy of torch.fx
        return False
    return input.is_cuda


def take_bias(conv: nn.Module, given: list[Prepared | None], index: int) -> Tensor | None:
    """Takes the bias out of the prepared weight at `index`, if there are both; not where a hook sees conv's output."""
    pair = given[index]
    if pair is None or pair[1] is None or conv._forward_hooks:
        return None
    given[index] = pair[0], None
    return pair[1]


class BlockPlan(NamedTuple):
    """What depends on a block's place in its network."""

    stage: int
    stride: int
    beta: float
    """1 / expected standard deviation of the block's input"""
    stochdepth_rate: float


def plan_blocks(
    depth: Sequence[int], strides: Sequence[int], alpha: float, stochdepth_rate: float
) -> Iterator[BlockPlan]:
    """The blocks of a network in order; stochastic depth rises linearly from 0 (nfnets/nfnet.py)."""
    expected_std, index = 1.0, 0
    for stage, (count, stride) in enumerate(zip(depth, strides, strict=True)):
        for position in range(count):
            first = position == 0
            rate = stochdepth_rate * index / sum(depth)
            yield BlockPlan(stage, stride if first else 1, 1.0 / expected_std, rate)
            index += 1
            # A projection resets the variance to 1; every block then adds alpha^2.
            expected_std = ((1.0 if first else expected_std**2) + alpha**2) ** 0.5


class ResidualBlock(nn.Module):
    """The arithmetic of a block, whatever its parts are called; `NFBlock` has the authors' names.

    A subclass has `alpha`, `activation` and `approximate`, `stochdepth_rate` and `rescale_kept`, and the parts below.
    """

    alpha: float
    activation: str
    approximate: str
    stochdepth_rate: float
    rescale_kept: bool
    """divide kept branches by the probability to keep them"""
    gate_gain: float = 2.0
    """a gate is gate_gain * sigmoid(logits)"""
    skip_gain: Tensor | None
    pool: nn.Module | None
    """before the projection of the shortcut"""
    conv_shortcut: Any
    """the projection of the shortcut, a standardized convolution or None"""

    def convolutions(self) -> list[Any]:
        """The standardized convolutions of the branch in order."""
        raise NotImplementedError

    def inner_gate(self, f: Tensor) -> Tensor | None:
        """Logits (N, C) of the gate before the last convolution from its input or the average of that, or None."""
        raise NotImplementedError

    def outer_gate(self, f: Tensor) -> Tensor | None:
        """Logits (N, C) of the gate after the last convolution from its output or the average of that, or None."""
        raise NotImplementedError

    def has_inner_gate(self) -> bool:
        """Whether a gate stands before the last convolution."""
        raise NotImplementedError

    def has_outer_gate(self) -> bool:
        """Whether a gate stands between the last convolution and the sum."""
        raise NotImplementedError

    def requests(self) -> list[Request]:
        """The weights that `forward` takes prepared; alpha and skip_gain are folded where no gate stands between."""
        *inner, last = self.convolutions()
        folded = Request(last) if self.has_outer_gate() else Request(last, self.skip_gain, self.alpha)
        shortcut = [] if self.conv_shortcut is None else [Request(self.conv_shortcut)]
        return [*(Request(conv) for conv in inner), folded, *shortcut]

    def _inner(self, a: Tensor, given: list[Prepared | None]) -> Tensor:
        """Input of the last convolution."""
        *inner, _ = self.convolutions()
        separate = takes_biases(a)
        for index, conv in enumerate(inner):
            gated = index == len(inner) - 1 and self.has_inner_gate()
            bias = take_bias(conv, given, index) if separate and not gated else None
            f = conv(a, prepared=given[index])
            if gated:
                pooled, f = pool_through(f)
                f = self._gated(f, self.inner_gate(pooled))
            a = activate(f, self.activation, self.approximate, inplace=True, bias=bias)
        return a

    def branch(self, a: Tensor) -> Tensor:
        """The residual branch before stochastic depth, skip_gain and alpha, as the authors' signal metrics see it."""
        *inner, last = self.convolutions()
        f = last(self._inner(a, [None] * len(inner)))
        return self._gated(f, self.outer_gate(f))

    def _gated(self, f: Tensor, logits: Tensor | None) -> Tensor:
        return f if logits is None else f * (self.gate_gain * torch.sigmoid(logits))[:, :, None, None]

    def _shortcut(self, h: Tensor, a: Tensor, prepared: Prepared | None) -> Tensor:
        if self.conv_shortcut is None:
            return h
        return self.conv_shortcut(a if self.pool is None else self.pool(a), prepared=prepared)

    def _take_last_biases(self, given: list[Prepared | None], multiplied: bool) -> Tensor | None:
        """The sum of the biases of what is added last; the branch's only where nothing multiplies it before."""
        *inner, last = self.convolutions()
        branch = None if multiplied else take_bias(last, given, len(inner))
        shortcut = None if self.conv_shortcut is None else take_bias(self.conv_shortcut, given, -1)
        return branch if shortcut is None else shortcut if branch is None else branch + shortcut

    def _keep(self, a: Tensor) -> Tensor | None:
        if not self.training or self.stochdepth_rate == 0.0:
            return None
        keep = (torch.rand(a.shape[0], device=a.device) >= self.stochdepth_rate).to(a.dtype)
        return keep / (1.0 - self.stochdepth_rate) if self.rescale_kept else keep

    def forward(self, h: Tensor, a: Tensor, prepared: Sequence[Prepared] = ()) -> tuple[Tensor, Tensor]:
        """h, a: (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).

        h is the residual stream, a = act(h). `prepared` holds the standardized weights of `requests`; without them each
        convolution standardizes its own.
        """
        *inner, last = self.convolutions()
        given: list[Prepared | None] = list(prepared) or [None] * (len(inner) + 2)
        keep = self._keep(a)
        multiplied = keep is not None or self.has_outer_gate()
        # Everywhere else the gradient of a bias costs the reading of a tensor of h's size.
        training = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        bias = self._take_last_biases(given, multiplied) if training or takes_biases(a) else None
        shortcut = self._shortcut(h, a, given[-1])
        out, weights = self._inner(a, given), given[len(inner)]
        options: dict[str, Any] = {"activation": self.activation, "approximate": self.approximate}
        if self.has_outer_gate():
            pooled, f = pool_through(last(out, prepared=weights))
            alpha = self.alpha * self.gate_gain / 2.0  # the op's gate is 2 * sigmoid
            gate = self.outer_gate(pooled)
            # (1,) after sharded.reshape_scalars_
            skip_gain = None if self.skip_gain is None else self.skip_gain.reshape(())
            factors: dict[str, Any] = {"skip_gain": skip_gain, "se": gate, "keep": keep, "alpha": alpha}
            return functional.residual(f, shortcut, bias=bias, **factors, **options)
        f = last(out, skip_gain=self.skip_gain, alpha=self.alpha, prepared=weights)
        if keep is not None:
            return functional.residual(f, shortcut, keep=keep, bias=bias, **options)
        if not torch.compiler.is_compiling():
            return functional.residual(f, shortcut, bias=bias, inplace=True, **options)
        h = f.add_(shortcut)  # a compiler fuses these with what is around them
        return h, activate(h, self.activation, self.approximate)

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return f"alpha={self.alpha}, activation={self.activation!r}, stochdepth_rate={self.stochdepth_rate}"


class NFBlock(ResidualBlock):
    """A block with the authors' names: conv0 (1x1), conv1 and conv1b (3x3), conv2 (1x1), se, conv_shortcut, skip_gain.

    Args:
        in_channels, out_channels: of the block.
        width: channels of the 3x3 convolutions.
        groups: of the 3x3 convolutions.
        stride: of conv1 and the shortcut.
        alpha: scale of the residual branch.
        beta: 1 / expected standard deviation of h.
        activation, approximate: see `nfnets_kernels.functional.scaled_activation`.
        numerics: the conventions to follow.
        extra_conv: a second 3x3 convolution, NFNet's.
        attention: gives the logits of a gate, for `width` channels where gate_inside, else for out_channels; or None.
        gate_inside: the gate stands before conv2 (NF-RegNet) and not after it.
        stochdepth_rate: probability to drop the branch of a sample in training.
        rescale_kept: divide the kept branches by the probability to keep them, as timm.
        pool_shortcut: 2x2 average pooling before the projection of a strided shortcut, which is strided itself if not.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int,
        groups: int = 1,
        stride: int,
        alpha: float,
        beta: float,
        activation: str,
        approximate: str,
        numerics: Numerics,
        extra_conv: bool = False,
        attention: nn.Module | None = None,
        gate_inside: bool = False,
        stochdepth_rate: float = 0.0,
        rescale_kept: bool = False,
        pool_shortcut: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        gamma = functional.gamma(activation)
        self.alpha = alpha
        self.activation = activation
        self.approximate = approximate
        self.stochdepth_rate = stochdepth_rate
        self.rescale_kept = rescale_kept
        self.gate_inside = gate_inside
        conv = numerics.convolution
        self.conv0 = conv(in_channels, width, 1, gamma=gamma * beta, **factory)
        self.conv1 = conv(width, width, 3, stride, groups=groups, gamma=gamma, **factory)
        self.conv1b = conv(width, width, 3, groups=groups, gamma=gamma, **factory) if extra_conv else None
        self.conv2 = conv(width, out_channels, 1, gamma=gamma, **factory)
        self.se = attention
        self.skip_gain = nn.Parameter(torch.zeros((), **factory)) if numerics.skip_gain else None
        self.pool = None
        self.conv_shortcut = None
        if stride > 1 or in_channels != out_channels:
            pools = stride > 1 and pool_shortcut
            self.pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if pools else None
            self.conv_shortcut = conv(
                in_channels, out_channels, 1, 1 if pools else stride, gamma=gamma * beta, **factory
            )

    def reset_parameters(self) -> None:
        """Starts as the identity (or the projection): SkipInit, or zero gains of the last convolution."""
        if self.skip_gain is not None:
            nn.init.zeros_(self.skip_gain)
        else:
            nn.init.zeros_(self.conv2.gain)  # type: ignore[arg-type]

    def convolutions(self) -> list[Any]:
        """conv0, conv1, conv1b where there is one, conv2."""
        extra = [] if self.conv1b is None else [self.conv1b]
        return [self.conv0, self.conv1, *extra, self.conv2]

    def has_inner_gate(self) -> bool:
        """Whether `se` stands before conv2."""
        return self.se is not None and self.gate_inside

    def has_outer_gate(self) -> bool:
        """Whether `se` stands after conv2."""
        return self.se is not None and not self.gate_inside

    def outer_gate(self, f: Tensor) -> Tensor | None:
        """Logits of `se` after conv2."""
        return self.se(f) if self.has_outer_gate() else None  # type: ignore[misc]

    def inner_gate(self, f: Tensor) -> Tensor | None:
        """Logits of `se` before conv2."""
        return self.se(f) if self.has_inner_gate() else None  # type: ignore[misc]
