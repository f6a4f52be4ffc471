"""Fused kernels for Normalizer-Free networks (NF-ResNet, NFNet; Brock et al. 2021) in PyTorch."""

__version__ = "0.1.0"

from . import backend, deployment, diagnostics, functional, integrations, models, modules, optim, sharded
from .functional import agc_
from .modules import (
    BatchedWeightStandardization,
    EfficientChannelAttention,
    ScaledActivation,
    ScaledGELU,
    ScaledReLU,
    ScaledSiLU,
    ScaledStdConv2d,
    SqueezeExcite,
    StdConv2d,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose2d,
    WSLinear,
    convert_conv2d,
)
from .optim import AGC

__all__ = [
    "AGC",
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
    "agc_",
    "backend",
    "convert_conv2d",
    "deployment",
    "diagnostics",
    "functional",
    "integrations",
    "models",
    "modules",
    "optim",
    "sharded",
]
