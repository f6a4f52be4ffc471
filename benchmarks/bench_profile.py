"""Where the time of a ResNet-50's training step goes, by kernel on a GPU and by operator on a CPU."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import nfnets_kernels as nfk
from benchmarks.bench_step import batch_norms, make_networks
from benchmarks.checks import BenchmarkError, served_by
from benchmarks.clocks import interleave
from benchmarks.harness import Session, Settings
from benchmarks.results import Incident, Kernel, Profile
from benchmarks.training import Batch, Network, TrainingStep, check_loss, compiled, training_step

BENCH = "profile"
PRECISIONS = {"bfloat16 autocast": torch.bfloat16, "float32": torch.float32}


def run(session: Session) -> None:
    """Ours, timm's network and the BatchNorm twin in bfloat16; with more time in float32 and, on a GPU, compiled."""
    settings = session.settings
    torch.backends.cudnn.benchmark = settings.on_gpu
    for name in session.track(list(PRECISIONS)[: 1 if settings.quick else None], BENCH):
        torch.manual_seed(settings.seed)
        batch = Batch.random(settings.device, settings.batch_size, settings.image_size, PRECISIONS[name])
        for network in session.track(list(forms(settings, batch)), f"  {name}"):
            add(session, f"training step, {batch}, {name}", network, batch)


def forms(settings: Settings, batch: Batch) -> Iterator[Network]:
    """Three networks, and what torch.compile makes of them, which takes a minute each."""
    networks = make_networks(settings.device, count=3)
    yield from networks
    if settings.on_gpu and not settings.quick and batch.dtype != torch.float32:
        yield from map(compiled, networks)


def add(session: Session, case: str, network: Network, batch: Batch) -> None:
    """Record a network's profile, unless a run that this one goes on with has it, or why there is none."""
    if any((one.case, one.contestant) == (case, network.name) for one in session.results.profiles):
        return
    try:
        session.add_profile(measure(session, case, network, batch))
    except BenchmarkError as error:
        session.report_incident(Incident(BENCH, case, "failed", str(error)))
    except Exception as error:
        if not network.compiled:
            raise
        reason = f"{network.name}: {(str(error) or type(error).__name__).splitlines()[0]}"
        session.report_incident(Incident(BENCH, case, "skipped", reason))


def measure(session: Session, case: str, network: Network, batch: Batch) -> Profile:
    """Check a first step, time some that nobody watches, and watch as many."""
    settings = session.settings
    steps = settings.rounds or step_count(settings)
    network.model.train()
    step = training_step(network, batch)
    with nfk.backend.recording() as executed:
        check_loss(network.name, step())
    backend = served_by(network.name, network.role, network.ops, executed, settings.device)
    with session.watch_other_processes(BENCH, case):
        (seconds,) = interleave([step], steps, session.clock)  # first: CUPTI stays after a profile and costs time
        found = kernels(step, steps, settings.on_gpu)
    return Profile(
        case=case,
        contestant=network.name,
        role=network.role,
        backend=backend,
        batch_norm=batch_norms(network.model) > 0,
        steps=steps,
        step_ms=1e3 * float(np.median(seconds)),
        kernels=found,
    )


def step_count(settings: Settings) -> int:
    """How many steps are timed, and watched: on a CPU one takes a second, and the same every time."""
    if settings.on_gpu:
        return 5 if settings.quick else 10
    return 1 if settings.quick else 3


def kernels(step: TrainingStep, steps: int, on_gpu: bool) -> list[Kernel]:
    """What a step runs, longest first. Its two halves are watched apart, so that the optimizer's part is known."""
    milliseconds: defaultdict[tuple[str, bool], float] = defaultdict(float)
    launches: Counter[tuple[str, bool]] = Counter()
    for _ in range(steps):
        for half, updating in ((step.gradients, False), (partial(in_range, step.update), True)):
            for name, ms, count in watched(half, on_gpu):
                milliseconds[name, updating] += ms
                launches[name, updating] += count
    found = [
        Kernel(name, updating, ms / steps, launches[name, updating] / steps)
        for (name, updating), ms in milliseconds.items()
    ]
    return sorted(found, key=lambda kernel: kernel.ms, reverse=True)


def in_range(update: Callable[[], None]) -> None:
    """An optimizer's step that counts as an operator too, since ours runs without one from its second step on."""
    with record_function("clipping and optimizer"):
        update()


def watched(run: Callable[[], object], on_gpu: bool) -> Iterator[tuple[str, float, int]]:
    """Name, milliseconds and number of everything that a call runs: kernels, or operators without what they call.

    On a GPU, ranges with a name span kernels, which are counted already; on a CPU they are operators like any other.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    for one in profiled.key_averages():
        if (one.device_type != DeviceType.CPU) == on_gpu and not (on_gpu and one.is_user_annotation):
            microseconds = one.self_device_time_total if on_gpu else one.self_cpu_time_total
            yield one.key, microseconds / 1e3, one.count
