"""Scaled activations in plain PyTorch: `scale * f(x)`, and the gains gamma that keep the variance at 1."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight_standardize import accumulation_dtype

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

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
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

_aten = torch.ops.aten


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:  # aten's cannot be differentiated again
    s = torch.sigmoid(x)
    return grad * (s * (1.0 + x * (1.0 - s)))


def _log_softmax_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten._log_softmax_backward_data(grad, F.log_softmax(x, dim=CHANNEL_DIM), CHANNEL_DIM, x.dtype)


# torch's own derivatives, called by name: the ops run below autograd, where torch.autograd.grad sees no graph, and
# under dispatch modes (FLOP counters, selective checkpointing), where torch.func.vjp fails.
_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda grad, x: grad,
    "celu": lambda grad, x: _aten.elu_backward(grad, 1.0, 1.0, 1.0, False, x),
    "elu": lambda grad, x: _aten.elu_backward(grad, 1.0, 1.0, 1.0, False, x),
    "gelu": lambda grad, x: _aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    "glu": lambda grad, x: _aten.glu_backward(grad, x, CHANNEL_DIM),
    "leaky_relu": lambda grad, x: _aten.leaky_relu_backward(grad, x, 0.01, False),
    "log_sigmoid": lambda grad, x: grad * torch.sigmoid(-x),
    "log_softmax": _log_softmax_backward,
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
    "relu6": lambda grad, x: _aten.hardtanh_backward(grad, x, 0.0, 6.0),
    "selu": lambda grad, x: _aten.elu_backward(grad, 1.6732632423543772, 1.0507009873554805, 1.0, False, x),
    "sigmoid": lambda grad, x: _aten.sigmoid_backward(grad, torch.sigmoid(x)),
    "silu": _silu_backward,
    "softsign": lambda grad, x: grad / (1.0 + x.abs()).square(),
    "softplus": lambda grad, x: _aten.softplus_backward(grad, x, 1.0, 20.0),
    "tanh": lambda grad, x: _aten.tanh_backward(grad, torch.tanh(x)),
}


def function_key(name: str, approximate: str) -> str:
    """The name of the exact function: GELU has two."""
    return "gelu_tanh" if name == "gelu" and approximate == "tanh" else name


def scaled_activation(x: Tensor, key: str, scale: float) -> Tensor:
    """`scale * f(x)`, computed in float32 (float64 for float64) and rounded once to the dtype of x."""
    return (FUNCTIONS[key](x.to(accumulation_dtype(x.dtype))) * scale).to(x.dtype)


def scaled_activation_backward(grad: Tensor, x: Tensor, key: str, scale: float) -> Tensor:
    """Gradient of `scaled_activation` for x, by torch's own derivative of f."""
    acc = accumulation_dtype(x.dtype)
    return _BACKWARDS[key](grad.to(acc) * scale, x.to(acc)).to(x.dtype)
