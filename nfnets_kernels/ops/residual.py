"""`residual`: the end of a block and the start of the next one in one pass.

`h = alpha * skip_gain * keep * gate * f + shortcut` and `a = scale * act(h)`, with gate = 2 * sigmoid(se).
"""

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
    register_autograd,
)
from .scaled_activation import APPROXIMATIONS, CPU_CODES, saves_output, scaled_activation_backward

# The elementwise ones: h and a have one shape.
ACTIVATIONS = tuple(name for name in GAMMA if name not in ("glu", "log_softmax"))


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
    for name, tensor, shape in (("skip_gain", skip_gain, ()), ("se", se, f.shape[:2]), ("keep", keep, f.shape[:1])):
        if tensor is None:
            continue
        check_float(name, tensor)
        check_same_device(name, tensor, "f", f)
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("approximate", approximate, APPROXIMATIONS)
    for name, value in (("alpha", alpha), ("scale", scale)):
        check_finite(name, value)


def _fake(f, shortcut, skip_gain, se, keep, alpha, activation, scale, approximate, backend):
    return dense_like(f), dense_like(f)


def _forward(f, shortcut, skip_gain, se, keep, alpha, activation, scale, approximate, backend):
    key = function_key(activation, approximate)
    kernel, _ = backends.select("residual", f.device.type, backend, key)
    h, a = dense_like(f), dense_like(f)
    kernel(f, shortcut, Branch(skip_gain, se, keep, alpha), key, scale, h, a)
    return h, a


def _fake_backward(grad_h, grad_a, f, saved, skip_gain, se, keep, alpha, activation, scale, approximate, backend):
    """As `reference.residual_backward` returns them."""
    branch = Branch(skip_gain, se, keep, alpha)
    grads = [dense_like(saved) for _ in range(1 if branch.is_one else 2)]
    if f is not None:
        grads += [torch.empty_like(x, memory_format=torch.contiguous_format) for x in branch.tensors if x is not None]
    return grads


def _backward(grad_h, grad_a, f, saved, skip_gain, se, keep, alpha, activation, scale, approximate, backend):
    """grad_h is None where h has no further use, as before a projection."""
    key = function_key(activation, approximate)
    branch = Branch(skip_gain, se, keep, alpha)
    if grad_h is None and branch.is_one:
        return [scaled_activation_backward(grad_a, saved, activation, scale, approximate, backend)]
    _, kernel = backends.select("residual", saved.device.type, backend, key)
    grads = _fake_backward(
        grad_h, grad_a, f, saved, skip_gain, se, keep, alpha, activation, scale, approximate, backend
    )
    kernel(grad_h, grad_a, f, saved, branch, key, scale, grads)
    return grads


def _reference_forward(f, shortcut, branch, key, scale, h, a):
    for out, value in zip((h, a), reference.residual(f, shortcut, branch, key, scale), strict=True):
        out.copy_(value)


def _reference_backward(grad_h, grad_a, f, saved, branch, key, scale, grads):
    values = reference.residual_backward(grad_h, grad_a, f, saved, branch, key, scale)
    for out, value in zip(grads, values, strict=True):
        out.copy_(value)


backends.register("residual", "reference")((_reference_forward, _reference_backward))


def _cpu_call(tensors, like, key, scale):
    """tensors: in the order of csrc/units.h's ResidualTensor; `like` gives shape and memory order."""
    assert backends.extension is not None
    samples, channels = like.shape[:2]
    backends.extension.residual(
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        backends.DTYPE_CODES[like.dtype],
        samples,
        channels,
        like[0, 0].numel() if like.numel() else 0,
        is_channels_last(like),
        CPU_CODES[key],
        scale,
        torch.get_num_threads(),
    )


def _cpu_forward(f, shortcut, branch, key, scale, h, a):
    product = reference.factor(h, branch)
    _cpu_call([aligned(f, h), aligned(shortcut, h), h, a, *[None] * 5, product, None], h, key, scale)


def _cpu_backward(grad_h, grad_a, f, saved, branch, key, scale, grads):
    grad_shortcut, grad_f = grads[0], None if branch.is_one else grads[1]
    product = reference.factor(saved, branch)
    sums = None
    if f is not None:
        f = aligned(f, grad_shortcut)
        # zeros: in channels_last order the kernel adds pixel by pixel
        sums = saved.new_zeros(saved.shape[:2], dtype=accumulation_dtype(saved.dtype))
    grad_h = torch.zeros_like(saved) if grad_h is None else grad_h
    grad_h, grad_a, saved = (aligned(tensor, grad_shortcut) for tensor in (grad_h, grad_a, saved))
    tensors = [f, None, None, None, grad_h, grad_a, saved, grad_shortcut, grad_f, product, sums]
    _cpu_call(tensors, grad_shortcut, key, scale)
    if sums is not None:
        for out, value in zip(grads[2:], reference.factor_backward(sums, saved, branch), strict=True):
            out.copy_(value)


backends.register("residual", "cpu", variants=tuple(CPU_CODES))((_cpu_forward, _cpu_backward))


def _triton_forward(f, shortcut, branch, key, scale, h, a):
    from ..triton_kernels import residual as kernels

    kernels.residual(aligned(f, h), aligned(shortcut, h), branch, key, scale, h, a)


def _triton_backward(grad_h, grad_a, f, saved, branch, key, scale, grads):
    from ..triton_kernels import residual as kernels

    grad_h, grad_a, f, saved = (None if x is None else aligned(x, grads[0]) for x in (grad_h, grad_a, f, saved))
    kernels.residual_backward(grad_h, grad_a, f, saved, branch, key, scale, grads)


backends.register("residual", "triton")((_triton_forward, _triton_backward))


def _setup_context(ctx, inputs, output):
    f, _, skip_gain, se, keep, alpha, activation, scale, approximate, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.arguments = alpha, activation, scale, approximate, backend
    has_factor_grad = skip_gain is not None or se is not None or keep is not None
    saved = output[1] if saves_output(activation, scale) else output[0]
    ctx.save_for_backward(f if has_factor_grad else None, saved, skip_gain, se, keep)


def _gradients(ctx, grad_h, grad_a):
    alpha, activation, scale, approximate, backend = ctx.arguments
    f, saved, skip_gain, se, keep = ctx.saved_tensors
    branch = Branch(skip_gain, se, keep, alpha)
    if grad_a is None:
        if grad_h is None:
            return (None,) * 10
        if branch.is_one:
            return grad_h, grad_h, *[None] * 8
        grad_a = torch.zeros_like(saved)
    if torch.is_grad_enabled():  # create_graph: plain PyTorch, which can be differentiated again
        key = function_key(activation, approximate)
        grads = reference.residual_backward(grad_h, grad_a, f, saved, branch, key, scale)
    else:
        grads = residual_backward(
            grad_h, grad_a, f, saved, skip_gain, se, keep, alpha, activation, scale, approximate, backend
        )
    of_tensors = iter(grads[2:])
    small = [None if tensor is None else next(of_tensors) for tensor in branch.tensors]
    return grads[0 if branch.is_one else 1], grads[0], *small, *[None] * 5


residual = define(
    "residual(Tensor f, Tensor shortcut, Tensor? skip_gain, Tensor? se, Tensor? keep, float alpha, str activation, "
    "float scale, str approximate, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
residual_backward = define(
    "residual_backward(Tensor? grad_h, Tensor grad_a, Tensor? f, Tensor saved, Tensor? skip_gain, Tensor? se, "
    "Tensor? keep, float alpha, str activation, float scale, str approximate, str backend) -> Tensor[]",
    _backward,
    _fake_backward,
)
register_autograd("residual", _gradients, _setup_context)
