"""The figures of a run as tables of text, which the terminal, Markdown and the page have in common."""

from collections.abc import Iterable, Sequence
from statistics import mean
from textwrap import shorten
from typing import NamedTuple

from benchmarks.kernel_categories import CATEGORIES, by_category, category_of
from benchmarks.report.duels import Duel
from benchmarks.results import BENCHES, NOT_MEASURED, Incident, ModelFigures, Profile, Results, Timing, Training

TIMINGS = ["Case", "Contestant", "Backend", "Median ms", "20 to 80 %", "Time / ours", "Of the ceiling", "Cache"]
# Shown where anything of the bench has such a figure.
OPTIONAL = ["Timed", "Host ms", "Peak MB", "Compile s"]
MODELS = ["Network", "Params, M", "MACs, G", "Image", "Step, ms", "Inference, ms", "Peak MB", "Top-1, %"]
TRAININGS = ["Case", "Contestant", "Backend", "Test accuracy, %", "Lowest to highest", "Diverged", "Time, s"]
DUELS = ["Work", "nfnets_kernels", "Strongest peer", "Speed-up", "Of the ceiling"]
POINTS = ["Case", "At", "nfnets_kernels, ms", "Peer, ms", "Strongest peer", "Speed-up", "Floor, ms", "Bound by"]
KERNELS = ["Case", "Network", "Name", "What", "ms", "Share", "Launches"]
SHOWN_KERNELS = 10
GOALS = ["Machine", "Work", "Goal", "Reached"]
INCIDENTS = ["Benchmark", "Case", "What", "Why"]


class Table(NamedTuple):
    """Titles of columns, and rows of as many cells."""

    columns: list[str]
    rows: list[list[str]]

    @property
    def has_cases(self) -> bool:
        """Whether the first column names a case, once for all its rows."""
        return self.columns[0] == "Case"

    def without_empty(self, optional: Iterable[str]) -> "Table":
        """The table without those of the optional columns in which nothing stands."""
        kept = [
            index
            for index, column in enumerate(self.columns)
            if column not in optional or any(row[index] != "-" for row in self.rows)
        ]
        return Table([self.columns[i] for i in kept], [[row[i] for i in kept] for row in self.rows])

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def table(results: Results, bench: str) -> Table:
    """Every figure of one bench."""
    if bench == "convergence":
        return Table(TRAININGS, training_rows(results))
    if bench == "models":
        return Table(MODELS, [model_row(results, model) for model in results.models])
    if bench == "scaling":
        return Table(POINTS, point_rows(results))
    if bench == "profile":
        return profile_table(results)
    rows = [
        # The name of a case stands once, at the first of its contestants.
        timing_row(timing, case if index == 0 else "", on_gpu=results.environment.gpu is not None)
        for case, timings in results.cases(bench).items()
        for index, timing in enumerate(timings)
    ]
    return Table(TIMINGS + OPTIONAL, rows).without_empty(["Of the ceiling", *OPTIONAL])


def timing_row(timing: Timing, case: str, on_gpu: bool) -> list[str]:
    """One contestant's figures as text."""
    return [
        case,
        timing.contestant,
        timing.backend or "-",
        milliseconds(timing.median_ms),
        f"{milliseconds(timing.p20_ms)} to {milliseconds(timing.p80_ms)}",
        f"{timing.relative_time:.2f}x",
        share(timing),
        timing.cache,
        timing.method if on_gpu else "-",
        "-" if timing.host_ms is None else milliseconds(timing.host_ms),
        megabytes(timing),
        "-" if timing.compile_s is None else f"{timing.compile_s:.1f}",
    ]


def share(timing: Timing) -> str:
    """The share of the ceiling that a contestant reached, and which ceiling."""
    return "-" if timing.floor_fraction is None else f"{timing.floor_fraction:.0%} {timing.bound or ''}".strip()


def megabytes(timing: Timing) -> str:
    """The memory that a call needs at most, where it was measured."""
    return "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 1e6:.0f}"


def milliseconds(value: float) -> str:
    """At least three significant digits of what takes 10 microseconds or more, without an exponent."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 4}f}"


def compact(results: Results, bench: str) -> Table:
    """A row per case of a bench, ours against the strongest peer; benches that have their own kind of table keep it."""
    if bench in ("convergence", "models", "scaling", "profile"):
        return table(results, bench)
    duels = {case: Duel.of(timings) for case, timings in results.cases(bench).items()}
    return Table(DUELS, [duel_row(case, duel) for case, duel in duels.items() if duel])


def duel_row(work: str, duel: Duel | None) -> list[str]:
    """Ours against the strongest peer as text."""
    if duel is None:
        return [work, NOT_MEASURED, "-", "-", "-"]
    against = f"{duel.peer.contestant}, {milliseconds(duel.peer.median_ms)} ms" if duel.peer else "-"
    return [work, f"{milliseconds(duel.ours.median_ms)} ms", against, speed_up(duel), share(duel.ours)]


def speed_up(duel: Duel) -> str:
    """How many times as fast as the strongest peer ours is; said in a word too where it loses."""
    if duel.speed_up is None:
        return "-"
    return f"{duel.speed_up:.2f}x{' (slower)' if round(duel.speed_up, 2) < 1 else ''}"


def point_rows(results: Results) -> list[list[str]]:
    """The points of every sweep as text."""
    points: dict[str, dict[float, list[Timing]]] = {sweep: {} for sweep in results.sweeps()}
    for timings in results.cases("scaling").values():
        for timing in timings:
            if timing.at is not None:
                points[timing.sweep].setdefault(timing.at, []).append(timing)
    return [
        [sweep if index == 0 else "", f"{at:,.10g}", *point_cells(by_value[at])]
        for sweep, by_value in points.items()
        for index, at in enumerate(sorted(by_value))
    ]


def point_cells(timings: Sequence[Timing]) -> list[str]:
    """The figures of one point of a sweep as text."""
    first, duel = timings[0], Duel.of(timings)
    peer = duel.peer if duel else None
    return [
        milliseconds(duel.ours.median_ms) if duel else "-",
        milliseconds(peer.median_ms) if peer else "-",
        peer.contestant if peer else "-",
        speed_up(duel) if duel else "-",
        "-" if first.floor_ms is None else milliseconds(first.floor_ms),
        first.bound or "-",
    ]


def model_row(results: Results, model: ModelFigures) -> list[str]:
    """One network's figures as text; its times are those of one image of the batch."""
    training, inference = results.times(model)
    per_image = [milliseconds(one.median_ms / model.batch_size) if one else "-" for one in (training, inference)]
    return [
        model.contestant,
        f"{model.parameters / 1e6:.1f}",
        f"{model.multiply_adds / 1e9:.2f}",
        str(model.image_size),
        *per_image,
        megabytes(training) if training else "-",
        f"{model.accuracy:.1f}" if model.accuracy else "-",
    ]


def profile_table(results: Results) -> Table:
    """What a step spends on what: a row per category, a column per network."""
    names = list(dict.fromkeys(profile.contestant for profile in results.profiles))
    rows = []
    for case, profiles in results.profiled().items():
        columns = {profile.contestant: profile_cells(results, profile) for profile in profiles}
        shown = [
            what for what in (*CATEGORIES, gap_name(results), "step") if any(what in of for of in columns.values())
        ]
        rows += [
            [case if index == 0 else "", what, *(columns.get(name, {}).get(what, "-") for name in names)]
            for index, what in enumerate(shown)
        ]
    return Table(["Case", "What", *names], rows)


def profile_cells(results: Results, profile: Profile) -> dict[str, str]:
    """Milliseconds, share of the step and launches of one network, by what they are of."""
    cells = {
        category: f"{milliseconds(ms)} ms, {ms / profile.step_ms:.0%}, {launches:.0f}x"
        for category, (ms, launches) in by_category(profile).items()
    }
    cells[gap_name(results)] = f"{milliseconds(profile.gap_ms)} ms, {profile.gap_ms / profile.step_ms:.0%}"
    launches = sum(kernel.launches for kernel in profile.kernels)
    return {**cells, "step": f"{milliseconds(profile.step_ms)} ms, {launches:.0f}x"}


def gap_name(results: Results) -> str:
    """What the time outside all kernels is."""
    return "idle, waiting for the host" if results.environment.gpu else "outside operators"


def kernel_table(results: Results) -> Table:
    """The names under which every network spends most time."""
    rows = [
        [
            case if index == rank == 0 else "",
            profile.contestant if rank == 0 else "",
            shorten(kernel.name, 100, placeholder="..."),
            category_of(kernel, profile),
            milliseconds(kernel.ms),
            f"{kernel.ms / profile.step_ms:.0%}",
            f"{kernel.launches:.0f}",
        ]
        for case, profiles in results.profiled().items()
        for index, profile in enumerate(profiles)
        for rank, kernel in enumerate(profile.kernels[:SHOWN_KERNELS])
    ]
    return Table(KERNELS, rows)


def training_rows(results: Results) -> list[list[str]]:
    """The training runs as text, those of all seeds in one row."""
    rows = []
    for batch_size, contestants in results.trained().items():
        for index, (name, runs) in enumerate(contestants.items()):
            reached = final_accuracies(runs)
            row = [
                f"batch {batch_size}, learning rate {runs[0].learning_rate:g}" if index == 0 else "",
                name,
                runs[0].backend or "-",
                f"{mean(reached):.1f}",
                f"{min(reached):.1f} to {max(reached):.1f}",
                f"{sum(run.diverged for run in runs)} of {len(runs)}",
                f"{mean(run.seconds for run in runs):.1f}",
            ]
            rows.append(row)
    return rows


def final_accuracies(runs: Iterable[Training]) -> list[float]:
    """Test accuracy in percent in the end of training, of every seed."""
    return [run.test_accuracy[-1] for run in runs]


def incident_table(incidents: Sequence[Incident]) -> Table:
    """What is missing or not to be trusted, and why."""
    return Table(INCIDENTS, [[BENCHES[one.bench], one.case, one.kind, one.reason] for one in incidents])
