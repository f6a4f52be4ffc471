"""Clocks: the wall clock on a CPU; on a GPU events on the device, and beside them what the host spends on a call."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]

# What every call finds in the L2 cache is this buffer, or one of four times the cache if that is larger.
FLUSH_BYTES = 256 << 20


def is_gpu(device: str) -> bool:
    """Whether a device is a GPU."""
    return device.startswith("cuda")


def wall_clock(run: Call) -> float:
    """Seconds that a call takes on the CPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def host_clock(run: Call) -> float:
    """Seconds until a call returns that finds the GPU idle and leaves it with the work."""
    torch.cuda.synchronize()
    return wall_clock(run)


class DeviceClock:
    """Seconds between the start and the end of a call's work on the GPU, which finds its data outside the L2 cache."""

    def __init__(self, device: str) -> None:
        size = max(FLUSH_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, run: Call) -> float:
        """Time one call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Written and not read: a call then waits for another's lines to leave the cache, as others will for its own.
        # While the GPU writes, the host gets ahead of it, so that the latency of a launch stays outside the events.
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def make_clock(device: str) -> Clock:
    """The clock of a device."""
    return DeviceClock(device) if is_gpu(device) else wall_clock


def side_stream(device: str) -> AbstractContextManager[Any]:
    """The stream to measure on: CUDA graphs cannot be captured on the default one.

    Autograd runs a backward pass on the stream of its forward pass, so everything has to happen on this one stream.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if is_gpu(device) else nullcontext()


def captured(run: Call) -> Call:
    """Replays the call's kernels from a CUDA graph, without the time in which Python launches them.

    The call must have run before, so that nothing is left to compile or to allocate once.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            value = run()
    except Exception as error:
        # A broken capture raises once more when it ends; what broke it is the context of that.
        raise RuntimeError(f"not captured: {error.__context__ or error}") from error

    def replay() -> object:
        graph.replay()
        return value

    return replay


def peak_memory(run: Call) -> int:
    """Bytes that a call needs at most, beyond what is allocated when it starts."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
