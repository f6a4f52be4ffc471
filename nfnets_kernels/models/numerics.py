"""What the authors' and timm's implementations of one architecture compute differently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..modules import WSConv2d
from ..ops.library import check_choice


@dataclass(frozen=True)
class Numerics:
    """The conventions of an implementation; weights trained with one are exact with that one only."""

    eps: float
    """of weight standardization"""
    eps_form: str
    """of weight standardization, "clamp" or "add\""""
    same_padding: bool
    """TensorFlow's SAME padding, or timm's symmetric one"""
    skip_gain: bool
    """SkipInit: a learnable scalar per block; without it the gains of a block's last convolution start at 0"""
    gamma_after_convolution: bool
    """gamma multiplies each convolution instead of each activation: the stem has one more, the features one less"""
    channel_divisor: int
    """channels are rounded to its multiples; 1 truncates"""

    def convolution(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, **options: Any
    ) -> WSConv2d:
        """A convolution of an odd kernel with these conventions; keyword arguments as `WSConv2d`."""
        padding: Any = "SAME" if self.same_padding else kernel_size // 2
        forms: dict[str, Any] = {"eps": self.eps, "eps_form": self.eps_form}
        return WSConv2d(in_channels, out_channels, kernel_size, stride, padding, **forms, **options)

    def gamma_without_activation(self, gamma: float) -> float:
        """Scale of a convolution that no activation precedes: the first one and NFNet's last one."""
        return gamma if self.gamma_after_convolution else 1.0

    def gamma_of_features(self, gamma: float) -> float:
        """Scale of the last activation, that no convolution follows."""
        return 1.0 if self.gamma_after_convolution else gamma

    def round_channels(self, channels: float, at_least: float = 0.9) -> int:
        """Channels as the implementation rounds them, to no less than a share of what was asked for (timm's rule)."""
        divisor = self.channel_divisor
        if divisor == 1:
            return int(channels)
        rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
        return rounded if rounded >= at_least * channels else rounded + divisor


NUMERICS = {
    "deepmind": Numerics(1e-4, "clamp", True, True, False, 1),
    "timm_dm": Numerics(1e-5, "add", True, True, False, 8),
    "timm": Numerics(1e-5, "add", False, False, True, 8),
}


def numerics_of(name: str) -> Numerics:
    """The conventions called "deepmind" (the authors'), "timm_dm" (timm's dm_nfnet_*) or "timm" (its other networks).

    Raises:
        ValueError: another name.
    """
    check_choice("numerics", name, tuple(NUMERICS))
    return NUMERICS[name]
