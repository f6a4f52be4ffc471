"""What this machine can do at most, measured with torch's own kernels in the process that measures everything else.

A ceiling is what the machine can do, not what it mostly does: of every kernel the 20th percentile of its times counts,
and of several kernels for the same work the fastest.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch

from benchmarks.clocks import Call, Clock, eviction_bytes, interleave, is_gpu
from benchmarks.results import Results

BANDWIDTH_BYTES = 256 << 20
# Large enough for a CPU's blocks and a GPU's waves; more would take seconds in float32 on two cores.
CPU_SIDE, GPU_SIDE = 2048, 8192
ROUNDS = 15
FASTEST_PERCENTILE = 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure_bandwidth(device: str, clock: Clock) -> dict[str, float]:
    """Bytes per second on float32 tensors larger than the cache, by kind of access."""
    elements = max(BANDWIDTH_BYTES, eviction_bytes(device)) // 4
    source = torch.ones(elements, device=device)
    target = torch.ones(elements, device=device)
    # A sum and a maximum wait for the number before; a product of two vectors reads two streams at once.
    accesses: list[tuple[str, Call, int]] = [
        ("read", source.sum, 4),
        ("read", source.amax, 4),
        ("read", partial(torch.dot, source, target), 8),
        ("copy", partial(target.copy_, source), 8),
        ("update", partial(target.mul_, 1.0), 8),
    ]
    times = fastest_times([run for _, run, _ in accesses], ROUNDS, clock)
    rates: dict[str, float] = {}
    for (kind, _, bytes_each), seconds in zip(accesses, times, strict=True):
        rates[kind] = max(rates.get(kind, 0.0), bytes_each * elements / seconds)
    return rates


def fastest_times(runs: Sequence[Call], rounds: int, clock: Clock) -> list[float]:
    """Seconds that each call takes in the fastest fifth of its rounds, in which they take turns."""
    return [float(np.percentile(times, FASTEST_PERCENTILE)) for times in interleave(runs, rounds, clock)]


def measure_matmul(device: str, clock: Clock) -> dict[str, float]:
    """Operations per second of square matrix products, by dtype; float32 with TF32 where convolutions use it."""
    side = GPU_SIDE if is_gpu(device) else CPU_SIDE
    matmul_backend = torch.backends.cuda.matmul
    allowed, matmul_backend.allow_tf32 = matmul_backend.allow_tf32, torch.backends.cudnn.allow_tf32
    factors = [torch.randn(side, side, device=device).to(dtype) for dtype in DTYPES.values()]
    times = fastest_times([partial(torch.mm, x, x) for x in factors], ROUNDS // 2, clock)
    matmul_backend.allow_tf32 = allowed
    return {name: 2 * side**3 / seconds for name, seconds in zip(DTYPES, times, strict=True)}


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
