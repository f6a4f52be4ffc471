"""Interleaved A/B timing of contestants that are first shown to compute the same thing with the backend they claim."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

import nfnets_kernels as nfk
from benchmarks.ceilings import floor, measure_bandwidth, measure_matmul
from benchmarks.checks import BenchmarkError, served_by
from benchmarks.clocks import (
    Call,
    Eviction,
    Rotation,
    captured,
    host_clock,
    interleave,
    is_gpu,
    make_clock,
    peak_memory,
    wall_clock,
)
from benchmarks.environment import other_cpu_seconds
from benchmarks.memory import peak_tensor_memory
from benchmarks.results import Cache, Incident, Method, ModelFigures, Profile, Results, Role, Timing, Training

Item = TypeVar("Item")

# Cores that other processes may keep busy during a timing before it is called disturbed.
DISTURBANCE = 0.2
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    device: str
    quick: bool
    seed: int
    rounds: int | None
    batch_size: int
    image_size: int
    small_batch_size: int | None = None
    """a second one of the training step"""
    max_autotune: bool = False
    """torch.compile of networks in the mode that tries most, which takes minutes for each"""

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return is_gpu(self.device)

    @property
    def compile_mode(self) -> str | None:
        """The mode of torch.compile: on a GPU the one that tries most, whose kernels the harness puts into graphs."""
        return MAX_AUTOTUNE if self.on_gpu and not self.quick else None

    @property
    def compile_mode_of_networks(self) -> str | None:
        """As ``compile_mode``, for what is no single op."""
        return MAX_AUTOTUNE if self.on_gpu and self.max_autotune else None

    @property
    def seconds(self) -> float:
        """Time to spend on the rounds of one comparison."""
        return 2.0 if self.quick else 20.0

    @property
    def rounds_of_steps(self) -> int | None:
        """Rounds of what takes a second on a CPU and needs no more warm-up than its verification; None on a GPU."""
        return None if self.on_gpu else 3 if self.quick else 15

    @property
    def round_limits(self) -> tuple[int, int]:
        """Fewest and most rounds of a comparison, whatever they take."""
        return (5, 100) if self.quick else (15, 300)


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    ``ops`` are the package's ops that it must run, on the backend that ``backend`` asks for; a peer must run none. An
    ``optional`` contestant that cannot run here is left out with the reason, such as torch.compile without a C++
    compiler. What the first call of a ``compiled`` one takes is told apart. ``graphed`` decides for one contestant
    what ``Comparison.graphed`` decides for all; it is then nothing else: left out if it cannot be captured.
    ``verified_by``: another call of the same work, of which it can be seen whether it is right.
    """

    name: str
    run: Call
    role: Role = "peer"
    ops: Sequence[str] = ()
    optional: bool = False
    backend: str = "auto"
    compiled: bool = False
    graphed: bool = False
    verified_by: Call | None = None


@dataclass(frozen=True)
class Point:
    """The value of what is varied over several comparisons, such as the number of parameters."""

    sweep: str
    at: float


@dataclass(frozen=True)
class Comparison:
    """Contestants for the same work; the first one is ours, where there is one.

    ``setup`` runs untimed before every call of every contestant. ``cache``: whether what a call works on is then
    evicted from the last-level cache, or left as it is. ``check(name, value)`` gets what a contestant returned and
    raises ``BenchmarkError`` when it is wrong.

    ``traffic`` counts the unavoidable bytes by kind of access: "read", "copy" (read from one place and write to
    another) and "update" (read and write in place); ``operations`` those of matrix products and convolutions, by dtype.

    On a GPU the contestants' work is replayed from CUDA graphs, where ``graphed`` and possible, and called otherwise;
    or, if ``on_host``, what is timed is not the work but the call, until it returns. The memory that a call needs is
    measured on a GPU, and with ``memory`` on a CPU too. ``rounds`` are for work so long that nothing more is to be
    warmed up.
    """

    bench: str
    case: str
    contestants: Sequence[Contestant]
    check: Callable[[str, object], None]
    setup: Callable[[], None] = lambda: None
    cache: Cache = "cold"
    traffic: Mapping[str, int] = field(default_factory=dict)
    operations: Mapping[str, int] = field(default_factory=dict)
    point: Point | None = None
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
    calls: int = 1
    """how many calls one of ``run`` makes"""
    peak_bytes: int | None = None
    compile_s: float | None = None


def passed_over(op: str, settings: Settings) -> list[str]:
    """The backends with GPU kernels for an op that "auto" does not choose on the GPU, fastest first."""
    if not settings.on_gpu:
        return []
    device = torch.device(settings.device).type
    usable = [name for name in ("cuda", "triton") if nfk.backend.unavailable(op, name, device) is None]
    return [name for name in usable if name != nfk.backend.serving(op, device)]


def to_channels_last(model: nn.Module, device: str) -> nn.Module:
    """Move a network to a device in the memory format that convolutions are fastest in."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub


class Session:
    """One run of the benchmarks: measures comparisons, shows progress and keeps the results on disk up to date."""

    def __init__(self, settings: Settings, results: Results, folder: Path, progress: Progress) -> None:
        self.settings = settings
        self.results = results
        self.folder = folder
        self.progress = progress
        # By a run that this one goes on with.
        self.finished = {(timing.bench, timing.case) for timing in results.timings}
        self.clock = make_clock(settings.device)
        self.evict = Eviction(settings.device)
        # Graphs that never run at the same time can share their memory.
        self.graph_pool: Any = torch.cuda.graph_pool_handle() if settings.on_gpu else None
        results.bandwidth = measure_bandwidth(settings.device, self.clock)
        results.matmul = measure_matmul(settings.device, self.clock)

    def track(self, items: Sequence[Item], description: str) -> Iterator[Item]:
        """Iterate with a progress bar that goes away at the end."""
        task = self.progress.add_task(description, total=len(items))
        try:
            for item in items:
                yield item
                self.progress.advance(task)
        finally:
            self.progress.remove_task(task)

    def compare(self, comparison: Comparison) -> None:
        """Verify, time and record a comparison; one that fails verification is recorded as failed, without figures."""
        if (comparison.bench, comparison.case) in self.finished:
            return
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
        if model not in self.results.models:  # of a run that this one goes on with
            self.results.models.append(model)

    def add_profile(self, profile: Profile) -> None:
        """Record where the time of a step goes."""
        self.results.profiles.append(profile)
        self.results.save(self.folder)

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
            captures = contestant.graphed or (comparison.graphed and not comparison.on_host)
            captured_entrant = self._capture(comparison, entrant) if self.settings.on_gpu and captures else entrant
            if captured_entrant is not None:
                entrants.append(captured_entrant)
        return entrants

    def _run_checked(self, comparison: Comparison, contestant: Contestant) -> Entrant:
        name, role = contestant.name, contestant.role
        comparison.setup()
        with nfk.backend.recording() as executed:
            start = time.perf_counter()
            value = contestant.run()
            seconds = time.perf_counter() - start
            if isinstance(contestant.run, Rotation):  # what is set up in the first call on some data is not timed
                contestant.run.all()
            if contestant.verified_by is not None:
                value = contestant.verified_by()
        backend = served_by(name, role, contestant.ops, executed, self.settings.device, contestant.backend)
        if role != "ceiling":
            comparison.check(name, value)
        method: Method = "host" if comparison.on_host else "calls"
        compile_s = seconds if contestant.compiled else None
        return Entrant(contestant, backend, contestant.run, method, compile_s=compile_s)

    def _capture(self, comparison: Comparison, entrant: Entrant) -> Entrant | None:
        """Capture a call in a CUDA graph whose replay is as right.

        Where that fails, calls stay what is timed, or nothing of a contestant that is to be a graph.
        """
        contestant, run = entrant.contestant, entrant.run
        # Copies of a rotation have been checked, and changed, in its first round of calls.
        work, calls = (run.all, len(run.calls)) if isinstance(run, Rotation) else (run, 1)
        try:
            replay = captured(work, self.graph_pool)
        except Exception as error:
            self._report_skipped(comparison, contestant, "" if contestant.graphed else "calls are timed, ", error)
            return None if contestant.graphed else entrant
        comparison.setup()
        value = replay()
        if contestant.role != "ceiling" and not isinstance(run, Rotation):
            comparison.check(f"{contestant.name}, replayed", value)
        return replace(entrant, run=replay, method="graph", calls=calls)

    def _report_skipped(self, comparison: Comparison, contestant: Contestant, what: str, error: Exception) -> None:
        reason = f"{contestant.name}: {what}{(str(error) or type(error).__name__).splitlines()[0]}"
        self.report_incident(Incident(comparison.bench, comparison.case, "skipped", reason))

    def _time(
        self, comparison: Comparison, entrants: Sequence[Entrant]
    ) -> tuple[list[list[float]], list[list[float]] | None]:
        """Samples of every entrant and, on a GPU, of what its calls take on the host."""
        runs = [entrant.run for entrant in entrants]
        clock = host_clock if comparison.on_host and self.settings.on_gpu else self.clock
        before = self._before(comparison, entrants)
        rounds = self._rounds(comparison, entrants)
        task = self.progress.add_task(f"  {comparison.case}", total=rounds)
        try:
            with self.watch_other_processes(comparison.bench, comparison.case):
                samples = interleave(runs, rounds, clock, before, lambda: self.progress.advance(task))
        finally:
            self.progress.remove_task(task)
        if comparison.on_host or not self.settings.on_gpu:
            return samples, None
        calls = [entrant.contestant.run for entrant in entrants]
        return samples, interleave(calls, max(self.settings.round_limits[0], rounds // 5), host_clock, comparison.setup)

    def _before(self, comparison: Comparison, entrants: Sequence[Entrant]) -> Callable[[], None]:
        """What precedes every timed call: the setup, and the eviction unless the contestants rotate."""
        rotate = all(isinstance(entrant.contestant.run, Rotation) for entrant in entrants)

        def before() -> None:
            comparison.setup()
            if comparison.cache == "cold" and not rotate:
                self.evict()

        return before

    def _rounds(self, comparison: Comparison, entrants: Sequence[Entrant]) -> int:
        """How many rounds the time allows; the warm-up shows what one takes with all that precedes its calls."""
        if comparison.rounds is not None:
            return self.settings.rounds or comparison.rounds
        runs, before = [entrant.run for entrant in entrants], self._before(comparison, entrants)
        fewest, most = self.settings.round_limits
        interleave(runs, 1, self.clock, before)
        seconds = wall_clock(lambda: interleave(runs, 1, self.clock, before))
        return self.settings.rounds or min(max(int(self.settings.seconds / seconds), fewest), most)

    @contextmanager
    def watch_other_processes(self, bench: str, case: str) -> Iterator[None]:
        """Say so if others used the CPU: they slow code with many parallel regions, mostly the peers, by up to 100x."""
        before, start = other_cpu_seconds(), time.perf_counter()
        yield
        after, seconds = other_cpu_seconds(), time.perf_counter() - start
        if before is None or after is None or (after - before) / seconds < DISTURBANCE:
            return
        reason = f"other processes kept {(after - before) / seconds:.1f} cores busy; run it again on an idle machine"
        self.report_incident(Incident(bench, case, "disturbed", reason))

    def _record(
        self,
        comparison: Comparison,
        entrants: Sequence[Entrant],
        samples: Sequence[list[float]],
        host_samples: Sequence[list[float]] | None,
    ) -> None:
        ours = float(np.median(samples[0])) / entrants[0].calls
        ideal, bound = floor(comparison.traffic, comparison.operations, self.results)
        for index, (entrant, times) in enumerate(zip(entrants, samples, strict=True)):
            p20, median, p80 = (float(value) / entrant.calls for value in np.percentile(times, [20, 50, 80]))
            self.results.timings.append(
                Timing(
                    bench=comparison.bench,
                    case=comparison.case,
                    contestant=entrant.contestant.name,
                    role=entrant.contestant.role,
                    backend=entrant.backend,
                    rounds=len(times),
                    median_ms=1e3 * median,
                    p20_ms=1e3 * p20,
                    p80_ms=1e3 * p80,
                    relative_time=median / ours,
                    floor_ms=None if ideal is None else 1e3 * ideal,
                    bound=bound,
                    traffic_bytes=sum(comparison.traffic.values()),
                    method=entrant.method,
                    cache=comparison.cache,
                    host_ms=1e3 * float(np.median(host_samples[index])) if host_samples else None,
                    peak_bytes=entrant.peak_bytes,
                    compile_s=entrant.compile_s,
                    sweep=comparison.point.sweep if comparison.point else "",
                    at=comparison.point.at if comparison.point else None,
                )
            )
