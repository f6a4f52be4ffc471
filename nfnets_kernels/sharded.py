"""Adaptive gradient clipping of DTensors: FSDP2 (`fully_shard`), tensor parallelism, any mesh.

Sharding along dim 0 leaves a unit (an index of dim 0) on one rank: what a rank holds is clipped as on one device. A
tensor that is one unit, such as a bias, and one sharded along another dim have units spread over ranks: their norms
come from sums that the ranks add up, those of all tensors in one small all-reduce.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import ops
from .reference import agc as reference

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, replicated ones too."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    dtensors = sys.modules.get("torch.distributed.tensor")  # there is no DTensor before somebody imports it
    return dtensors is not None and isinstance(tensor, dtensors.DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, in the DTensor's own memory; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    held: Any = tensor.to_local()  # type: ignore[attr-defined]
    return held.wait() if hasattr(held, "wait") else held  # one that a collective is still writing


def reshape_scalars_(module: ModuleT) -> ModuleT:
    """Gives scalar parameters, such as the skip gains of NF networks, the shape (1,): `fully_shard` takes no scalars.

    To be called after loading weights and before `fully_shard` and optimizers. A checkpoint of the network then fits
    networks without this: torch loads (1,) into ().

    Returns:
        `module` itself.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim == 0:
                vector = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                setattr(part, name, vector)
    return module


def reject_flat_parameters(parameters: Iterable[Tensor]) -> None:
    """Raises TypeError for parameters of FullyShardedDataParallel (FSDP1), with use_orig_params or without."""
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        raise TypeError(
            "parameters must not be those of FullyShardedDataParallel: it flattens them into one vector and cuts that "
            "anywhere, so that no rank knows a unit's elements; shard with torch.distributed.fsdp.fully_shard instead"
        )


# Gives for a parameter the counts of the units that this rank holds, see `nfnets_kernels.reference.agc.count_`.
Counts = Callable[[Tensor], Tensor]


@torch.no_grad()
def clip_sharded_(
    parameters: Sequence[Tensor],
    clip_factor: float,
    eps: float,
    norm_type: float,
    *,
    rule: str,
    backend: str,
    counts: Counts | None = None,
) -> None:
    """`nfnets_kernels.agc_` of DTensors, and of plain tensors among them.

    A collective call: every rank of a mesh has to make it with the same parameters. Tensors with spread units (see
    `split`) take one all-reduce together for each set of ranks that they are spread over; the others, and a mesh
    without spread units, take no communication. `backend` serves the others.

    Args:
        parameters: tensors with `.grad`; one without gradient is skipped, one that comes twice is clipped once.
        clip_factor, eps, norm_type, rule, backend: see `nfnets_kernels.agc_`.
        counts: where what happens to units is counted; None: nowhere.

    Raises:
        TypeError, ValueError: as `nfnets_kernels.agc_`, and for a gradient placed in a way that `split` rejects.
        RuntimeError: the collective's own, such as torch.distributed.DistBackendError, where a rank is gone. No
            gradient of a DTensor is written then.
    """
    ops.agc.check_options(clip_factor, eps, norm_type, rule, backend)
    whole, spread = split(parameters, rule)
    clip_spread_(spread, clip_factor, eps, norm_type, rule, counts)
    grads: list[Any] = [parameter.grad for parameter in whole]
    statistics = None if counts is None else list(map(counts, whole))
    tensors = list(map(local, whole)), list(map(local, grads))
    ops.agc.agc_(*tensors, clip_factor, eps, norm_type, rule, backend, statistics)
    torch.autograd.graph.increment_version([grad for grad in grads if is_sharded(grad)])


def split(parameters: Sequence[Tensor], rule: str) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters with a gradient whose units are whole on this rank, and those that `clip_spread_` clips.

    Of the former, `ops.agc.agc_` clips what is `local`. The latter have units spread over ranks, or a gradient that is
    a pending sum (Partial) of a replicated parameter. They include those that have no gradient on this rank but may
    have one on another, so that all ranks reduce as many numbers.

    Raises:
        TypeError, ValueError: as `nfnets_kernels.agc_`; a gradient of a DTensor must be a DTensor of the same mesh and
            placements, or, where the parameter is replicated, a pending sum or average.
    """
    whole, spread, seen = [], [], set()
    for i, parameter in enumerate(parameters):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        grad = parameter.grad
        if grad is not None:
            _check_gradient(f"parameters[{i}]", parameter, grad)
        if _is_spread(parameter, rule):
            spread.append(parameter)
        elif grad is not None:
            whole.append(parameter)
    return whole, spread


def _check_gradient(name: str, parameter: Any, grad: Any) -> None:
    """`ops.agc.check_gradient` of what is local, once that is clear for both to be the same part of the whole."""
    if not is_sharded(parameter):
        ops.agc.check_gradient(name, parameter, grad)
        return
    if not is_sharded(grad):
        raise TypeError(f"{name}.grad must be a DTensor as {name} is, got {type(grad).__name__}")
    if grad.shape != parameter.shape:
        raise ValueError(f"{name}.grad must have the shape {tuple(parameter.shape)}, got {tuple(grad.shape)}")
    if grad.device_mesh != parameter.device_mesh:
        raise ValueError(f"{name}.grad must be on the mesh {parameter.device_mesh}, got {grad.device_mesh}")
    for placement, wanted in zip(grad.placements, parameter.placements, strict=True):
        pending = wanted.is_replicate() and placement.is_partial() and placement.reduce_op in ("sum", "avg")
        if wanted.is_partial() or not (placement == wanted or pending):
            raise ValueError(
                f"{name} must be sharded or replicated and {name}.grad placed as it is (or Partial where it is "
                f"replicated), got {parameter.placements} and {grad.placements}; see DTensor.redistribute"
            )
    ops.agc.check_gradient(name, local(parameter), local(grad))


def _is_spread(parameter: Any, rule: str) -> bool:
    if not is_sharded(parameter):
        return False
    if parameter.grad is None:
        return parameter.requires_grad and bool(_spread_over(parameter, rule))
    return parameter.grad.placements != parameter.placements or bool(_spread_over(parameter, rule))


def _spread_over(parameter: Any, rule: str) -> list[int]:
    """The dims of the mesh whose ranks hold parts of one unit."""
    one_unit = reference.is_one_unit(parameter.shape, rule)
    return [
        dim
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and (one_unit or placement.dim != 0) and parameter.device_mesh.size(dim) > 1
    ]


@torch.no_grad()
def clip_spread_(
    parameters: Sequence[Tensor],
    clip_factor: float,
    eps: float,
    norm_type: float,
    rule: str,
    counts: Counts | None = None,
) -> None:
    """Clips the gradients of DTensors, wherever their units are: one all-reduce per set of ranks and device.

    Norms are taken in float64. A pending sum is reduced once more, for its norm alone; scaling is linear, so its terms
    are clipped as they are.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        by_device.setdefault(parameter.device, []).append(parameter)
    for tensors in by_device.values():
        norms = list(map(torch.stack, zip(*_local_norms(tensors, norm_type, rule), strict=True)))
        weight_norms, grad_norms = torch.cat(_reduced(norms, tensors, norm_type, rule), dim=1)
        decision = reference.decide(weight_norms, grad_norms, clip_factor, eps)
        sizes = [norm.shape[1] for norm in norms]
        of_parameter = map(reference.Decision, *(column.split(sizes) for column in decision))
        for parameter, decided in zip(tensors, of_parameter, strict=True):
            if parameter.grad is not None:
                _scale_(parameter, decided.factor)
                if counts is not None:
                    reference.count_(counts(parameter), decided)


def _scale_(parameter: Any, factors: Tensor) -> None:
    """Multiplies the units of a gradient that this rank holds."""
    local(parameter.grad).mul_(factors.view([-1, *[1] * (parameter.ndim - 1)][: parameter.ndim]))
    torch.autograd.graph.increment_version(parameter.grad)


def local_units(parameter: Tensor, rule: str) -> int:
    """Units that this rank decides on."""
    if reference.is_one_unit(parameter.shape, rule):  # the rule is for the whole tensor: a shard may look like a vector
        return min(parameter.numel(), 1)
    return local(parameter).shape[0]


def _local_norms(parameters: Sequence[Any], norm_type: float, rule: str) -> tuple[list[Tensor], list[Tensor]]:
    """Norms (units,) of what this rank holds of each unit of parameters and gradients, 0 for what it does not hold."""
    grads: list[Any] = []
    for parameter in parameters:
        grad = parameter.grad
        pending = grad is not None and grad.placements != parameter.placements
        grads.append(grad.redistribute(placements=parameter.placements) if pending else grad)
    units = [local_units(parameter, rule) for parameter in parameters]
    one_unit = [reference.is_one_unit(parameter.shape, rule) for parameter in parameters]

    def norms_of(tensors: Sequence[Any]) -> list[Tensor]:
        held = [None if x is None or local(x).numel() == 0 else local(x) for x in tensors]
        vectors = [x for x, is_one in zip(held, one_unit, strict=True) if is_one and x is not None]
        of_vectors = iter(torch._foreach_norm(vectors, norm_type, dtype=torch.float64) if vectors else ())
        norms = []
        for x, count, is_one in zip(held, units, one_unit, strict=True):
            if x is None:
                norm = torch.zeros(count, dtype=torch.float64, device=parameters[0].device)
            elif is_one:
                norm = next(of_vectors).view(1)
            else:
                norm = torch.linalg.vector_norm(x, norm_type, dim=tuple(range(1, x.ndim)), dtype=torch.float64)
            norms.append(norm)
        return norms

    return norms_of(parameters), norms_of(grads)


def _reduced(norms: Sequence[Tensor], parameters: Sequence[Any], norm_type: float, rule: str) -> list[Tensor]:
    """The norms of whole units, from those of each rank's part."""
    # In the order of the parameters, which all ranks share; by members, since meshes may have groups of their own.
    spread_over: dict[tuple[int, ...], tuple[Any, list[int]]] = {}
    for i, parameter in enumerate(parameters):
        for dim in _spread_over(parameter, rule):
            group = parameter.device_mesh.get_group(dim)
            members = tuple(torch.distributed.get_process_group_ranks(group))
            spread_over.setdefault(members, (group, []))[1].append(i)
    norms = list(norms)
    for group, indices in spread_over.values():
        whole = _all_reduced(torch.cat([norms[i] for i in indices], dim=1), norm_type, group)
        for i, norm in zip(indices, whole.split([norms[i].shape[1] for i in indices], dim=1), strict=True):
            norms[i] = norm
    return norms


def _all_reduced(norms: Tensor, norm_type: float, group: Any) -> Tensor:
    """The norms of vectors of which every rank has the norm of a part."""
    reduce_op = torch.distributed.ReduceOp
    if math.isinf(norm_type):
        # As integers, floats that are not negative have the same order and NaN comes last; float maxima may drop it.
        bits = norms.abs().view(torch.int64)
        torch.distributed.all_reduce(bits, reduce_op.MAX, group)
        return bits.view(torch.float64)
    powers = norms.pow(norm_type)
    torch.distributed.all_reduce(powers, reduce_op.SUM, group)
    return powers.pow(1 / norm_type)
