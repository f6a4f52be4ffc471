"""SGD with adaptive gradient clipping in plain PyTorch (deepmind-research, nfnets/optim.py, `SGD_AGC`)."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import agc


class Hyperparameters(NamedTuple):
    """Of a parameter group; see `nfnets_kernels.optim.SGD_AGC`."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    clip_factor: float | None
    """None: gradients are not clipped"""
    eps: float
    average_decay: float


class Scalars(NamedTuple):
    """Float32 tensors of one element that a step reads where it runs; None for those that there are not."""

    lr: Tensor | None = None
    """multiplies the group's"""
    grad_scale: Tensor | None = None
    """what the loss, and so the gradients, have been multiplied by"""
    found_inf: Tensor | None = None
    """unless it is 0, nothing is written"""


def _scaled_gradient(grad: Tensor, hyper: Hyperparameters, scalars: Scalars) -> Tensor:
    """The gradient of what is minimized, in float64."""
    scale = 1.0 if scalars.grad_scale is None else scalars.grad_scale.to(torch.float64)
    return grad.to(torch.float64) * (-1.0 if hyper.maximize else 1.0) / scale


def _clipped(weight: Tensor, grad: Tensor, hyper: Hyperparameters, rule: str, statistics: Tensor | None) -> Tensor:
    if hyper.clip_factor is None:
        return grad
    norms = agc.unitwise_norm(weight, 2.0, rule), agc.unitwise_norm(grad, 2.0, rule)
    decision = agc.decide(*norms, hyper.clip_factor, hyper.eps)
    if statistics is not None:
        agc.count_(statistics, decision)
    return grad * decision.factor


def sgd_agc_(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    average: Tensor | None,
    statistics: Tensor | None,
    hyper: Hyperparameters,
    scalars: Scalars,
    rule: str,
) -> None:
    """One step of a tensor: clipping, then decay, as the authors do it, momentum, update and moving average.

    The gradient is left as it is. Everything is computed in float64 and rounded once, where it is stored.
    """
    if weight.numel() == 0 or (scalars.found_inf is not None and bool(scalars.found_inf != 0)):
        return
    w = weight.to(torch.float64)
    g = _clipped(weight, _scaled_gradient(grad, hyper, scalars), hyper, rule, statistics)
    direction = g + hyper.weight_decay * w
    if momentum_buffer is not None:
        m = hyper.momentum * momentum_buffer.to(torch.float64) + (1.0 - hyper.dampening) * direction
        momentum_buffer.copy_(m)
        direction = direction + hyper.momentum * m if hyper.nesterov else m
    lr = hyper.lr if scalars.lr is None else hyper.lr * scalars.lr.to(torch.float64)
    weight.copy_(w - lr * direction)
    if average is not None:
        before = average.to(torch.float64)
        average.copy_(before + (1.0 - hyper.average_decay) * (weight.to(torch.float64) - before))
