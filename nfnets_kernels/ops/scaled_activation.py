"""`scaled_activation`: `scale * f(x)` in one read and one write, and its gradient in two reads and one write."""

import torch
from torch import Tensor

from .. import backend as backends
from ..reference import scaled_activation as reference
from .library import (
    aligned,
    channels_last_format,
    check_choice,
    check_finite,
    check_float,
    define,
    is_channels_last,
    register_autograd,
)

APPROXIMATIONS = ("none", "tanh")

# csrc/kernels/scaled_activation.h, `Activation`.
CPU_CODES = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}


def check_options(name: str, scale: float, approximate: str) -> None:
    """Raises ValueError naming the first bad option."""
    check_choice("name", name, tuple(reference.GAMMA))
    check_choice("approximate", approximate, APPROXIMATIONS)
    check_finite("scale (gamma * beta)", scale)


def check(x: Tensor, name: str, scale: float, approximate: str) -> None:
    """Raises ValueError or TypeError naming the first bad argument."""
    check_float("x", x)
    check_options(name, scale, approximate)
    if name in ("glu", "log_softmax") and x.ndim <= reference.CHANNEL_DIM:
        raise ValueError(f"x must have a channel dim {reference.CHANNEL_DIM} for {name}, got shape {tuple(x.shape)}")
    if name == "glu" and x.shape[reference.CHANNEL_DIM] % 2:
        raise ValueError(f"x must have an even number of channels for glu, got shape {tuple(x.shape)}")


def saves_output(key: str, scale: float) -> bool:
    """Whether the gradient needs no more than the output: then the input can be freed or overwritten.

    The outputs of ReLU and leaky ReLU are positive where their inputs are, as long as scaling cannot round a subnormal
    to zero. No other gradient is as exact from a rounded output as from the input.
    """
    return key == "identity" or (key in ("relu", "leaky_relu") and scale >= 1.0)


def check_inplace(name: str, scale: float) -> None:
    """Raises ValueError unless the input may be overwritten."""
    if not saves_output(name, scale):
        raise ValueError(
            "inplace must be False but for identity, and for relu and leaky_relu with a scale (gamma * beta) of 1 or "
            f"more, whose gradients follow from their outputs; got True for {name} with {scale}"
        )


def _fake(x, name, scale, approximate, backend):
    if name != "glu":
        return torch.empty_like(x)
    shape = list(x.shape)
    shape[reference.CHANNEL_DIM] //= 2
    memory_format = channels_last_format(x) if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _forward(x, name, scale, approximate, backend):
    key = reference.function_key(name, approximate)
    out = _fake(x, name, scale, approximate, backend)
    backends.select("scaled_activation", x.device.type, backend, key)(x, None, key, scale, out)
    return out


def _fake_backward(grad, saved, name, scale, approximate, backend):
    return torch.empty_like(saved)


def _backward(grad, saved, name, scale, approximate, backend):
    key = reference.function_key(name, approximate)
    out = torch.empty_like(saved)
    backends.select("scaled_activation", saved.device.type, backend, key)(saved, grad, key, scale, out)
    return out


@backends.register("scaled_activation", "reference")
def _reference(x, grad, key, scale, out):
    if grad is None:
        out.copy_(reference.scaled_activation(x, key, scale))
    else:
        out.copy_(reference.scaled_activation_backward(grad, x, key, scale))


@backends.register("scaled_activation", "cpu", variants=tuple(CPU_CODES))
def _cpu(x, grad, key, scale, out):
    assert backends.extension is not None
    x = aligned(x, out)
    grad = grad if grad is None else aligned(grad, out)
    backends.extension.scaled_activation(
        x.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        out.data_ptr(),
        backends.DTYPE_CODES[x.dtype],
        x.numel(),
        CPU_CODES[key],
        scale,
        torch.get_num_threads(),
    )


@backends.register("scaled_activation", "triton")
def _triton(x, grad, key, scale, out):
    from ..triton_kernels import scaled_activation as kernels

    if key not in ("glu", "log_softmax"):
        return kernels.scaled_activation(aligned(x, out), None if grad is None else aligned(grad, out), key, scale, out)
    wide = x if grad is None else out  # the order of glu's output is not one of C channels
    memory_format = channels_last_format(wide) if is_channels_last(wide) else torch.contiguous_format
    grad = grad if grad is None else grad.contiguous(memory_format=memory_format)
    result = out.contiguous(memory_format=memory_format)
    kernels.scaled_activation(x.contiguous(memory_format=memory_format), grad, key, scale, result)
    if result is not out:
        out.copy_(result)


def _setup_context(ctx, inputs, output):
    x, name, scale, approximate, backend = inputs
    ctx.arguments = name, scale, approximate, backend
    key = reference.function_key(name, approximate)
    ctx.save_for_backward(output if saves_output(key, scale) else x)


def _gradient(ctx, grad):
    name, scale, approximate, backend = ctx.arguments
    (saved,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: plain PyTorch, which can be differentiated again
        key = reference.function_key(name, approximate)
        grad_x = reference.scaled_activation_backward(grad, saved, key, scale)
    else:
        grad_x = scaled_activation_backward(grad, saved, name, scale, approximate, backend)
    return grad_x, None, None, None, None


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *arguments):
        name, scale, _, backend = ctx.arguments = arguments
        kernel = backends.select("scaled_activation", x.device.type, backend, name)
        # A view with gaps is computed aside: kernels write dense tensors.
        dense = x.stride() == torch.empty_like(x, device="meta").stride()
        out = x if dense else torch.empty_like(x)
        kernel(x, None, name, scale, out)
        if not dense:
            x.copy_(out)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    backward = staticmethod(_gradient)


def scaled_activation_(x: Tensor, name: str, scale: float, approximate: str, backend: str) -> Tensor:
    """`scaled_activation` that overwrites x and returns it, for those that `check_inplace` accepts."""
    # A compiler removes the copy; a subclass, such as a fake tensor, may have no memory to write to; what is negated
    # when it is read is not in memory.
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_neg():
        return x.copy_(scaled_activation(x, name, scale, approximate, backend))
    return _InPlace.apply(x, name, scale, approximate, backend)


scaled_activation = define(
    "scaled_activation(Tensor x, str name, float scale, str approximate, str backend) -> Tensor", _forward, _fake
)
scaled_activation_backward = define(
    "scaled_activation_backward(Tensor grad, Tensor saved, str name, float scale, str approximate, str backend) "
    "-> Tensor",
    _backward,
    _fake_backward,
)
register_autograd("scaled_activation", _gradient, _setup_context)
