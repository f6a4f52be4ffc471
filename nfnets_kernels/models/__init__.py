"""Normalizer-free networks built from the package's modules."""

from .flops import count_flops
from .network import NormalizerFreeNet
from .nf_regnet import NFRegNet, nf_regnet_b0, nf_regnet_b1, nf_regnet_b2, nf_regnet_b3, nf_regnet_b4, nf_regnet_b5
from .nf_resnet import NFResNet, nf_resnet26, nf_resnet50, nf_resnet101, nf_resnet152, nf_resnet200, nf_resnet288
from .nfnet import (
    NFNet,
    nfnet_f0,
    nfnet_f0_plus,
    nfnet_f1,
    nfnet_f1_plus,
    nfnet_f2,
    nfnet_f2_plus,
    nfnet_f3,
    nfnet_f3_plus,
    nfnet_f4,
    nfnet_f4_plus,
    nfnet_f5,
    nfnet_f5_plus,
    nfnet_f6,
    nfnet_f6_plus,
    nfnet_f7,
    nfnet_f7_plus,
)
from .timm_weights import load_timm, timm_state_dict
from .timm_zoo import like_timm
from .weights import load_haiku

__all__ = [
    "NFNet",
    "NFRegNet",
    "NFResNet",
    "NormalizerFreeNet",
    "count_flops",
    "like_timm",
    "load_haiku",
    "load_timm",
    "nf_regnet_b0",
    "nf_regnet_b1",
    "nf_regnet_b2",
    "nf_regnet_b3",
    "nf_regnet_b4",
    "nf_regnet_b5",
    "nf_resnet26",
    "nf_resnet50",
    "nf_resnet101",
    "nf_resnet152",
    "nf_resnet200",
    "nf_resnet288",
    "nfnet_f0",
    "nfnet_f0_plus",
    "nfnet_f1",
    "nfnet_f1_plus",
    "nfnet_f2",
    "nfnet_f2_plus",
    "nfnet_f3",
    "nfnet_f3_plus",
    "nfnet_f4",
    "nfnet_f4_plus",
    "nfnet_f5",
    "nfnet_f5_plus",
    "nfnet_f6",
    "nfnet_f6_plus",
    "nfnet_f7",
    "nfnet_f7_plus",
    "timm_state_dict",
]
