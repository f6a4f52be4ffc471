"""`agc_`: adaptive gradient clipping of a list of gradients, in place and in one pass."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..reference import agc as reference
from .library import check_choice, check_float, define, is_unit_dense, unit_dense

RULES = ("timm", "deepmind")

# csrc/kernels/agc.h, `Norm`; any other p is code 3.
_NORM_CODES = {2.0: 0, 1.0: 1, math.inf: 2}


def check_options(clip_factor: float, eps: float, norm_type: float, rule: str, backend: str) -> None:
    """Raises ValueError or TypeError naming the first bad option."""
    for name, value in (("clip_factor", clip_factor), ("eps", eps), ("norm_type", norm_type)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(clip_factor) and clip_factor >= 0):
        raise ValueError(f"clip_factor must be finite and not negative, got {clip_factor}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be a p > 0 or inf, got {norm_type}")
    check_choice("rule", rule, RULES)
    check_choice("backend", backend, backends.BACKENDS)


def overlaps(tensor: Tensor) -> bool:
    """Whether two indices may share memory: some stride does not step over all that the smaller strides reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_gradient(name: str, weight: Tensor, grad: Tensor) -> None:
    """Raises ValueError or TypeError if this gradient cannot be clipped in place."""
    check_float(name, weight)
    check_float(f"{name}.grad", grad)
    if grad.shape != weight.shape:
        raise ValueError(f"{name}.grad must have the shape {tuple(weight.shape)}, got {tuple(grad.shape)}")
    if grad.device != weight.device:
        raise ValueError(f"{name}.grad must be on the device {weight.device}, got {grad.device}")
    if not grad.is_contiguous() and overlaps(grad):
        raise ValueError(
            f"{name}.grad may hold one element twice (shape {tuple(grad.shape)}, strides {grad.stride()}, as after "
            "expand()); clone it before clipping"
        )


@torch.no_grad()  # the tensors may require grad, and what follows is no part of their graph
def _agc(weights, grads, clip_factor, eps, norm_type, rule, backend):
    check_choice("rule", rule, RULES)
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for weight, grad in zip(weights, grads, strict=True):
        if weight.shape != grad.shape:
            raise ValueError(
                f"grads must have the shapes of weights, got {tuple(grad.shape)} for {tuple(weight.shape)}"
            )
        if grad.numel():
            pair = by_device.setdefault(grad.device, ([], []))
            pair[0].append(weight)
            pair[1].append(grad)
    kernels = {device: backends.select("agc", device.type, backend) for device in by_device}
    for device, (device_weights, device_grads) in by_device.items():
        kernels[device](device_weights, device_grads, clip_factor, eps, norm_type, rule)
    torch.autograd.graph.increment_version(grads)


def _fake(weights, grads, clip_factor, eps, norm_type, rule, backend):
    return None


@backends.register("agc", "reference")
def _reference(weights, grads, clip_factor, eps, norm_type, rule):
    for weight, grad in zip(weights, grads, strict=True):
        reference.agc_(weight, grad, clip_factor, eps, norm_type, rule)


def _layout(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class Table:
    """The weights' half of a kernel's unit table (csrc/units.h): the half that stays from step to step."""

    def __init__(self, weights: Sequence[Tensor], rule: str, backend: str) -> None:
        self.rule = rule
        self.backend = backend
        self.device = weights[0].device
        self.weights = list(weights)
        self.shapes = [weight.shape for weight in weights]
        self.dense = list(map(unit_dense, weights))
        self.layouts = list(map(_layout, self.weights))
        self.pointers = [weight.data_ptr() for weight in self.dense]
        self.counts = [1 if reference.is_one_unit(shape, rule) else shape[0] for shape in self.shapes]
        self.lengths = [weight.numel() // count for weight, count in zip(weights, self.counts, strict=True)]
        self.dtypes = [weight.dtype for weight in weights]
        self.codes = [backends.DTYPE_CODES[dtype] for dtype in self.dtypes]

    def fits(self, weights: Sequence[Tensor], grads: Sequence[Tensor], rule: str, backend: str) -> bool:
        """Whether it still describes these weights, and the kernel takes these gradients as they lie.

        A weight that was given other data may lie at the same address: a view of the old, or memory that was freed and
        given out again.
        """
        return (
            rule == self.rule
            and backends.serving("agc", self.device.type, backend) == self.backend
            and len(weights) == len(self.weights)
            and all(map(operator.is_, weights, self.weights))
            and list(map(_layout, weights)) == self.layouts
            and all(
                type(grad) is Tensor and grad.layout is torch.strided and grad.shape == shape and is_unit_dense(grad)
                for grad, shape in zip(grads, self.shapes, strict=True)
            )
        )

    def clip_(self, grads: Sequence[Tensor], clip_factor: float, eps: float, norm_type: float) -> None:
        """Clips dense gradients of these weights."""
        _CLIP[self.backend](self, grads, clip_factor, eps, norm_type)


def _clip_on_cpu(table: Table, grads: Sequence[Tensor], clip_factor: float, eps: float, norm_type: float) -> None:
    assert backends.extension is not None
    backends.extension.agc(
        table.pointers,
        [grad.data_ptr() for grad in grads],
        table.counts,
        table.lengths,
        table.codes,
        [backends.DTYPE_CODES[grad.dtype] for grad in grads],
        clip_factor,
        eps,
        _NORM_CODES.get(norm_type, 3),
        norm_type,
        torch.get_num_threads(),
    )


def _clip_with_triton(table: Table, grads: Sequence[Tensor], clip_factor: float, eps: float, norm_type: float) -> None:
    from ..triton_kernels import agc

    agc.agc(
        table.pointers,
        [grad.data_ptr() for grad in grads],
        table.counts,
        table.lengths,
        table.dtypes,
        [grad.dtype for grad in grads],
        table.device,
        clip_factor,
        eps,
        norm_type,
    )


_CLIP = {"cpu": _clip_on_cpu, "triton": _clip_with_triton}


def _register(backend: str) -> None:
    @backends.register("agc", backend)
    def clip(weights, grads, clip_factor, eps, norm_type, rule):
        dense = list(map(unit_dense, grads))
        Table(weights, rule, backend).clip_(dense, clip_factor, eps, norm_type)
        for grad, clipped in zip(grads, dense, strict=True):
            if grad is not clipped:
                grad.copy_(clipped)


for _name in _CLIP:
    _register(_name)


def table_for(weights: Sequence[Tensor], rule: str, backend: str) -> Table | None:
    """A table for reuse, where one kernel serves all of these weights and takes them as they lie."""
    if not weights:
        return None
    device = weights[0].device
    plain = all(type(w) in (Tensor, nn.Parameter) and w.device == device and w.numel() > 0 for w in weights)
    serving = backends.serving("agc", device.type, backend)
    if not plain or not all(map(is_unit_dense, weights)) or serving not in _CLIP:
        return None
    return Table(weights, rule, serving)


def clip_table_(table: Table, grads: list[Tensor], clip_factor: float, eps: float, norm_type: float) -> None:
    """`agc_` of gradients that fit the table, without dispatcher and checks."""
    backends.record("agc", table.backend)
    table.clip_(grads, clip_factor, eps, norm_type)
    torch.autograd.graph.increment_version(grads)


agc_ = define(
    "agc_(Tensor[] weights, Tensor(a!)[] grads, float clip_factor, float eps, float norm_type, str rule, str backend) "
    "-> ()",
    _agc,
    _fake,
)
