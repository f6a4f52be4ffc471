"""Interleaved A/B timing of contestants that are first shown to compute the same thing with the backend they claim."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

import nfnets_kernels as nfk
from benchmarks.clocks import Call, Clock, captured, host_clock, is_gpu, make_clock, peak_memory
from benchmarks.environment import other_cpu_seconds
from benchmarks.memory import peak_tensor_memory
from benchmarks.results import Incident, Method, ModelFigures, Results, Role, Timing, Training

Item = TypeVar("Item")

# Cores that other processes may keep busy during a timing before it is called disturbed.
DISTURBANCE = 0.2


class BenchmarkError(Exception):
    """A comparison that must not be reported."""


@dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    device: str
    quick: bool
    seed: int
    rounds: int | None
    batch_size: int
    image_size: int

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return is_gpu(self.device)

    @property
    def compile_mode(self) -> str | None:
        """The mode of torch.compile: on a GPU the one that tries most, whose kernels the harness puts into graphs."""
        return "max-autotune-no-cudagraphs" if self.on_gpu and not self.quick else None

    @property
    def seconds(self) -> float:
        """Time to spend on the rounds of one comparison."""
        return 3.0 if self.quick else 20.0

    @property
    def round_limits(self) -> tuple[int, int]:
        """Fewest and most rounds of a comparison, whatever they take."""
        return (5, 100) if self.quick else (15, 300)


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    ``ops`` are the package's ops that it must run, on the backend that ``backend`` asks for; a peer must run none. An
    ``optional`` contestant that cannot run here is left out with the reason, such as torch.compile without a C++
    compiler.
    """

    name: str
    run: Call
    role: Role = "peer"
    ops: Sequence[str] = ()
    optional: bool = False
    backend: str = "auto"


@dataclass(frozen=True)
class Comparison:
    """Contestants for the same work; the first one is ours, where there is one.

    ``setup`` runs untimed before every call of every contestant. ``check(name, value)`` gets what a contestant
    returned and raises ``BenchmarkError`` when it is wrong. ``traffic`` counts the unavoidable bytes by kind of access:
    "read", "copy" (read from one place and write to another) and "update" (read and write in place). On a GPU the
    contestants' work is replayed from CUDA graphs, where ``graphed`` and possible, and called otherwise; or, if
    ``on_host``, what is timed is not the work but the call, until it returns. The memory that a call needs is measured
    on a GPU, and with ``memory`` on a CPU too. ``rounds`` are for work so long that nothing more is to be warmed up.
    """

    bench: str
    case: str
    contestants: Sequence[Contestant]
    check: Callable[[str, object], None]
    setup: Callable[[], None] = lambda: None
    traffic: Mapping[str, int] = field(default_factory=dict)
    graphed: bool = True
    on_host: bool = False
    memory: bool = False
    rounds: int | None = None


@dataclass(frozen=True)
class Entrant:
    """A contestant that was right, the backend that served it, and what to call when timing it."""

    contestant: Contestant
    backend: str
    run: Call
    method: Method = "calls"
    peak_bytes: int | None = None


def assert_close(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise ``BenchmarkError`` unless ``actual`` is within ``tolerance`` of ``expected``, relative to its norm."""
    if actual.shape != expected.shape:
        raise BenchmarkError(f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    # The float64 norm of a float32 difference: large tensors would lose digits in a float32 sum.
    error = torch.linalg.vector_norm(actual.float() - expected.float(), dtype=torch.float64).item()
    scale = torch.linalg.vector_norm(expected, dtype=torch.float64).item()
    if not error <= tolerance * max(scale, torch.finfo(torch.float32).tiny):
        raise BenchmarkError(f"{what}: differs from the reference by {error:.2e} with a norm of {scale:.2e}")


def assert_all_close(
    what: str, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float
) -> None:
    """``assert_close`` for each pair of two lists."""
    if len(actual) != len(expected):
        raise BenchmarkError(f"{what}: {len(actual)} tensors instead of {len(expected)}")
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"{what}[{index}]", one, other, tolerance)


def served_by(
    name: str,
    role: Role,
    ops: Iterable[str],
    executed: Iterable[tuple[str, str]],
    device: str,
    backend: str = "auto",
) -> str:
    """The backends that served a contestant, after asserting that it ran what it should, where the package promised."""
    ran: dict[str, set[str]] = {}
    for op, served in executed:
        ran.setdefault(op, set()).add(served)
    if missing := set(ops) - set(ran):
        raise BenchmarkError(f"{name}: did not run {sorted(missing)}")
    if ran and role != "ours":
        raise BenchmarkError(f"{name}: ran {sorted(ran)} of nfnets_kernels, so it is no peer")
    for op, backends in ran.items():
        promised = nfk.backend.serving(op, torch.device(device).type, backend)
        if backends != {promised}:
            raise BenchmarkError(f"{name}: {op} ran on {sorted(backends)} instead of {promised}")
    return "+".join(sorted(set().union(*ran.values())))


def passed_over(op: str, settings: Settings) -> list[str]:
    """The backends with GPU kernels for an op that "auto" does not choose on the GPU, fastest first."""
    if not settings.on_gpu:
        return []
    device = torch.device(settings.device).type
    usable = [name for name in ("cuda", "triton") if nfk.backend.unavailable(op, name, device) is None]
    return [name for name in usable if name != nfk.backend.serving(op, device)]


def interleave(
    runs: Sequence[Call],
    rounds: int,
    clock: Clock,
    setup: Callable[[], None] = lambda: None,
    advance: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Time A B A B ...: a change of the machine's speed then meets all contestants alike."""
    samples: list[list[float]] = [[] for _ in runs]
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for run, times in zip(runs, samples, strict=True):
                setup()
                times.append(clock(run))
            advance()
    finally:
        gc.enable()
    return samples


def to_channels_last(model: nn.Module, device: str) -> nn.Module:
    """Move a network to a device in the memory format that convolutions are fastest in."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub


def measure_bandwidth(device: str, clock: Clock, elements: int = 1 << 26) -> dict[str, float]:
    """Bytes per second that torch's own kernels reach on large float32 tensors, by kind of access."""
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


class Session:
    """One run of the benchmarks: measures comparisons, shows progress and keeps the results on disk up to date."""

    def __init__(self, settings: Settings, results: Results, folder: Path, progress: Progress) -> None:
        self.settings = settings
        self.results = results
        self.folder = folder
        self.progress = progress
        self.clock = make_clock(settings.device)
        results.bandwidth = measure_bandwidth(settings.device, self.clock)

    def track(self, items: Sequence[Item], description: str) -> Iterator[Item]:
        """Iterate with a progress bar that goes away at the end."""
        task = self.progress.add_task(description, total=len(items))
        for item in items:
            yield item
            self.progress.advance(task)
        self.progress.remove_task(task)

    def compare(self, comparison: Comparison) -> None:
        """Verify, time and record a comparison; one that fails verification is recorded as failed, without figures."""
        try:
            entrants = self._verify(comparison)
        except BenchmarkError as error:
            self.report_incident(Incident(comparison.bench, comparison.case, "failed", str(error)))
            return
        if entrants:
            self._record(comparison, entrants, *self._time(comparison, entrants))
        self.results.save(self.folder)

    def add_model(self, model: ModelFigures) -> None:
        """Record what is known of a network besides its times."""
        self.results.models.append(model)

    def add_training(self, training: Training) -> None:
        """Record a finished training run."""
        self.results.trainings.append(training)
        self.results.save(self.folder)

    def report_incident(self, incident: Incident) -> None:
        """Record and print why a figure is missing or not to be trusted."""
        self.results.incidents.append(incident)
        self.results.save(self.folder)
        kind = f"[{'red' if incident.kind == 'failed' else 'yellow'}]{incident.kind}[/]"
        self.progress.console.print(f"{kind} {incident.bench}, {incident.case}: {incident.reason}")

    def _verify(self, comparison: Comparison) -> list[Entrant]:
        """The contestants that can run here and are right. Also the first warm-up call."""
        entrants = []
        for contestant in comparison.contestants:
            try:
                entrant = self._run_checked(comparison, contestant)
            except BenchmarkError:
                raise
            except Exception as error:
                if not contestant.optional:
                    raise
                self._report_skipped(comparison, contestant, "", error)
                continue
            if self.settings.on_gpu or comparison.memory:
                comparison.setup()
                measure = peak_memory if self.settings.on_gpu else peak_tensor_memory
                entrant = replace(entrant, peak_bytes=measure(entrant.run))
            if self.settings.on_gpu and comparison.graphed and not comparison.on_host:
                entrant = self._capture(comparison, entrant)
            entrants.append(entrant)
        return entrants

    def _run_checked(self, comparison: Comparison, contestant: Contestant) -> Entrant:
        name, role = contestant.name, contestant.role
        comparison.setup()
        with nfk.backend.recording() as executed:
            value = contestant.run()
        backend = served_by(name, role, contestant.ops, executed, self.settings.device, contestant.backend)
        if role != "ceiling":
            comparison.check(name, value)
        return Entrant(contestant, backend, contestant.run, "host" if comparison.on_host else "calls")

    def _capture(self, comparison: Comparison, entrant: Entrant) -> Entrant:
        """Capture a call in a CUDA graph whose replay is as right; where that fails, calls stay what is timed."""
        contestant = entrant.contestant
        try:
            run = captured(entrant.run)
        except Exception as error:
            self._report_skipped(comparison, contestant, "calls are timed, ", error)
            return entrant
        comparison.setup()
        value = run()
        if contestant.role != "ceiling":
            comparison.check(f"{contestant.name}, replayed", value)
        return replace(entrant, run=run, method="graph")

    def _report_skipped(self, comparison: Comparison, contestant: Contestant, what: str, error: Exception) -> None:
        reason = f"{contestant.name}: {what}{(str(error) or type(error).__name__).splitlines()[0]}"
        self.report_incident(Incident(comparison.bench, comparison.case, "skipped", reason))

    def _time(
        self, comparison: Comparison, entrants: Sequence[Entrant]
    ) -> tuple[list[list[float]], list[list[float]] | None]:
        """Samples of every entrant and, on a GPU, of what its calls take on the host."""
        runs = [entrant.run for entrant in entrants]
        clock = host_clock if comparison.on_host and self.settings.on_gpu else self.clock
        fewest, most = self.settings.round_limits
        rounds = comparison.rounds
        if rounds is None:
            warm_up = interleave(runs, 2, clock, comparison.setup)
            affordable = int(self.settings.seconds / sum(times[-1] for times in warm_up))
            rounds = min(max(affordable, fewest), most)
        rounds = self.settings.rounds or rounds
        task = self.progress.add_task(f"  {comparison.case}", total=rounds)
        with self._watch_other_processes(comparison):
            samples = interleave(runs, rounds, clock, comparison.setup, lambda: self.progress.advance(task))
        self.progress.remove_task(task)
        if comparison.on_host or not self.settings.on_gpu:
            return samples, None
        calls = [entrant.contestant.run for entrant in entrants]
        return samples, interleave(calls, max(fewest, rounds // 5), host_clock, comparison.setup)

    @contextmanager
    def _watch_other_processes(self, comparison: Comparison) -> Iterator[None]:
        """Say so if others used the CPU: they slow code with many parallel regions, mostly the peers, by up to 100x."""
        before, start = other_cpu_seconds(), time.perf_counter()
        yield
        after, seconds = other_cpu_seconds(), time.perf_counter() - start
        if before is None or after is None or (after - before) / seconds < DISTURBANCE:
            return
        reason = f"other processes kept {(after - before) / seconds:.1f} cores busy; run it again on an idle machine"
        self.report_incident(Incident(comparison.bench, comparison.case, "disturbed", reason))

    def _record(
        self,
        comparison: Comparison,
        entrants: Sequence[Entrant],
        samples: Sequence[list[float]],
        host_samples: Sequence[list[float]] | None,
    ) -> None:
        ours = float(np.median(samples[0]))
        ideal = sum(count / self.results.bandwidth[kind] for kind, count in comparison.traffic.items())
        for index, (entrant, times) in enumerate(zip(entrants, samples, strict=True)):
            p20, median, p80 = (float(value) for value in np.percentile(times, [20, 50, 80]))
            role = entrant.contestant.role
            self.results.timings.append(
                Timing(
                    bench=comparison.bench,
                    case=comparison.case,
                    contestant=entrant.contestant.name,
                    role=role,
                    backend=entrant.backend,
                    rounds=len(times),
                    median_ms=1e3 * median,
                    p20_ms=1e3 * p20,
                    p80_ms=1e3 * p80,
                    relative_time=median / ours,
                    bandwidth_fraction=ideal / median if ideal and role != "ceiling" else None,
                    traffic_bytes=sum(comparison.traffic.values()),
                    method=entrant.method,
                    host_ms=1e3 * float(np.median(host_samples[index])) if host_samples else None,
                    peak_bytes=entrant.peak_bytes,
                )
            )
