"""`weight_standardize`: scaled weight standardization and conv preparation of a list of weights in one pass."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import backend as backends
from ..reference import weight_standardize as reference
from .library import (
    FLOAT_DTYPES,
    channels_last_format,
    check_choice,
    check_finite,
    check_float,
    check_same_device,
    define,
    dense_like,
    is_channels_last,
    queue,
    register_autograd,
    unit_dense,
)

EPS_FORMS = ("clamp", "add")
MEMORY_FORMATS = ("preserve", "contiguous", "channels_last")

_PLAIN_TYPES = Tensor, nn.Parameter


def _check_weight(i: int, weight: Tensor, gain: Tensor | None) -> None:
    check_float(f"weights[{i}]", weight)
    if weight.ndim < 2:
        raise ValueError(f"weights[{i}] must have a dim of units and a fan-in, got shape {tuple(weight.shape)}")
    if weight.numel() > 0 and weight.shape[1:].numel() == 1:
        raise ValueError(f"weights[{i}] of shape {tuple(weight.shape)} has a fan_in of 1, which standardizes to zero")
    if gain is None:
        return
    check_float(f"gains[{i}]", gain)
    if gain.numel() != weight.shape[0]:
        raise ValueError(f"gains[{i}] must have one value per unit ({weight.shape[0]}), got shape {tuple(gain.shape)}")
    if gain.dtype != weight.dtype:
        raise TypeError(f"gains[{i}] must have the weight's dtype {weight.dtype}, got {gain.dtype}")
    check_same_device(f"gains[{i}]", gain, f"weights[{i}]", weight)


def one_each(gains: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gain of each weight: `gains` holds one per weight or, where every gain is 1, none at all."""
    return gains or [None] * len(weights)


def check(
    weights: list[Tensor],
    gains: list[Tensor],
    scales: list[float],
    eps: float,
    eps_form: str,
    dtype: torch.dtype | None,
    memory_format: str,
) -> None:
    """Raises ValueError or TypeError naming the first bad argument."""
    _check_options(weights, gains, scales, eps, eps_form, dtype, memory_format)
    _check_each(weights, gains, scales)


def _check_options(weights, gains, scales, eps, eps_form, dtype, memory_format):
    if len(scales) != len(weights):
        raise ValueError(f"scales must hold one value per weight ({len(weights)}), got {len(scales)}")
    if gains and len(gains) != len(weights):
        raise ValueError(f"gains must hold one tensor per weight ({len(weights)}) or none, got {len(gains)}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    check_choice("eps_form", eps_form, EPS_FORMS)
    check_choice("memory_format", memory_format, MEMORY_FORMATS)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be one of {FLOAT_DTYPES} or None, got {dtype}")


def _check_each(weights, gains, scales):
    for i, (weight, gain, scale) in enumerate(zip(weights, one_each(gains, weights), scales, strict=True)):
        _check_weight(i, weight, gain)
        check_same_device(f"weights[{i}]", weight, "weights[0]", weights[0])
        check_finite(f"scales[{i}]", scale)


def _prepared_like(weight: Tensor, dtype: torch.dtype, memory_format: str) -> Tensor:
    """An empty tensor of the weight's shape whose units are dense, as the kernels write them."""
    if memory_format == "channels_last":
        return torch.empty_like(weight, dtype=dtype, memory_format=channels_last_format(weight))
    if memory_format == "contiguous":
        return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    return dense_like(weight, dtype)


def _fake(weights, gains, scales, eps, eps_form, dtype, memory_format, backend):
    return [_prepared_like(weight, dtype or weight.dtype, memory_format) for weight in weights]


def _forward(weights, gains, scales, eps, eps_form, dtype, memory_format, backend):
    if not weights:
        return []
    outs = _fake(weights, gains, scales, eps, eps_form, dtype, memory_format, backend)
    kernel = backends.select("weight_standardize", weights[0].device.type, backend)
    kernel(weights, gains, scales, eps, eps_form, outs=outs)
    return outs


def _backward(grad_outs, weights, gains, scales, eps, eps_form, backend):
    grad_weights, grad_gains = _fake_backward(grad_outs, weights, gains, scales, eps, eps_form, backend)
    if weights:
        kernel = backends.select("weight_standardize", weights[0].device.type, backend)
        kernel(weights, gains, scales, eps, eps_form, grads=(grad_outs, grad_weights, grad_gains))
    return grad_weights, grad_gains


def _fake_backward(grad_outs, weights, gains, scales, eps, eps_form, backend):
    return (
        [dense_like(weight) for weight in weights],
        [dense_like(gain) if gain.is_contiguous() else gain.new_empty(gain.shape) for gain in gains],
    )


@backends.register("weight_standardize", "reference")
def _reference(weights, gains, scales, eps, eps_form, outs=None, grads=None):
    if grads is None:
        for weight, gain, scale, out in zip(weights, one_each(gains, weights), scales, outs, strict=True):
            out.copy_(reference.weight_standardize(weight, gain, scale, eps, eps_form, out.dtype))
        return
    grad_outs, grad_weights, grad_gains = grads
    for i, (weight, gain) in enumerate(zip(weights, one_each(gains, weights), strict=True)):
        for_weight, for_gain = reference.weight_standardize_backward(
            grad_outs[i], weight, gain, scales[i], eps, eps_form
        )
        grad_weights[i].copy_(for_weight)
        if for_gain is not None:
            grad_gains[i].copy_(for_gain)


class _Row(NamedTuple):
    """One weight as the kernels take it; `other` is the output or, where there are gradients to write, the output's."""

    weight: Tensor
    gain: Tensor | None
    other: Tensor
    grad_weight: Tensor | None
    grad_gain: Tensor | None
    scale: float

    @property
    def inner(self) -> int:
        """Elements of the innermost dim in memory order."""
        shape = self.weight.shape
        return shape[1] if is_channels_last(self.weight) else shape[2:].numel()

    @property
    def permuted(self) -> bool:
        """Whether weight and output differ in memory order."""
        return is_channels_last(self.weight) != is_channels_last(self.other)

    def addresses(self, tensors: Sequence[Tensor | None]) -> list[int]:
        """Of these tensors, 0 where there is none."""
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _rows(weights, gains, scales, outs, grads) -> list[_Row]:
    """Rows of the weights that are not empty; the gradients of gains of empty units are zeroed."""
    others, grad_weights, grad_gains = (outs, [], []) if grads is None else grads
    rows = []
    for i, (weight, gain, other) in enumerate(zip(weights, one_each(gains, weights), others, strict=True)):
        grad_gain = grad_gains[i] if grad_gains else None
        if weight.numel() == 0:
            if grad_gain is not None:
                grad_gain.zero_()
            continue
        gain = gain if gain is None else gain.contiguous()
        grad_weight = None if grads is None else grad_weights[i]
        rows.append(_Row(unit_dense(weight), gain, unit_dense(other), grad_weight, grad_gain, scales[i]))
    return rows


@backends.register("weight_standardize", "cpu")
def _cpu(weights, gains, scales, eps, eps_form, outs=None, grads=None):
    where = (torch.get_num_threads(),)
    _run(backends.extension, where, weights, gains, scales, eps, eps_form, outs, grads)


@backends.register("weight_standardize", "cuda")
def _cuda(weights, gains, scales, eps, eps_form, outs=None, grads=None):
    where = queue(weights[0].device)
    _run(backends.cuda_extension, where, weights, gains, scales, eps, eps_form, outs, grads)


def _run(extension, where, weights, gains, scales, eps, eps_form, outs, grads):
    """Runs an extension's kernel on threads, or on a device and a stream."""
    assert backends.extension is not None
    table = _read(weights, gains, scales, *((outs, [], []) if grads is None else grads))
    if table is None:
        rows = _rows(weights, gains, scales, outs, grads)  # some hold copies, which have to live until the kernel runs
        table = backends.extension.WeightTable([_table_row(row) for row in rows], [row.scale for row in rows])
    extension.weight_standardize(table, eps, EPS_FORMS.index(eps_form), grads is not None, *where)


def _read(weights, gains, scales, outs, grad_weights, grad_gains):
    """The table of plain tensors as they lie, in a tenth of the time that `_rows` and `_check_each` take.

    None where one of them is not valid or not plain, and with torch 2.10, which does not describe its tensors.
    """
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if backends.extension is None or api is None:
        return None
    lists = weights, gains, scales, outs, grad_weights, grad_gains
    return backends.extension.WeightTable.read(api, _PLAIN_TYPES, *lists)


def _table_row(row: _Row) -> list[int]:
    """The row of csrc/bindings.cpp."""
    out, grad_out = (row.other, None) if row.grad_weight is None else (None, row.other)
    return [
        *row.addresses((row.weight, row.gain, out, grad_out, row.grad_weight, row.grad_gain)),
        backends.DTYPE_CODES[row.weight.dtype],
        backends.DTYPE_CODES[row.other.dtype],
        row.weight.shape[0],
        row.weight.shape[1:].numel(),
        row.inner,
        int(row.permuted),
    ]


@backends.register("weight_standardize", "triton")
def _triton(weights, gains, scales, eps, eps_form, outs=None, grads=None):
    from ..triton_kernels import weight_standardize as kernels
    from ..triton_kernels.table import is_aligned

    rows = _rows(weights, gains, scales, outs, grads)
    if not rows:
        return
    addresses = [row.addresses((row.weight, row.gain, row.other, row.grad_weight, row.grad_gain)) for row in rows]
    structure = [
        kernels.Weight(
            row.weight.shape[0],
            row.weight.shape[1:].numel(),
            row.inner,
            row.scale,
            row.weight.dtype,
            row.other.dtype,
            row.permuted,
            is_aligned(of_row[0], *of_row[2:4]),
        )
        for row, of_row in zip(rows, addresses, strict=True)
    ]
    pointers = [address for of_row in addresses for address in of_row]
    device = weights[0].device
    kernels.weight_standardize(structure, pointers, device, eps, eps_form == "add", bool(gains), grads is not None)


def _setup_context(ctx, inputs, output):
    weights, gains, scales, eps, eps_form, _, _, backend = inputs
    ctx.arguments = scales, eps, eps_form, backend
    ctx.count = len(weights)
    ctx.save_for_backward(*weights, *gains)


def _gradients(ctx, grad_outs):
    scales, eps, eps_form, backend = ctx.arguments
    saved = list(ctx.saved_tensors)  # once: a checkpoint unpacks them once
    weights, gains = saved[: ctx.count], saved[ctx.count :]
    if torch.is_grad_enabled():  # create_graph: plain PyTorch, which can be differentiated again
        pairs = [
            reference.weight_standardize_backward(grad_out, weight, gain, scale, eps, eps_form)
            for grad_out, weight, gain, scale in zip(grad_outs, weights, one_each(gains, weights), scales, strict=True)
        ]
        grad_weights, grad_gains = [pair[0] for pair in pairs], [pair[1] for pair in pairs if gains]
    else:
        grad_outs = list(grad_outs)
        backward = _backward if _is_plain(weights, gains, scales, grad_outs) else weight_standardize_backward
        grad_weights, grad_gains = backward(grad_outs, weights, gains, scales, eps, eps_form, backend)
    return grad_weights, grad_gains, None, None, None, None, None, None


class _WeightStandardize(torch.autograd.Function):
    """The op and its gradient without dispatcher and torch.library's wrapper, which take 5 us for a weight."""

    @staticmethod
    def forward(ctx, arguments, count, *tensors):
        inputs = [*tensors[:count]], [*tensors[count:]], *arguments
        outs = _forward(*inputs)
        _setup_context(ctx, inputs, outs)
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grad_outs):
        grad_weights, grad_gains, *_ = _gradients(ctx, grad_outs)
        return None, None, *grad_weights, *grad_gains


def _is_watched():
    """Whether a compiler, a transform or a mode is there that wants to know which ops are called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _is_plain(weights, gains, scales, grad_outs):
    """Whether the arguments are valid and the dispatcher would do no more with them than to call the op."""
    if _is_watched() or _read(weights, gains, scales, grad_outs, [], []) is None:
        return False
    return not any(map(Tensor.is_neg, (*weights, *gains, *grad_outs)))


def check_and_standardize(
    weights: list[Tensor],
    gains: list[Tensor],
    scales: list[float],
    eps: float,
    eps_form: str,
    dtype: torch.dtype | None,
    memory_format: str,
    backend: str,
) -> list[Tensor]:
    """`weight_standardize` after `check`; past the dispatcher where nothing would notice."""
    _check_options(weights, gains, scales, eps, eps_form, dtype, memory_format)
    arguments = scales, eps, eps_form, dtype, memory_format, backend
    if not _is_plain(weights, gains, scales, []):
        _check_each(weights, gains, scales)
        return weight_standardize(weights, gains, *arguments)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, *gains)):
        # Function.apply would first look for what a transform has left behind, 0.3 us for each weight and gain.
        apply = super(torch.autograd.Function, _WeightStandardize).apply
        return list(apply(arguments, len(weights), *weights, *gains))
    return _forward(weights, gains, *arguments)


weight_standardize = define(
    "weight_standardize(Tensor[] weights, Tensor[] gains, float[] scales, float eps, str eps_form, ScalarType? dtype, "
    "str memory_format, str backend) -> Tensor[]",
    _forward,
    _fake,
)
weight_standardize_backward = define(
    "weight_standardize_backward(Tensor[] grad_outs, Tensor[] weights, Tensor[] gains, float[] scales, float eps, "
    "str eps_form, str backend) -> (Tensor[], Tensor[])",
    _backward,
    _fake_backward,
)
register_autograd("weight_standardize", _gradients, _setup_context)
