"""`bias_activation`: `scale * act(x + bias)`, what follows a convolution inside a block.

It is `residual` without a shortcut, and run by the kernels of that: the bias, which cuDNN adds in a pass of its own,
costs no traffic, and its gradient is summed where the activation's is computed.
"""

import torch
from torch import Tensor

from .. import backend as backends
from ..reference import residual as reference
from ..reference.residual import Branch
from ..reference.scaled_activation import function_key
from .library import define, dense_like, register_autograd
from .residual import ACTIVATIONS, check_small, overwritable, residual_backward
from .scaled_activation import saves_output

_ONE = Branch(None, None, None, 1.0)


def check(x: Tensor, name: str, bias: Tensor) -> None:
    """Raises ValueError or TypeError naming the first bad argument, after `scaled_activation.check`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"bias must be None for {name}, which is not elementwise")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, C, ...) where a bias is given, got {tuple(x.shape)}")
    check_small("bias", bias, x.shape[1:2], "x", x)


def _fake(x, bias, name, scale, approximate, backend):
    return dense_like(x)


def _forward(x, bias, name, scale, approximate, backend, *, out=None):
    """out is where to write, perhaps x; None for a new tensor."""
    key = function_key(name, approximate)
    kernel, _ = backends.select("residual", x.device.type, backend, key)
    out = dense_like(x) if out is None else out
    kernel(x, None, _ONE, key, scale, bias, None, out)
    return out


def _setup_context(ctx, inputs, output):
    x, bias, name, scale, approximate, backend = inputs
    ctx.arguments = name, scale, approximate, backend
    ctx.bias_dtype = bias.dtype if bias.requires_grad else None
    ctx.save_for_backward(*((output, None) if saves_output(name, scale) else (x, bias)))


def _gradients(ctx, grad):
    name, scale, approximate, backend = ctx.arguments
    saved, bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: plain PyTorch, which can be differentiated again
        key = function_key(name, approximate)
        grads = reference.residual_backward(None, grad, None, saved, _ONE, key, scale, ctx.bias_dtype, bias)
    else:
        grads = residual_backward(
            None, grad, None, saved, *_ONE, name, scale, approximate, backend, ctx.bias_dtype, bias
        )
    grad_x, grad_bias = grads if ctx.bias_dtype else (*grads, None)
    return grad_x, grad_bias, None, None, None, None


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *rest):
        out = _forward(x, *rest, out=x)
        ctx.mark_dirty(x)
        _setup_context(ctx, (x, *rest), out)
        return out

    backward = staticmethod(_gradients)


def bias_activation_(x: Tensor, bias: Tensor, name: str, scale: float, approximate: str, backend: str) -> Tensor:
    """`bias_activation` that overwrites x and returns it, for what `scaled_activation.check_inplace` accepts."""
    if torch.compiler.is_compiling() or not overwritable(x, bias):  # the compiler removes the copy
        return x.copy_(bias_activation(x, bias, name, scale, approximate, backend))
    return _InPlace.apply(x, bias, name, scale, approximate, backend)


bias_activation = define(
    "bias_activation(Tensor x, Tensor bias, str name, float scale, str approximate, str backend) -> Tensor",
    _forward,
    _fake,
)
register_autograd("bias_activation", _gradients, _setup_context)
