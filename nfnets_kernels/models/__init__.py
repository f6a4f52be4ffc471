"""Normalizer-free networks built from the package's modules."""

from .nf_resnet import NFResNet, nf_resnet50, nf_resnet101, nf_resnet152, nf_resnet200, nf_resnet288
from .weights import load_haiku

__all__ = [
    "NFResNet",
    "load_haiku",
    "nf_resnet50",
    "nf_resnet101",
    "nf_resnet152",
    "nf_resnet200",
    "nf_resnet288",
]
