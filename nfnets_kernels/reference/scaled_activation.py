"""Scaled activations in plain PyTorch: `scale * f(x)`, and the gains gamma that keep the variance at 1."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# 1 / std(f(x)) for x ~ N(0, 1), digit for digit from the authors' code (nfnets/base.py, `nonlinearities`).
GAMMA = {
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "glu": 1.8484294414520264,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "log_softmax": 1.0002083778381348,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "softsign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}

# glu halves the channels and log_softmax normalizes over them: dim 1 of (N, C, ...), as in convolutional networks.
CHANNEL_DIM = 1

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "glu": lambda x: F.glu(x, dim=CHANNEL_DIM),
    "leaky_relu": F.leaky_relu,
    "log_sigmoid": F.logsigmoid,
    "log_softmax": lambda x: F.log_softmax(x, dim=CHANNEL_DIM),
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softsign": F.softsign,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


def function_key(name: str, approximate: str) -> str:
    """The name of the exact function: GELU has two."""
    return "gelu_tanh" if name == "gelu" and approximate == "tanh" else name


def scaled_activation(x: Tensor, key: str, scale: float) -> Tensor:
    """`scale * f(x)`, computed in float32 (float64 for float64) and rounded once to the dtype of x."""
    acc = x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x
    return (_FUNCTIONS[key](acc) * scale).to(x.dtype)


def scaled_activation_backward(grad: Tensor, x: Tensor, key: str, scale: float) -> Tensor:
    """Gradient of `scaled_activation` for x, by torch's own derivative of f."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    # torch.func differentiates below the autograd dispatch keys, where torch.autograd.grad sees no graph.
    pullback = torch.func.vjp(_FUNCTIONS[key], x.to(acc))[1]
    return pullback(grad.to(acc) * scale)[0].to(x.dtype)
