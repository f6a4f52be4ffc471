"""`residual`: the end of a block and the start of the next one in one pass.

`h = alpha * skip_gain * keep * gate * f + bias + shortcut` and `a = scale * act(h)`, with gate = 2 * sigmoid(se).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend as backends
from ..reference import residual as reference
from ..reference.residual import Branch
from ..reference.scaled_activation import GAMMA, function_key
from ..reference.weight_standardize import accumulation_dtype
from .library import (
    aligned,
    check_choice,
    check_finite,
    check_float,
    check_same_device,
    define,
    dense_like,
    is_channels_last,
    is_unit_dense,
    register_autograd,
)
from .scaled_activation import APPROXIMATIONS, CPU_CODES, saves_output, scaled_activation_backward

# The elementwise ones: h and a have one shape.
ACTIVATIONS = tuple(name for name in GAMMA if name not in ("glu", "log_softmax"))

# Of the CPU kernel in channels-last order: pixels of a row of partial sums. Few enough for accuracy and for threads,
# many enough for the sums to be small against the data; never dependent on the number of threads.
_BLOCK_ELEMENTS, _LEAST_PIXELS, _MOST_PIXELS = 65536, 16, 256


def check(
    f: Tensor,
    shortcut: Tensor,
    skip_gain: Tensor | None,
    se: Tensor | None,
    keep: Tensor | None,
    alpha: float,
    activation: str,
    scale: float,
    approximate: str,
    bias: Tensor | None = None,
) -> None:
    """Raises ValueError or TypeError naming the first bad argument."""
    check_float("f", f)
    check_float("shortcut", shortcut)
    if f.ndim < 2:
        raise ValueError(f"f must have shape (N, C, ...), got {tuple(f.shape)}")
    if shortcut.shape != f.shape or shortcut.dtype != f.dtype:
        raise ValueError(
            f"shortcut must have f's shape {tuple(f.shape)} and dtype {f.dtype}, "
            f"got {tuple(shortcut.shape)} and {shortcut.dtype}"
        )
    check_same_device("shortcut", shortcut, "f", f)
    check_small("skip_gain", skip_gain, (), "f", f)
    check_small("se", se, f.shape[:2], "f", f)
    check_small("keep", keep, f.shape[:1], "f", f)
    check_small("bias", bias, f.shape[1:2], "f", f)
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("approximate", approximate, APPROXIMATIONS)
    for name, value in (("alpha", alpha), ("scale", scale)):
        check_finite(name, value)


def check_small(name: str, tensor: Tensor | None, shape: Sequence[int], of: str, f: Tensor) -> None:
    """Raises ValueError or TypeError unless the tensor, where there is one, has the shape that goes with f."""
    if tensor is None:
        return
    check_float(name, tensor)
    check_same_device(name, tensor, of, f)
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_inplace(skip_gain: Tensor | None, se: Tensor | None, keep: Tensor | None) -> None:
    """Raises ValueError unless f may be overwritten."""
    for name, tensor in (("skip_gain", skip_gain), ("se", se), ("keep", keep)):
        if tensor is not None:
            raise ValueError(f"inplace must be False where {name} is given, whose gradient needs f; got True")


def _fake(f, shortcut, skip_gain, se, keep, alpha, activation, scale, approximate, backend, bias=None):
    return dense_like(f), dense_like(f)


def _forward(f, shortcut, skip_gain, se, keep, alpha, activation, scale, approximate, backend, bias=None, *, h=None):
    """h is where to write it, perhaps f; None for a new tensor."""
    key = function_key(activation, approximate)
    kernel, _ = backends.select("residual", f.device.type, backend, key)
    h, a = dense_like(f) if h is None else h, dense_like(f)
    kernel(f, shortcut, Branch(skip_gain, se, keep, alpha), key, scale, bias, h, a)
    return h, a


def _fake_backward(
    grad_h, grad_a, f, saved, skip_gain, se, keep, alpha, activation, scale, approximate, backend, bias_dtype=None,
    bias=None,
):  # fmt: skip
    """As `reference.residual_backward` returns them."""
    branch = Branch(skip_gain, se, keep, alpha)
    grads = [dense_like(saved) for _ in range(1 if branch.is_one else 2)]
    if f is not None:
        grads += [torch.empty_like(x, memory_format=torch.contiguous_format) for x in branch.tensors if x is not None]
    if bias_dtype is not None:
        grads.append(saved.new_empty(saved.shape[1], dtype=bias_dtype))
    return grads


def _backward(
    grad_h, grad_a, f, saved, skip_gain, se, keep, alpha, activation, scale, approximate, backend, bias_dtype=None,
    bias=None,
):  # fmt: skip
    """grad_h is None where h has no further use, as before a projection; bias_dtype where bias needs no gradient.

    bias is what `saved` lacks, in the backward pass of `bias_activation`.
    """
    key = function_key(activation, approximate)
    branch = Branch(skip_gain, se, keep, alpha)
    if grad_h is None and branch.is_one and bias_dtype is None and bias is None:
        return [scaled_activation_backward(grad_a, saved, activation, scale, approximate, backend)]
    _, kernel = backends.select("residual", saved.device.type, backend, key)
    grads = _fake_backward(
        grad_h, grad_a, f, saved, skip_gain, se, keep, alpha, activation, scale, approximate, backend, bias_dtype
    )
    kernel(grad_h, grad_a, f, saved, branch, key, scale, grads, bias_dtype, bias)
    return grads


def _reference_forward(f, shortcut, branch, key, scale, bias, h, a):
    """In all backends shortcut and h are both None for `bias_activation`, whose branch is 1."""
    if shortcut is None:
        a.copy_(reference.bias_activation(f, key, scale, bias))
        return
    for out, value in zip((h, a), reference.residual(f, shortcut, branch, key, scale, bias), strict=True):
        out.copy_(value)


def _reference_backward(grad_h, grad_a, f, saved, branch, key, scale, grads, bias_dtype, bias):
    values = reference.residual_backward(grad_h, grad_a, f, saved, branch, key, scale, bias_dtype, bias)
    for out, value in zip(grads, values, strict=True):
        out.copy_(value)


backends.register("residual", "reference")((_reference_forward, _reference_backward))


class _Units(NamedTuple):
    """How the CPU kernel sees and cuts a tensor; see csrc/units.h."""

    samples: int
    channels: int
    space: int
    channels_last: bool
    pixels: int

    @property
    def sums(self) -> tuple[int, int, int]:
        """Shape of partial sums over space."""
        return self.samples, -(-self.space // self.pixels) if self.channels_last else 1, self.channels


def _units(like, branch):
    samples, channels = like.shape[:2]
    space = like[0, 0].numel() if like.numel() else 0
    channels_last = is_channels_last(like) or space == 1
    if channels_last and branch.is_one:  # then all samples are alike
        samples, space = 1, samples * space
    pixels = min(max(_BLOCK_ELEMENTS // max(1, channels), _LEAST_PIXELS), _MOST_PIXELS, max(1, space))
    return _Units(samples, channels, space, channels_last, pixels)


def _cpu_call(tensors, like, units, key, scale):
    """tensors: in the order of csrc/units.h's ResidualTensor; `like` gives dtype and memory order."""
    assert backends.extension is not None
    if like.numel() == 0:
        return
    backends.extension.residual(
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        backends.DTYPE_CODES[like.dtype],
        *units,
        CPU_CODES[key],
        scale,
        torch.get_num_threads(),
    )


def _cpu_forward(f, shortcut, branch, key, scale, bias, h, a):
    product = reference.factor(a, branch)
    f, shortcut = aligned(f, a), None if shortcut is None else aligned(shortcut, a)
    tensors = [f, shortcut, h, a, *[None] * 5, product, None, _cpu_bias(bias, a), None]
    _cpu_call(tensors, a, _units(a, branch), key, scale)


def _cpu_bias(bias, like):
    return None if bias is None else bias.to(accumulation_dtype(like.dtype)).contiguous()


def _cpu_backward(grad_h, grad_a, f, saved, branch, key, scale, grads, bias_dtype, bias):
    grad_shortcut, grad_f = grads[0], None if branch.is_one else grads[1]
    units = _units(grad_shortcut, branch)
    # zeros: in channels_last order the kernel adds pixel by pixel
    zeros = partial(saved.new_zeros, units.sums, dtype=accumulation_dtype(saved.dtype))
    sums = None if f is None else zeros()
    bias_sums = None if bias_dtype is None else zeros()
    grad_h, grad_a, f, saved = (None if x is None else aligned(x, grad_shortcut) for x in (grad_h, grad_a, f, saved))
    product = reference.factor(saved, branch)
    bias = _cpu_bias(bias, saved)
    tensors = [f, *[None] * 3, grad_h, grad_a, saved, grad_shortcut, grad_f, product, sums, bias, bias_sums]
    _cpu_call(tensors, grad_shortcut, units, key, scale)
    if bias_sums is not None:
        grads[-1].copy_(bias_sums.sum((0, 1)))
    if sums is not None:
        for out, value in zip(grads[2:], reference.factor_backward(sums.sum(1), saved, branch), strict=False):
            out.copy_(value)


backends.register("residual", "cpu", variants=tuple(CPU_CODES))((_cpu_forward, _cpu_backward))


def _triton_forward(f, shortcut, branch, key, scale, bias, h, a):
    from ..triton_kernels import residual as kernels

    shortcut = None if shortcut is None else aligned(shortcut, a)
    kernels.residual(aligned(f, a), shortcut, branch, key, scale, bias, h, a)


def _triton_backward(grad_h, grad_a, f, saved, branch, key, scale, grads, bias_dtype, bias):
    from ..triton_kernels import residual as kernels

    grad_h, grad_a, f, saved = (None if x is None else aligned(x, grads[0]) for x in (grad_h, grad_a, f, saved))
    kernels.residual_backward(grad_h, grad_a, f, saved, branch, key, scale, grads, bias_dtype is not None, bias)


backends.register("residual", "triton")((_triton_forward, _triton_backward))


def _setup_context(ctx, inputs, output):
    f, _, skip_gain, se, keep, alpha, activation, scale, approximate, backend, bias = inputs
    ctx.set_materialize_grads(False)
    ctx.arguments = alpha, activation, scale, approximate, backend
    ctx.bias_dtype = bias.dtype if bias is not None and bias.requires_grad else None
    has_factor_grad = skip_gain is not None or se is not None or keep is not None
    saved = output[1] if saves_output(activation, scale) else output[0]
    ctx.save_for_backward(f if has_factor_grad else None, saved, skip_gain, se, keep)


def _gradients(ctx, grad_h, grad_a):
    alpha, activation, scale, approximate, backend = ctx.arguments
    f, saved, skip_gain, se, keep = ctx.saved_tensors
    branch = Branch(skip_gain, se, keep, alpha)
    if grad_a is None:
        if grad_h is None:
            return (None,) * 11
        if branch.is_one and ctx.bias_dtype is None:
            return grad_h, grad_h, *[None] * 9
        grad_a = torch.zeros_like(saved)
    if torch.is_grad_enabled():  # create_graph: plain PyTorch, which can be differentiated again
        key = function_key(activation, approximate)
        grads = reference.residual_backward(grad_h, grad_a, f, saved, branch, key, scale, ctx.bias_dtype)
    else:
        grads = residual_backward(
            grad_h,
            grad_a,
            f,
            saved,
            skip_gain,
            se,
            keep,
            alpha,
            activation,
            scale,
            approximate,
            backend,
            ctx.bias_dtype,
        )
    of_tensors = iter(grads[1 if branch.is_one else 2 :])
    small = [None if tensor is None else next(of_tensors) for tensor in branch.tensors]
    return grads[0 if branch.is_one else 1], grads[0], *small, *[None] * 5, next(of_tensors, None)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, *rest):
        h, a = _forward(f, *rest, h=f)
        ctx.mark_dirty(f)
        _setup_context(ctx, (f, *rest), (h, a))
        return h, a

    backward = staticmethod(_gradients)


def overwritable(f: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel may write h over f: plain memory in h's order that none of the others shares.

    torch lets a Function that returns two tensors overwrite no view.
    """
    if type(f) is not Tensor or not is_unit_dense(f) or (f._is_view() and torch.is_grad_enabled()):
        return False
    memory, given = f.untyped_storage().data_ptr(), [other for other in others if other is not None]
    if f.is_neg() or any(other.is_neg() for other in given):  # negated when they are read
        return False
    return all(other.untyped_storage().data_ptr() != memory for other in given)


def residual_(
    f: Tensor,
    shortcut: Tensor,
    alpha: float,
    activation: str,
    scale: float,
    approximate: str,
    backend: str,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`residual` that writes h into f and returns f as h, for what `check_inplace` accepts."""
    inputs = f, shortcut, None, None, None, alpha, activation, scale, approximate, backend, bias
    if torch.compiler.is_compiling() or not overwritable(f, shortcut, bias):  # the compiler removes the copy
        h, a = residual(*inputs)
        return f.copy_(h), a
    return _InPlace.apply(*inputs)


residual = define(
    "residual(Tensor f, Tensor shortcut, Tensor? skip_gain, Tensor? se, Tensor? keep, float alpha, str activation, "
    "float scale, str approximate, str backend, Tensor? bias=None) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
residual_backward = define(
    "residual_backward(Tensor? grad_h, Tensor grad_a, Tensor? f, Tensor saved, Tensor? skip_gain, Tensor? se, "
    "Tensor? keep, float alpha, str activation, float scale, str approximate, str backend, "
    "ScalarType? bias_dtype=None, Tensor? bias=None) -> Tensor[]",
    _backward,
    _fake_backward,
)
register_autograd("residual", _gradients, _setup_context)
