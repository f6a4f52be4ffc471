"""What this machine can do at most, measured with torch's own kernels in the process that measures everything else."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np
import torch

from benchmarks.clocks import Call, Clock, eviction_bytes, interleave, is_gpu
from benchmarks.results import Results

BANDWIDTH_BYTES = 256 << 20
# Large enough for a CPU's blocks and a GPU's waves; more would take seconds in float32 on two cores.
CPU_SIDE, GPU_SIDE = 2048, 8192
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure_bandwidth(device: str, clock: Clock) -> dict[str, float]:
    """Bytes per second on float32 tensors larger than the cache, by kind of access."""
    elements = max(BANDWIDTH_BYTES, eviction_bytes(device)) // 4
    source = torch.ones(elements, device=device)
    target = torch.ones(elements, device=device)
    accesses: dict[str, tuple[Call, int]] = {
        "read": (source.sum, 4),
        "copy": (lambda: target.copy_(source), 8),
        "update": (lambda: target.mul_(1.0), 8),
    }
    samples = interleave([run for run, _ in accesses.values()], rounds=13, clock=clock)
    return {
        kind: bytes_each * elements / float(np.median(times))
        for (kind, (_, bytes_each)), times in zip(accesses.items(), samples, strict=True)
    }


def measure_matmul(device: str, clock: Clock) -> dict[str, float]:
    """Operations per second of square matrix products, by dtype; float32 with TF32 where convolutions use it."""
    side = GPU_SIDE if is_gpu(device) else CPU_SIDE
    matmul_backend = torch.backends.cuda.matmul
    allowed, matmul_backend.allow_tf32 = matmul_backend.allow_tf32, torch.backends.cudnn.allow_tf32
    factors = [torch.randn(side, side, device=device).to(dtype) for dtype in DTYPES.values()]
    samples = interleave([partial(torch.mm, x, x) for x in factors], rounds=7, clock=clock)
    matmul_backend.allow_tf32 = allowed
    return {name: 2 * side**3 / float(np.median(times)) for name, times in zip(DTYPES, samples, strict=True)}


def floor(
    traffic: Mapping[str, int], operations: Mapping[str, int], results: Results
) -> tuple[float | None, Literal["memory", "matmul"] | None]:
    """Seconds that bytes by kind of access and operations by dtype take at the ceilings, and which of them takes more.

    A chip can move data while it computes, so that the longer of the two is the floor.
    """
    moving = sum(count / results.bandwidth[kind] for kind, count in traffic.items())
    computing = sum(count / results.matmul[dtype] for dtype, count in operations.items())
    if not moving and not computing:
        return None, None
    return (moving, "memory") if moving >= computing else (computing, "matmul")
