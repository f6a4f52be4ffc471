"""How much memory a call needs at most on a CPU, of which torch keeps no statistics as it does of a GPU's."""

import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

# Kineto would print a line at the start and the end of every profile. It reads this when it is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_tensor_memory(function: Callable[[], object]) -> int:
    """Bytes that a call allocates and holds at most at once; what is allocated when it starts does not count.

    The profiler reports every block that torch's CPU allocator hands out and takes back: all tensors and, as on a GPU,
    what the ops need inside. Unlike the resident set, that depends neither on malloc nor on what ran before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    # A release is an event of negative size; there is none for a block from before the start.
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def available_memory() -> int | None:
    """Bytes that this machine can give to new processes, None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])
