"""Clocks: the wall clock on a CPU; on a GPU events on the device, and beside them what the host spends on a call."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]

# What is read and written to evict everything else from a GPU's L2 cache: four times its size and at least this.
GPU_EVICTION_BYTES = 256 << 20
# The last-level cache of a CPU that does not tell its size.
CPU_CACHE_BYTES = 256 << 20


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


def device_clock(run: Call) -> float:
    """Seconds between the start and the end of a call's work on the GPU.

    What was queued before keeps the GPU busy while the host gets ahead of it, so that the latency of a launch stays
    outside the events: the eviction, or the part of a training step that precedes the call.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def make_clock(device: str) -> Clock:
    """The clock of a device."""
    return device_clock if is_gpu(device) else wall_clock


def interleave(
    runs: Sequence[Call],
    rounds: int,
    clock: Clock,
    before: Callable[[], object] = lambda: None,
    advance: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Time A B A B ...: a change of the machine's speed then meets all contestants alike.

    ``before`` precedes every call, ``advance`` follows every round; neither is timed.
    """
    samples: list[list[float]] = [[] for _ in runs]
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for run, times in zip(runs, samples, strict=True):
                before()
                times.append(clock(run))
            advance()
    finally:
        gc.enable()
    return samples


def cache_bytes(device: str) -> int:
    """Size of the last-level cache: on a CPU all that its socket shares, of which a virtual machine may get less."""
    if is_gpu(device):
        return torch.cuda.get_device_properties(device).L2_cache_size
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return 1024 * int(levels[-1].read_text().strip().removesuffix("K")) if levels else CPU_CACHE_BYTES


def eviction_bytes(device: str) -> int:
    """How much data displaces everything else from the last-level cache."""
    return max(GPU_EVICTION_BYTES, 4 * cache_bytes(device)) if is_gpu(device) else cache_bytes(device)


class Eviction:
    """Writes a buffer through the last-level cache, so that the next call finds its data in memory."""

    def __init__(self, device: str) -> None:
        self.buffer = torch.empty(eviction_bytes(device), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        """Evict. Written and not read: the next call waits for these lines to leave, as others will for its own."""
        self.buffer.zero_()


class Rotation:
    """Calls of the same work, each on data of its own, that take turns and wrap around.

    Where the data of all of them together is larger than the cache, each finds its own in memory, without an eviction
    between two calls; on a GPU all of them fit into one CUDA graph, whose time is shared out over so many calls that
    the resolution of events, half a microsecond, does not matter. ``turn`` is shared by the contestants of a
    comparison: what one has just brought into the cache is not what the next one works on.
    """

    def __init__(self, calls: Sequence[Call], turn: Iterator[int]) -> None:
        self.calls = calls
        self.turn = turn

    def __call__(self) -> object:
        """The call whose turn it is."""
        return self.calls[next(self.turn)]()

    def all(self) -> object:
        """Every call once."""
        return [call() for call in self.calls]


def turns(copies: int) -> Iterator[int]:
    """0, 1, ... and over again: the ``turn`` of rotations."""
    return cycle(range(copies))


def copies_to_rotate(nbytes: int, device: str) -> int:
    """How many copies of so many bytes make a rotation in which a call's data is not in the cache any more."""
    larger_than = eviction_bytes(device)
    return 1 if nbytes >= larger_than else 1 + -(-larger_than // nbytes)


def side_stream(device: str) -> AbstractContextManager[Any]:
    """The stream to measure on: CUDA graphs cannot be captured on the default one.

    Autograd runs a backward pass on the stream of its forward pass, so everything has to happen on this one stream.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if is_gpu(device) else nullcontext()


def captured(run: Call, pool: Any = None) -> Call:
    """Replays the call's kernels from a CUDA graph, without the time in which Python launches them.

    The call must have run before, so that nothing is left to compile or to allocate once. Graphs that share a pool
    share the memory of what they compute, and must not be replayed at the same time.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            value = run()
    except Exception as error:
        # A broken capture raises once more when it ends; what broke it is the context of that.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
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
