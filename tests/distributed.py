"""Functions that run in several gloo processes on this machine, and what they share: meshes, DTensors, clipping."""

import datetime
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import nfnets_kernels as nfk
from nfnets_kernels.sharded import clip_sharded_, is_sharded

from .agc_cases import assert_clipped, float64_clipped, parameter, random_pair, unit_length

# Of a collective that a rank does not join; and of all functions of a run together.
COLLECTIVE_SECONDS, RUN_SECONDS = 30, 120


def run(world: int, functions: Sequence[Callable[[], None]], folder: Path) -> dict[str, str]:
    """Calls the functions, one after the other, on each of `world` ranks; returns the tracebacks of those that raised.

    A process takes seconds to import torch: one run should have many functions. Each starts from seed 0, on one thread.
    A rank stops where one raises: the ranks may then no longer agree on the next collective. A function that ends a
    rank's process must be the last one.
    """
    context = torch.multiprocessing.get_context("spawn")
    arguments = [(rank, world, list(functions), folder) for rank in range(world)]
    processes = [context.Process(target=_work, args=one, daemon=True) for one in arguments]
    deadline = time.monotonic() + RUN_SECONDS
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
    return {
        function.__name__: "\n".join(_raised(function, rank, folder) for rank in range(world)).strip()
        for function in functions
    }


def _report(function: Callable[[], None], rank: int, folder: Path) -> Path:
    return folder / f"{function.__name__}.{rank}"


def _raised(function: Callable[[], None], rank: int, folder: Path) -> str:
    report = _report(function, rank, folder)
    text = report.read_text() if report.exists() else "not finished"
    return f"rank {rank}: {text}" if text else ""


def _work(rank: int, world: int, functions: list[Callable[[], None]], folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    for function in functions:
        torch.manual_seed(0)
        try:
            function()
        except BaseException:
            _report(function, rank, folder).write_text(traceback.format_exc())
            break
        _report(function, rank, folder).write_text("")
    distributed.destroy_process_group()


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))


def whole(tensor: Tensor) -> Tensor:
    """A copy of the values of all ranks."""
    return tensor.full_tensor().clone() if is_sharded(tensor) else tensor.detach().clone()


def dtensors(mesh: DeviceMesh, layouts: Sequence[tuple], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters with gradients, of shape and placements, of the same values on all ranks."""
    pairs = [(random_pair(shape, dtype), placements) for shape, *placements in layouts]
    return [parameter(*(distribute_tensor(x, mesh, placements) for x in pair)) for pair, placements in pairs]


def clip(parameters: Sequence[Tensor], norm_type: float = 2.0, rule: str = "timm") -> int:
    """Clips at 0.01; returns the number of collectives."""
    with CommDebugMode() as communication:
        clip_sharded_(parameters, 0.01, 1e-3, norm_type, rule=rule, backend="auto")
    return communication.get_total_counts()


def assert_clips_as_whole(parameters: Sequence[Tensor], norm_type: float = 2.0, rule: str = "timm") -> int:
    """Clips, compares with the float64 reference and with `agc_` of the whole tensors; returns the collectives."""
    pairs = [(whole(p), whole(p.grad)) for p in parameters]
    unsharded = [parameter(weight, grad.clone()) for weight, grad in pairs]
    nfk.agc_(unsharded, norm_type=norm_type, rule=rule)
    collectives = clip(parameters, norm_type, rule)
    for p, (weight, grad), single in zip(parameters, pairs, unsharded, strict=True):
        clipped, length = whole(p.grad), unit_length(grad.shape, rule)
        assert_clipped(clipped, float64_clipped(weight, grad, norm_type=norm_type, rule=rule), length)
        assert_clipped(clipped, single.grad.double(), length, roundings=2)
        assert not grad.numel() or not torch.equal(clipped, grad), f"{p} was not clipped"
    return collectives
