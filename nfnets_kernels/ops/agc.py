"""`agc_`: adaptive gradient clipping of a list of gradients, in place and in one pass."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..reference import agc as reference
from .library import check_choice, check_float, define, queue, unit_dense
from .snapshot import Snapshot, is_plain, snapshot_of

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


def check_own_memory(name: str, tensor: Tensor, advice: str) -> None:
    """Raises ValueError unless each element has memory of its own."""
    if not tensor.is_contiguous() and overlaps(tensor):
        raise ValueError(
            f"{name} may hold one element twice (shape {tuple(tensor.shape)}, strides {tensor.stride()}, as after "
            f"expand()); {advice}"
        )


def check_gradient(name: str, weight: Tensor, grad: Tensor) -> None:
    """Raises ValueError or TypeError if this gradient cannot be clipped in place."""
    check_float(name, weight)
    check_float(f"{name}.grad", grad)
    if grad.shape != weight.shape:
        raise ValueError(f"{name}.grad must have the shape {tuple(weight.shape)}, got {tuple(grad.shape)}")
    if grad.device != weight.device:
        raise ValueError(f"{name}.grad must be on the device {weight.device}, got {grad.device}")
    check_own_memory(f"{name}.grad", grad, "clone it before clipping")


def unit_count(shape: torch.Size, rule: str) -> int:
    """Units of a tensor with elements."""
    return 1 if reference.is_one_unit(shape, rule) else shape[0]


def check_statistics(name: str, statistics: Tensor | None, weight: Tensor, rule: str) -> None:
    """Raises ValueError unless kernels, which know addresses alone, can count all units of the weight in them."""
    if statistics is None:
        return
    units = unit_count(weight.shape, rule) if weight.numel() else 0
    fits = statistics.ndim == 2 and statistics.shape[0] >= units and statistics.shape[1] == 3
    kind = statistics.dtype, statistics.device, statistics.is_contiguous()
    if not fits or kind != (torch.float32, weight.device, True):
        raise ValueError(
            f"{name} must be ({units}, 3) of {torch.float32}, contiguous, on {weight.device}, got "
            f"{tuple(statistics.shape)} of {statistics.dtype} with strides {statistics.stride()} on {statistics.device}"
        )


def listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """One tensor or several as a list; raises TypeError for what is none."""
    if isinstance(parameters, Tensor):
        return [parameters]
    if not isinstance(parameters, Iterable) or isinstance(parameters, nn.Module):
        raise TypeError(f"parameters must be a tensor or an iterable of tensors, got {type(parameters).__name__}")
    tensors = list(parameters)
    for i, parameter in enumerate(tensors):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{i}] must be a tensor, got {type(parameter).__name__}")
    return tensors


def with_gradients(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, each once, and the gradients, which can all be clipped in place."""
    weights: list[Tensor] = []
    grads: list[Tensor] = []
    seen = set()
    for i, parameter in enumerate(parameters):
        grad = parameter.grad
        if grad is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            check_gradient(f"parameters[{i}]", parameter, grad)
            weights.append(parameter)
            grads.append(grad)
    return weights, grads


@torch.no_grad()  # the tensors may require grad, and what follows is no part of their graph
def _agc(weights, grads, clip_factor, eps, norm_type, rule, backend, statistics=None):
    check_choice("rule", rule, RULES)
    counted = statistics or [None] * len(weights)
    by_device: dict[torch.device, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    for i, (weight, grad, counts) in enumerate(zip(weights, grads, counted, strict=True)):
        check_statistics(f"statistics[{i}]", counts, weight, rule)
        if weight.shape != grad.shape:
            raise ValueError(
                f"grads must have the shapes of weights, got {tuple(grad.shape)} for {tuple(weight.shape)}"
            )
        if grad.numel():
            by_device.setdefault(grad.device, []).append((weight, grad, counts))
    kernels = {device: backends.select("agc", device.type, backend) for device in by_device}
    for device, tensors in by_device.items():
        on_device = map(list, zip(*tensors, strict=True))
        kernels[device](*on_device, clip_factor, eps, norm_type, rule)
    torch.autograd.graph.increment_version([*grads, *(statistics or ())])


def _fake(weights, grads, clip_factor, eps, norm_type, rule, backend, statistics=None):
    return None


@backends.register("agc", "reference")
def _reference(weights, grads, statistics, clip_factor, eps, norm_type, rule):
    for weight, grad, counts in zip(weights, grads, statistics, strict=True):
        reference.agc_(weight, grad, clip_factor, eps, norm_type, rule, counts)


def address(tensor: Tensor | None) -> int:
    """Where a tensor starts; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


class Table:
    """A kernel's unit table (csrc/units.h) but for the gradients' addresses: what stays from step to step."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        statistics: Sequence[Tensor | None],
        rule: str,
        backend: str,
    ) -> None:
        self.rule = rule
        self.backend = backend
        self.device = weights[0].device
        self.dense = list(map(unit_dense, weights))
        self.pointers = [weight.data_ptr() for weight in self.dense]
        self.counts = [unit_count(weight.shape, rule) for weight in weights]
        self.lengths = [weight.numel() // count for weight, count in zip(weights, self.counts, strict=True)]
        self.dtypes = [weight.dtype for weight in weights]
        self.grad_dtypes = [grad.dtype for grad in grads]
        self.statistics = list(map(address, statistics))

    @functools.cached_property
    def extension(self) -> Any:
        """The table as the compiled extensions have it."""
        assert backends.extension is not None
        codes = [[backends.DTYPE_CODES[dtype] for dtype in dtypes] for dtypes in (self.dtypes, self.grad_dtypes)]
        return backends.extension.AgcTable(self.pointers, self.counts, self.lengths, *codes, self.statistics)

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
        table.statistics,
    )


_CLIP = {"cpu": _clip_on_cpu, "cuda": _clip_with_cuda, "triton": _clip_with_triton}


def _register(backend: str) -> None:
    @backends.register("agc", backend)
    def clip(weights, grads, statistics, clip_factor, eps, norm_type, rule):
        dense = list(map(unit_dense, grads))
        addresses = [grad.data_ptr() for grad in dense]
        Table(weights, grads, statistics, rule, backend).clip_(addresses, clip_factor, eps, norm_type)
        for grad, clipped in zip(grads, dense, strict=True):
            if grad is not clipped:
                grad.copy_(clipped)


for _name in _CLIP:
    _register(_name)


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


def repeat_for(
    parameters: list[Tensor], rule: str, backend: str, counts: Callable[[Tensor], Tensor] | None = None
) -> Repeat | None:
    """What serves the next steps of these parameters, where one kernel takes all of them as they lie.

    `counts` gives a parameter's counts, where there are any.
    """
    pairs = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not pairs:
        return None
    device = pairs[0][0].device
    serving = backends.serving("agc", device.type, backend)
    if serving not in _CLIP or not all(is_plain(weight, grad, device) for weight, grad in pairs):
        return None
    weights, grads = zip(*pairs, strict=True)
    statistics = [None] * len(weights) if counts is None else list(map(counts, weights))
    table = Table(weights, grads, statistics, rule, serving)
    table.dense.clear()  # they are the weights themselves, which others own
    return Repeat(table, snapshot_of(parameters))


# What recent calls of `agc_` left, by what tells calls apart: a training loop calls it again and again with the same
# parameters, and checking all of them takes Python 3 us each. Nothing here keeps a parameter alive.
_recent: dict[tuple[Any, ...], Repeat] = {}
_MOST_RECENT = 16


def clip_again_(
    parameters: list[Tensor], clip_factor: float, eps: float, norm_type: float, rule: str, backend: str
) -> bool:
    """`agc_` of parameters as a recent call left them; False, with nothing done, where there is none such.

    Modes that watch what torch dispatches get to see the op.
    """
    repeat = _recent.get(_key(parameters, rule, backend))
    if repeat is None or torch._C._len_torch_dispatch_stack():
        return False
    return repeat.clip_(parameters, clip_factor, eps, norm_type, rule, backend)


def remember(parameters: list[Tensor], rule: str, backend: str) -> None:
    """Keeps what serves the next calls with these parameters, where that can be."""
    if len({*map(id, parameters)}) < len(parameters):  # one that comes twice is to be clipped once
        return
    repeat = repeat_for(parameters, rule, backend)
    if repeat is None or isinstance(repeat.snapshot, Snapshot):  # which holds its parameters
        return
    key = _key(parameters, rule, backend)
    _recent.pop(key, None)
    while len(_recent) >= _MOST_RECENT:
        _recent.pop(next(iter(_recent)), None)
    _recent[key] = repeat


def _key(parameters: list[Tensor], rule: str, backend: str) -> tuple[Any, ...]:
    return (id(parameters[0]) if parameters else None, len(parameters), rule, backend)


agc_ = define(
    "agc_(Tensor[] weights, Tensor(a!)[] grads, float clip_factor, float eps, float norm_type, str rule, str backend, "
    "Tensor(b!)[]? statistics=None) -> ()",
    _agc,
    _fake,
)
