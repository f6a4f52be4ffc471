"""Drop-in modules on top of the ops."""

from .activation import ScaledActivation, ScaledGELU, ScaledReLU, ScaledSiLU
from .batched import BatchedWeightStandardization
from .conv import ScaledStdConv2d, StdConv2d, WSConv1d, WSConv2d, WSConv3d, WSConvTranspose2d
from .convert import convert_conv2d
from .linear import WSLinear
from .squeeze_excite import EfficientChannelAttention, SqueezeExcite

__all__ = [
    "BatchedWeightStandardization",
    "EfficientChannelAttention",
    "ScaledActivation",
    "ScaledGELU",
    "ScaledReLU",
    "ScaledSiLU",
    "ScaledStdConv2d",
    "SqueezeExcite",
    "StdConv2d",
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "WSConvTranspose2d",
    "WSLinear",
    "convert_conv2d",
]
