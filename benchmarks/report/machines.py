"""Stored runs, and what they tell together of the machines that they ran on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.results import BENCHES, Results


@dataclass(frozen=True)
class Run:
    """The results of one run and, where they are stored with a summary and plots, the folder."""

    results: Results
    folder: Path | None = None

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read a folder that a run has written, or a JSON file alone; ``ValueError`` where that is not possible."""
        try:
            return cls(Results.load(path), path if path.is_dir() else None)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: no results of this version of the benchmarks ({error})") from error

    def figures(self, bench: str) -> int:
        """The number of figures that a bench has left."""
        results = self.results
        others = {
            "convergence": len(results.trainings),
            "models": len(results.models),
            "profile": len(results.profiles),
        }
        return sum(timing.bench == bench for timing in results.timings) + others.get(bench, 0)


@dataclass(frozen=True)
class Machine:
    """All runs on one machine.

    Of a bench that several runs have figures of, those count of which there are most, the newest of equally many:
    a rule that does not look at what the figures say.
    """

    runs: Sequence[Run]

    @property
    def name(self) -> str:
        """The machine in words."""
        return self.main.results.environment.machine

    @property
    def slug(self) -> str:
        """The machine as a file name."""
        return self.main.results.environment.slug

    @cached_property
    def main(self) -> Run:
        """The run with most figures."""
        return max(self.runs, key=lambda run: (sum(map(run.figures, BENCHES)), run.results.environment.date))

    def source(self, bench: str) -> Run | None:
        """The run whose figures of a bench count; None if it was not measured."""
        measured = [run for run in self.runs if run.figures(bench)]
        return max(measured, key=lambda run: (run.figures(bench), run.results.environment.date), default=None)

    def others(self) -> dict[str, list[str]]:
        """The benches whose figures are of another run than the main one: their titles, by a line about the run."""
        found: dict[str, list[str]] = {}
        for bench, title in BENCHES.items():
            run = self.source(bench)
            if run is not None and run is not self.main:
                found.setdefault(run_line(run.results), []).append(title)
        return found

    def unmeasured(self) -> list[str]:
        """The titles of the benches without figures."""
        return [title for bench, title in BENCHES.items() if self.source(bench) is None]

    @cached_property
    def results(self) -> Results:
        """The figures that count, as if of one run, in the environment of the main one."""
        main = self.main.results
        merged = Results(main.environment, main.bandwidth, main.matmul)
        for bench in BENCHES:
            source = self.source(bench)
            for run in self.runs if source is None else [source]:
                merged.timings += [one for one in run.results.timings if one.bench == bench]
                merged.incidents += [one for one in run.results.incidents if one.bench == bench]
                merged.trainings += run.results.trainings if bench == "convergence" else []
                merged.models += run.results.models if bench == "models" else []
                merged.profiles += run.results.profiles if bench == "profile" else []
        return merged


def group(runs: Iterable[Run]) -> list[Machine]:
    """Runs by machine, in the order in which the machines first occur."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.results.environment.slug, []).append(run)
    return [Machine(tuple(same)) for same in grouped.values()]


def run_line(results: Results) -> str:
    """When a run was made, of what code and by which command."""
    environment = results.environment
    return f"{commit(results)}, {environment.date[:10]}, by `{environment.command}`"


def commit(results: Results) -> str:
    """The code that was measured."""
    changed = " with uncommitted changes" if results.environment.dirty else ""
    return f"commit {results.environment.commit[:10]}{changed}"


def machine_line(results: Results) -> str:
    """Machine, ceilings, versions and commit in one line."""
    environment = results.environment
    bandwidth = ", ".join(f"{kind} {rate / 1e9:.0f} GB/s" for kind, rate in results.bandwidth.items())
    matmul = ", ".join(f"{dtype} {teraflops(rate)}" for dtype, rate in results.matmul.items())
    malloc = "malloc keeps freed memory" if environment.keeps_memory else "malloc as the system has it"
    disturbed = sum(incident.kind == "disturbed" for incident in results.incidents)
    warning = (
        f"; {disturbed} comparison{'s' if disturbed > 1 else ''} disturbed by other processes" if disturbed else ""
    )
    return (
        f"{environment.machine}; memory: {bandwidth}; {f'matrix products: {matmul}; ' if matmul else ''}{malloc}; "
        f"nfnets_kernels {environment.nfnets_kernels}, {commit(results)}; torch {environment.torch}, "
        f"torchvision {environment.torchvision}, timm {environment.timm}, Python {environment.python}; "
        f"{environment.date[:10]}{warning}"
    )


def teraflops(rate: float) -> str:
    """Operations per second, in words."""
    return f"{rate / 1e12:.3g} TFLOP/s"
