"""`agc_`: adaptive gradient clipping of a list of gradients, in place and in one pass."""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..reference import agc as reference
from .library import check_choice, check_float, define, is_unit_dense, queue, unit_dense

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


class Table:
    """A kernel's unit table (csrc/units.h) but for the gradients' addresses: what stays from step to step."""

    def __init__(self, weights: Sequence[Tensor], grads: Sequence[Tensor], rule: str, backend: str) -> None:
        self.rule = rule
        self.backend = backend
        self.device = weights[0].device
        self.dense = list(map(unit_dense, weights))
        self.pointers = [weight.data_ptr() for weight in self.dense]
        self.counts = [1 if reference.is_one_unit(weight.shape, rule) else weight.shape[0] for weight in weights]
        self.lengths = [weight.numel() // count for weight, count in zip(weights, self.counts, strict=True)]
        self.dtypes = [weight.dtype for weight in weights]
        self.grad_dtypes = [grad.dtype for grad in grads]

    @functools.cached_property
    def extension(self) -> Any:
        """The table as the compiled extensions have it."""
        assert backends.extension is not None
        codes = [[backends.DTYPE_CODES[dtype] for dtype in dtypes] for dtypes in (self.dtypes, self.grad_dtypes)]
        return backends.extension.AgcTable(self.pointers, self.counts, self.lengths, *codes)

    def clip_(self, addresses: Iterable[int], clip_factor: float, eps: float, norm_type: float) -> None:
        """Clips the dense gradients at these addresses: a list, or the extension's own."""
        _CLIP[self.backend](self, addresses, clip_factor, eps, norm_type)


def _clip_on_cpu(table: Table, addresses: Iterable[int], clip_factor: float, eps: float, norm_type: float) -> None:
    assert backends.extension is not None
    code = _NORM_CODES.get(norm_type, 3)
    backends.extension.agc(table.extension, addresses, clip_factor, eps, code, norm_type, torch.get_num_threads())


def _clip_with_cuda(table: Table, addresses: Iterable[int], clip_factor: float, eps: float, norm_type: float) -> None:
    assert backends.cuda_extension is not None
    code = _NORM_CODES.get(norm_type, 3)
    backends.cuda_extension.agc(table.extension, addresses, clip_factor, eps, code, norm_type, *queue(table.device))


def _clip_with_triton(table: Table, addresses: Iterable[int], clip_factor: float, eps: float, norm_type: float) -> None:
    from ..triton_kernels import agc

    agc.agc(
        table.pointers,
        list(addresses),
        table.counts,
        table.lengths,
        table.dtypes,
        table.grad_dtypes,
        table.device,
        clip_factor,
        eps,
        norm_type,
    )


_CLIP = {"cpu": _clip_on_cpu, "cuda": _clip_with_cuda, "triton": _clip_with_triton}


def _register(backend: str) -> None:
    @backends.register("agc", backend)
    def clip(weights, grads, clip_factor, eps, norm_type, rule):
        dense = list(map(unit_dense, grads))
        addresses = [grad.data_ptr() for grad in dense]
        Table(weights, grads, rule, backend).clip_(addresses, clip_factor, eps, norm_type)
        for grad, clipped in zip(grads, dense, strict=True):
            if grad is not clipped:
                grad.copy_(clipped)


for _name in _CLIP:
    _register(_name)


def _layout(tensor: Tensor | None) -> Any:
    """What a snapshot holds of a tensor, but for its address; sparse ones are not compared, they never fit."""
    if tensor is None or tensor.layout is not torch.strided:
        return tensor if tensor is None else tensor.layout
    return type(tensor), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


class Snapshot:
    """How plain parameters and their gradients lie; csrc/python/snapshot.h is the same, in a tenth of the time."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._grad_layouts = [_layout(parameter.grad) for parameter in parameters]
        self._state = self._state_of_those_with_gradient()

    def _state_of_those_with_gradient(self) -> list[Any]:
        """The others may be anything: nothing is done to them."""
        pairs = zip(self._parameters, self._grad_layouts, strict=True)
        return [(_layout(parameter), parameter.data_ptr()) for parameter, grad in pairs if grad is not None]

    def gradients(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], Iterable[int]] | None:
        """The gradients that are not None, and their addresses.

        None where these are other parameters, a parameter's memory or layout changed, or a gradient's layout did.
        Memory alone says little: a parameter that was given other data may lie where it lay, in a view of the old, or
        in memory that was freed and given out again.
        """
        if len(parameters) != len(self._parameters) or not all(map(operator.is_, parameters, self._parameters)):
            return None
        grads = [parameter.grad for parameter in parameters]
        if list(map(_layout, grads)) != self._grad_layouts or self._state_of_those_with_gradient() != self._state:
            return None
        there = [grad for grad in grads if grad is not None]
        return there, [grad.data_ptr() for grad in there]


def snapshot_of(parameters: list[Tensor]) -> Any:
    """The compiled Snapshot where torch (2.11 and newer) describes its tensors to it, else the one above."""
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    compiled = backends.extension.Snapshot.take(parameters, api) if backends.extension and api else None
    return compiled or Snapshot(parameters)


class Repeat(NamedTuple):
    """What one step leaves for the next ones: a table, and how everything lay when it was right."""

    table: Table
    snapshot: Any

    def clip_(
        self, parameters: list[Tensor], clip_factor: float, eps: float, norm_type: float, rule: str, backend: str
    ) -> bool:
        """`agc_` without dispatcher and checks; False, with nothing done, where something has changed."""
        table = self.table
        if rule != table.rule or backends.serving("agc", table.device.type, backend) != table.backend:
            return False
        found = self.snapshot.gradients(parameters)
        if found is None:
            return False
        grads, addresses = found
        backends.record("agc", table.backend)
        table.clip_(addresses, clip_factor, eps, norm_type)
        torch.autograd.graph.increment_version(grads)
        return True


def _is_plain(weight: Tensor, grad: Tensor, device: torch.device) -> bool:
    """Whether a kernel takes both as they lie."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and type(grad) is Tensor
        and weight.layout is grad.layout is torch.strided
        and weight.device == grad.device == device
        and {weight.dtype, grad.dtype} <= backends.DTYPE_CODES.keys()
        and weight.shape == grad.shape
        and weight.numel() > 0
        and is_unit_dense(weight)
        and is_unit_dense(grad)
    )


def repeat_for(parameters: list[Tensor], rule: str, backend: str) -> Repeat | None:
    """What serves the next steps of these parameters, where one kernel takes all of them as they lie."""
    pairs = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not pairs:
        return None
    device = pairs[0][0].device
    serving = backends.serving("agc", device.type, backend)
    if serving not in _CLIP or not all(_is_plain(weight, grad, device) for weight, grad in pairs):
        return None
    weights, grads = zip(*pairs, strict=True)
    return Repeat(Table(weights, grads, rule, serving), snapshot_of(parameters))


agc_ = define(
    "agc_(Tensor[] weights, Tensor(a!)[] grads, float clip_factor, float eps, float norm_type, str rule, str backend) "
    "-> ()",
    _agc,
    _fake,
)
