"""`sgd_agc_`: a step of SGD with adaptive gradient clipping of many tensors, in place and in one pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend as backends
from ..reference import sgd_agc as reference
from ..reference.sgd_agc import Hyperparameters, Scalars
from ..reference.weight_standardize import accumulation_dtype
from .agc import RULES, address, check_gradient, check_own_memory, check_statistics, unit_count
from .library import aligned, check_choice, check_float, define, queue, same_order, unit_dense
from .snapshot import is_plain, same_objects, snapshot_of


class Tensors(NamedTuple):
    """What a step reads and writes, one entry per parameter; None for a state that a parameter does not have."""

    weights: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor | None]
    averages: list[Tensor | None]
    statistics: list[Tensor | None]
    groups: list[int]
    """which of the hyperparameters hold"""

    def subset(self, indices: Sequence[int]) -> Tensors:
        """Some of the parameters."""
        columns: list[Any] = [[column[i] for i in indices] for column in self]
        return Tensors(*columns)


class Call(NamedTuple):
    """What a step is given beside tensors."""

    hypers: list[Hyperparameters]
    """of each parameter group"""
    lrs: list[Tensor | None]
    """of each parameter group: float32 of one element, by which its lr is multiplied"""
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def scalars(self, group: int) -> Scalars:
        """The tensors that hold for a parameter group."""
        return Scalars(self.lrs[group], self.grad_scale, self.found_inf)

    def on(self, device: torch.device) -> Call:
        """The same with float32 tensors of that device."""
        moved = [
            x if x is None else x.detach().to(device, torch.float32).reshape(())
            for x in (*self.lrs, self.grad_scale, self.found_inf)
        ]
        return Call(self.hypers, moved[:-2], moved[-2], moved[-1])


def check_hyperparameters(hyper: Hyperparameters) -> None:
    """Raises ValueError or TypeError naming the first bad one."""
    numbers = {name: value for name, value in hyper._asdict().items() if not isinstance(value, bool)}
    numbers["ema_decay"] = numbers.pop("average_decay")
    for name, value in numbers.items():
        if name == "clip_factor" and value is None:
            continue
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if hyper.average_decay > 1:
        raise ValueError(f"ema_decay must be at most 1, got {hyper.average_decay}")
    if hyper.nesterov and (hyper.momentum == 0 or hyper.dampening != 0):
        raise ValueError(
            f"nesterov=True needs a momentum and no dampening, got momentum={hyper.momentum}, "
            f"dampening={hyper.dampening}"
        )


def check_tensors(tensors: Tensors, rule: str) -> None:
    """Raises ValueError or TypeError naming the first tensor that does not fit its weight."""
    columns = zip(*tensors[:5], strict=True)
    for i, (weight, grad, momentum_buffer, average, statistics) in enumerate(columns):
        check_gradient(f"parameters[{i}]", weight, grad)
        check_written(f"parameters[{i}]", weight, weight, weight.dtype)
        check_written(f"momentum_buffer of parameters[{i}]", momentum_buffer, weight, weight.dtype)
        check_written(f"ema of parameters[{i}]", average, weight, accumulation_dtype(weight.dtype))
        check_statistics(f"statistics of parameters[{i}]", statistics, weight, rule)


def check_written(name: str, tensor: Tensor | None, weight: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError or TypeError unless this is None or as the weight, with memory of its own for each element."""
    if tensor is None:
        return
    check_float(name, tensor)
    if (tensor.shape, tensor.device, tensor.dtype) != (weight.shape, weight.device, dtype):
        raise ValueError(
            f"{name} must be {tuple(weight.shape)} of {dtype} on {weight.device}, got "
            f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )
    check_own_memory(name, tensor, "clone it")


def check_scalars(call: Call) -> None:
    """Raises ValueError naming the first that is not of one element."""
    for name, tensors in (("lr_tensor", call.lrs), ("grad_scale", [call.grad_scale]), ("found_inf", [call.found_inf])):
        for tensor in tensors:
            if tensor is not None and tensor.numel() != 1:
                raise ValueError(f"{name} must have one element, got a tensor of shape {tuple(tensor.shape)}")


@torch.no_grad()
def step_(tensors: Tensors, call: Call, rule: str, backend: str) -> None:
    """A step of all parameters: a launch for those of a device, of whatever parameter groups."""
    check_choice("rule", rule, RULES)
    check_choice("backend", backend, backends.BACKENDS)
    check_scalars(call)
    check_tensors(tensors, rule)
    by_device: dict[torch.device, list[int]] = {}
    for i, weight in enumerate(tensors.weights):
        if weight.numel():
            by_device.setdefault(weight.device, []).append(i)
    kernels = {device: backends.select("sgd_agc", device.type, backend) for device in by_device}
    for device, indices in by_device.items():
        kernels[device](tensors.subset(indices), call.on(device), rule)
    torch.autograd.graph.increment_version([x for x in written(tensors) if x is not None])


def written(tensors: Tensors) -> Iterable[Tensor | None]:
    """What a step writes to."""
    return (x for column in (tensors.weights, *tensors[2:5]) for x in column)


@backends.register("sgd_agc", "reference")
def _reference(tensors: Tensors, call: Call, rule: str) -> None:
    for i, group in enumerate(tensors.groups):
        states = tensors.momentum_buffers[i], tensors.averages[i], tensors.statistics[i]
        of_group = call.hypers[group], call.scalars(group)
        reference.sgd_agc_(tensors.weights[i], tensors.grads[i], *states, *of_group, rule)


class Table:
    """A kernel's unit table (csrc/units.h) but for the gradients' addresses, of tensors that lie as a kernel wants."""

    def __init__(self, tensors: Tensors, rule: str, backend: str) -> None:
        weights = tensors.weights
        self.rule = rule
        self.backend = backend
        self.device = weights[0].device
        self.pointers = [weight.data_ptr() for weight in weights]
        self.momentum_buffers = list(map(address, tensors.momentum_buffers))
        self.averages = list(map(address, tensors.averages))
        self.statistics = list(map(address, tensors.statistics))
        self.groups = tensors.groups
        self.counts = [unit_count(weight.shape, rule) for weight in weights]
        self.lengths = [weight.numel() // count for weight, count in zip(weights, self.counts, strict=True)]
        self.dtypes = [weight.dtype for weight in weights]
        self.grad_dtypes = [grad.dtype for grad in tensors.grads]

    @functools.cached_property
    def extension(self) -> Any:
        """The table as the compiled extensions have it."""
        assert backends.extension is not None
        codes = [[backends.DTYPE_CODES[dtype] for dtype in dtypes] for dtypes in (self.dtypes, self.grad_dtypes)]
        states = self.momentum_buffers, self.averages
        return backends.extension.SgdTable(
            self.pointers, *states, self.counts, self.lengths, *codes, self.statistics, self.groups
        )

    def step_(self, addresses: Iterable[int], call: Call) -> None:
        """A step with the gradients at these addresses."""
        _STEP[self.backend](self, addresses, call)


def _configs(call: Call) -> list[Any]:
    assert backends.extension is not None
    return [backends.extension.SgdConfig(**hyper._asdict()) for hyper in call.hypers]


def _scalar_addresses(call: Call) -> tuple[list[int], int, int]:
    return list(map(address, call.lrs)), address(call.grad_scale), address(call.found_inf)


def _step_on_cpu(table: Table, addresses: Iterable[int], call: Call) -> None:
    assert backends.extension is not None
    scalars = _scalar_addresses(call)
    backends.extension.sgd_agc(table.extension, addresses, _configs(call), *scalars, torch.get_num_threads())


def _step_with_cuda(table: Table, addresses: Iterable[int], call: Call) -> None:
    assert backends.cuda_extension is not None
    scalars = _scalar_addresses(call)
    backends.cuda_extension.sgd_agc(table.extension, addresses, _configs(call), *scalars, *queue(table.device))


def _step_with_triton(table: Table, addresses: Iterable[int], call: Call) -> None:
    from ..triton_kernels import sgd_agc

    sgd_agc.sgd_agc(
        table.pointers,
        list(addresses),
        table.momentum_buffers,
        table.averages,
        table.statistics,
        table.counts,
        table.lengths,
        table.dtypes,
        table.grad_dtypes,
        table.groups,
        table.device,
        call.hypers,
        *_scalar_addresses(call),
    )


_STEP = {"cpu": _step_on_cpu, "cuda": _step_with_cuda, "triton": _step_with_triton}


def _laid_out(tensors: Tensors) -> Tensors:
    """The tensors, or copies, with units that are dense and elements in the order of the weight's."""
    weights = list(map(unit_dense, tensors.weights))

    def in_order(column: Sequence[Any]) -> list[Any]:
        return [x if x is None else aligned(x, weight) for x, weight in zip(column, weights, strict=True)]

    return tensors._replace(
        weights=weights,
        grads=in_order(tensors.grads),
        momentum_buffers=in_order(tensors.momentum_buffers),
        averages=in_order(tensors.averages),
    )


def _register(backend: str) -> None:
    @backends.register("sgd_agc", backend)
    def step(tensors: Tensors, call: Call, rule: str) -> None:
        laid_out = _laid_out(tensors)
        Table(laid_out, rule, backend).step_([grad.data_ptr() for grad in laid_out.grads], call)
        for original, stepped in zip(written(tensors), written(laid_out), strict=True):
            if original is not None and stepped is not None and original is not stepped:
                original.copy_(stepped)


for _name in _STEP:
    _register(_name)


class Repeat(NamedTuple):
    """What one step leaves for the next ones: a table, and how everything lay when it was right."""

    table: Table
    snapshot: Any
    weights: list[Tensor]
    states: list[Tensor]
    """momentum buffers, then averages"""
    addresses: list[int]
    """of the states"""

    def step_(
        self,
        parameters: list[Tensor],
        states: Sequence[Tensor | None],
        call: Call,
        rule: str,
        backend: str,
    ) -> bool:
        """`step_` without checks of the tensors; False, with nothing done, where something has changed.

        `states` are the momentum buffers and averages that there are now, in the order of the repeat's.
        """
        table = self.table
        if rule != table.rule or backends.serving("sgd_agc", table.device.type, backend) != table.backend:
            return False
        found = self.snapshot.gradients(parameters)
        if found is None or not self._has(states) or any(map(Tensor.is_neg, found[0])):  # which no snapshot sees
            return False
        backends.record("sgd_agc", table.backend)
        table.step_(found[1], call.on(table.device))
        torch.autograd.graph.increment_version(self.weights + self.states)
        return True

    def _has(self, states: Sequence[Tensor | None]) -> bool:
        """Whether these are the states that the table tells of, where they were."""
        return same_objects(states, self.states) and list(map(Tensor.data_ptr, self.states)) == self.addresses


def repeat_for(parameters: list[Tensor], tensors: Tensors, rule: str, backend: str) -> Repeat | None:
    """What serves the next steps of these parameters, where one kernel takes all tensors as they lie.

    `tensors` are those of the parameters that have a gradient.
    """
    if not tensors.weights:
        return None
    device = tensors.weights[0].device
    serving = backends.serving("sgd_agc", device.type, backend)
    plain = (is_plain(weight, grad, device) for weight, grad in zip(*tensors[:2], strict=True))
    if serving not in _STEP or not all(plain) or not _in_order_of_weights(tensors):
        return None
    states = [x for column in tensors[2:4] for x in column if x is not None]
    table = Table(tensors, rule, serving)
    return Repeat(table, snapshot_of(parameters), tensors.weights, states, list(map(Tensor.data_ptr, states)))


def _in_order_of_weights(tensors: Tensors) -> bool:
    columns = tensors[1:4]
    return all(
        x is None or same_order(x, weight)
        for column in columns
        for x, weight in zip(column, tensors.weights, strict=True)
    )


def _sgd_agc(
    weights, grads, momentum_buffers, averages, statistics, lr_tensor, grad_scale, found_inf,
    lr, momentum, dampening, weight_decay, nesterov, maximize, clip_factor, eps, ema_decay, rule, backend,
):  # fmt: skip
    hyper = Hyperparameters(lr, momentum, dampening, weight_decay, nesterov, maximize, clip_factor, eps, ema_decay)
    check_hyperparameters(hyper)
    named = {"grads": grads, "momentum_buffers": momentum_buffers, "averages": averages, "statistics": statistics}
    for name, column in named.items():
        if len(column) != len(weights) and (column or name == "grads"):
            raise ValueError(f"{name} must have an entry for each of {len(weights)} weights, got {len(column)}")
    absent: list[Tensor | None] = [None] * len(weights)
    momenta, means, counts = (list(column) or absent for column in (momentum_buffers, averages, statistics))
    tensors = Tensors(list(weights), list(grads), momenta, means, counts, [0] * len(weights))
    step_(tensors, Call([hyper], [lr_tensor], grad_scale, found_inf), rule, backend)


def _fake(
    weights, grads, momentum_buffers, averages, statistics, lr_tensor, grad_scale, found_inf,
    lr, momentum, dampening, weight_decay, nesterov, maximize, clip_factor, eps, ema_decay, rule, backend,
):  # fmt: skip
    return None


sgd_agc_ = define(
    "sgd_agc_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] averages, "
    "Tensor(d!)[] statistics, Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf, float lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize, float? clip_factor, float eps, "
    "float ema_decay, str rule, str backend) -> ()",
    _sgd_agc,
    _fake,
)
