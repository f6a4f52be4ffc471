"""Optimization of NF networks."""

from .agc import AGC
from .ema import ModelEMA
from .param_groups import ParamGroups, param_groups
from .sgd_agc import SGD_AGC
from .statistics import ClippingStatistics, ParameterStatistics

__all__ = [
    "AGC",
    "SGD_AGC",
    "ClippingStatistics",
    "ModelEMA",
    "ParamGroups",
    "ParameterStatistics",
    "param_groups",
]
