"""Turns results into tables for the terminal, Markdown and the README. ``python -m benchmarks.report --help``."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.environment import REPOSITORY
from benchmarks.goals import goal_rows, verdicts
from benchmarks.plots import save_plots
from benchmarks.results import BENCHES, NOT_MEASURED, ModelFigures, Results, Timing, Training

START, END = "<!-- benchmark-table:start -->", "<!-- benchmark-table:end -->"
COLUMNS = {
    "timings": ["Case", "Contestant", "Backend", "Median ms", "20 to 80 %", "Time / ours", "Bandwidth"],
    "on a GPU": ["Timed", "Host ms", "Peak MB", "Goal"],
    "models": ["Network", "Params, M", "MACs, G", "Image", "Step, ms", "Inference, ms", "Peak MB", "Top-1, %"],
    "goals": ["Machine", "Work", "Goal", "Reached"],
    "trainings": ["Case", "Contestant", "Backend", "Test accuracy, %", "Lowest to highest", "Diverged", "Time, s"],
}


def make_console() -> Console:
    """A console that leaves the tables room in files and pipes, where rich assumes 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def write_report(results: Results, folder: Path) -> None:
    """Write ``summary.md`` and the plots beside ``results.json`` and ``results.csv``."""
    results.save(folder)
    (folder / "summary.md").write_text(summary(results))
    save_plots(results, folder)


def print_report(results: Results, console: Console) -> None:
    """Print one table per bench that has figures."""
    for bench, title in BENCHES.items():
        columns, rows = table(results, bench)
        if rows:
            console.print(rich_table(title, columns, rows))
        if rows and (text := note(results, bench)):
            console.print(text, highlight=False)
    console.print(machine_line(results))


def rich_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table for the terminal, in which a case is a line of its own above its contestants."""
    has_cases = columns[0] == "Case"
    rendered = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns[1:] if has_cases else columns):
        rendered.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        if has_cases and row[0]:
            rendered.add_row(f"[bold]{row[0]}[/]")
        rendered.add_row(*([f"  {row[1]}", *row[2:]] if has_cases else row))
    return rendered


def summary(results: Results) -> str:
    """Every figure as Markdown."""
    parts = ["# Benchmark results", f"{machine_line(results)}\n\n`{results.environment.command}`"]
    for bench, title in BENCHES.items():
        columns, rows = table(results, bench)
        figures = [note(results, bench), markdown(columns, rows)] if rows else [NOT_MEASURED]
        parts.append("\n\n".join([f"## {title}", *filter(None, figures)]))
    if results.timings:
        parts.append(f"## Goals\n\n{markdown(COLUMNS['goals'], goal_rows([results]))}")
    if results.incidents:
        missing = [f"- {one.bench}, {one.case}: {one.kind}: {one.reason}" for one in results.incidents]
        parts.append("## Missing and disturbed figures\n\n" + "\n".join(missing))
    return "\n\n".join(parts) + "\n"


def table(results: Results, bench: str) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows of one bench."""
    if bench == "convergence":
        return COLUMNS["trainings"], training_rows(results)
    if bench == "models":
        return COLUMNS["models"], [model_row(results, model) for model in results.models]
    on_gpu = results.environment.gpu is not None
    rows = []
    for timings in results.cases(bench).values():
        for index, timing in enumerate(timings):
            # The name of a case stands once, at the first of its contestants.
            row = timing_row(timing, timing.case if index == 0 else "")
            reached = verdicts(results, bench, timing.case, timings) if index == 0 else ""
            rows.append(row + gpu_cells(timing, reached) if on_gpu else row)
    return COLUMNS["timings"] + (COLUMNS["on a GPU"] if on_gpu else []), rows


def timing_row(timing: Timing, case: str) -> list[str]:
    """One contestant's figures as text."""
    return [
        case,
        timing.contestant,
        timing.backend or "-",
        milliseconds(timing.median_ms),
        f"{milliseconds(timing.p20_ms)} to {milliseconds(timing.p80_ms)}",
        f"{timing.relative_time:.2f}x",
        "-" if timing.bandwidth_fraction is None else f"{timing.bandwidth_fraction:.0%}",
    ]


def gpu_cells(timing: Timing, reached: str) -> list[str]:
    """What is measured on a GPU only, and whether the goals are met."""
    return [
        timing.method,
        "-" if timing.host_ms is None else milliseconds(timing.host_ms),
        megabytes(timing),
        reached or "-",
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


def note(results: Results, bench: str) -> str:
    """What has to be known of the table of a bench that has figures; mostly nothing."""
    if bench == "convergence":
        return trainings_note(results)
    return models_note(results.models) if bench == "models" else ""


def models_note(models: Sequence[ModelFigures]) -> str:
    """What has to be known of the table of networks."""
    sizes = sorted({model.batch_size for model in models})
    sources: dict[str, list[str]] = {}
    for model in models:
        if model.accuracy and model.architecture not in sources.setdefault(model.source, []):
            sources[model.source].append(model.architecture)
    cited = "; ".join(f"{source}: {', '.join(names)}" for source, names in sources.items())
    return (
        f"Batch {' and '.join(map(str, sizes))}; multiply-adds (MACs) and times of one image; AGC in the step of "
        "normalizer-free networks; peak: what a step allocates on top of parameters and optimizer state; accuracy as "
        f"published, not trained here ({cited})."
    )


def megabytes(timing: Timing) -> str:
    """The memory that a call needs at most, where it was measured."""
    return "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 1e6:.0f}"


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


def trainings_note(results: Results) -> str:
    """How the networks were trained, up to where that went well, and how ours compares at the largest batch size."""
    trained = results.trained()
    names = dict.fromkeys(training.contestant for training in results.trainings)
    stable = ", ".join(f"{name} {largest_stable(trained, name) or 'none'}" for name in names)
    parts = [
        f"{max(len(training.test_accuracy) for training in results.trainings)} epochs, the learning rate linear in the "
        "batch size. Test accuracy in the end: mean and range over seeds, diverged ones included (the loss became "
        "infinite or NaN, or the accuracy is that of guessing). The settings were chosen on images held out from the "
        f"training images (benchmarks/tune_convergence.py). Largest batch up to which no seed diverged: {stable}."
    ]
    (ours, own), *others = ((name, final_accuracies(runs)) for name, runs in trained[max(trained)].items())
    if others:
        gaps = ", ".join(f"{mean(own) - mean(reached):+.1f} {name}{overlap(own, reached)}" for name, reached in others)
        parts.append(f"Percentage points from the others to {ours} at batch {max(trained)}: {gaps}.")
    return " ".join(parts)


def largest_stable(trained: dict[int, dict[str, list[Training]]], name: str) -> int:
    """The largest batch size up to which no run of a contestant diverged; 0 if one did at the smallest."""
    largest = 0
    for batch_size in sorted(trained):
        runs = trained[batch_size].get(name, [])
        if not runs or any(run.diverged for run in runs):
            break
        largest = batch_size
    return largest


def overlap(some: list[float], others: list[float]) -> str:
    """A remark where two contestants differ by no more than their seeds do."""
    return " (the seeds' ranges overlap)" if min(some) <= max(others) and min(others) <= max(some) else ""


def final_accuracies(runs: Iterable[Training]) -> list[float]:
    """Test accuracy in percent in the end of training, of every seed."""
    return [run.test_accuracy[-1] for run in runs]


def machine_line(results: Results) -> str:
    """Machine, bandwidth, versions and commit in one line."""
    environment = results.environment
    bandwidth = ", ".join(f"{kind} {rate / 1e9:.0f} GB/s" for kind, rate in results.bandwidth.items())
    commit = environment.commit[:10] + (" with uncommitted changes" if environment.dirty else "")
    malloc = "malloc keeps freed memory" if environment.keeps_memory else "malloc as the system has it"
    disturbed = sum(incident.kind == "disturbed" for incident in results.incidents)
    warning = f"; {disturbed} comparisons disturbed by other processes" if disturbed else ""
    return (
        f"{environment.machine}; memory: {bandwidth}; {malloc}; "
        f"nfnets_kernels {environment.nfnets_kernels}, commit {commit}; torch {environment.torch}, "
        f"torchvision {environment.torchvision}, timm {environment.timm}, Python {environment.python}; "
        f"{environment.date[:10]}{warning}"
    )


def readme_section(all_results: Iterable[Results]) -> str:
    """One compact table per run, a row per case; what a run leaves out is told unless another on the machine has it."""
    all_results = list(all_results)
    parts = []
    for results in all_results:
        benches = set(BENCHES) - benches_of(others_on_the_machine(results, all_results)) | benches_of([results])
        rows = [row for bench in BENCHES if bench in benches for row in readme_rows(results, bench, BENCHES[bench])]
        columns = ["Work", "nfnets_kernels", "Peers (time / ours)", "Memory bandwidth reached"]
        parts.append(f"**{machine_line(results)}**, by `{results.environment.command}`\n\n{markdown(columns, rows)}")
        if results.models:
            parts.append(
                f"**{BENCHES['models']}.** {models_note(results.models)}\n\n{markdown(*table(results, 'models'))}"
            )
    for kind, is_there in {
        "CPU": any(results.environment.gpu is None for results in all_results),
        "GPU": any(results.environment.gpu is not None for results in all_results),
    }.items():
        if not is_there:
            parts.append(f"{kind}: {NOT_MEASURED}.")
    return "\n\n".join(parts)


def others_on_the_machine(results: Results, all_results: Iterable[Results]) -> list[Results]:
    """The other runs on the machine of a run."""
    slug = results.environment.slug
    return [other for other in all_results if other is not results and other.environment.slug == slug]


def benches_of(all_results: Iterable[Results]) -> set[str]:
    """The benches of which some run has figures."""
    return {bench for results in all_results for bench in BENCHES if table(results, bench)[1]}


def readme_rows(results: Results, bench: str, title: str) -> list[list[str]]:
    """The rows of one bench in the README, below its title."""
    if bench == "models" and results.models:
        return []  # they have a table of their own
    cases = results.cases(bench).items()
    rows = [readme_row(case, timings, verdicts(results, bench, case, timings)) for case, timings in cases]
    if bench == "convergence" and results.trainings:
        rows = [readme_training_row(size, contestants) for size, contestants in results.trained().items()]
    return [[f"**{title}**", "", "", ""], *rows] if rows else [[f"**{title}**", *[NOT_MEASURED] * 3]]


def readme_row(case: str, timings: list[Timing], reached: str) -> list[str]:
    """Our first contestant against all that are not ours, and against its goals."""
    ours, *others = timings
    against = "; ".join(
        f"{timing.contestant} {milliseconds(timing.median_ms)} ms ({timing.relative_time:.2f}x)"
        for timing in others
        if timing.role != "ours"
    )
    fraction = "-" if ours.bandwidth_fraction is None else f"{ours.bandwidth_fraction:.0%}"
    last = f"{fraction}; {reached}" if reached else fraction
    return [case, f"{milliseconds(ours.median_ms)} ms", against, last]


def readme_training_row(batch_size: int, contestants: dict[str, list[Training]]) -> list[str]:
    """Mean test accuracy over the seeds, of ours, the first one, and of the others."""
    described = []
    for name, runs in contestants.items():
        diverged = sum(run.diverged for run in runs)
        suffix = f" ({diverged} of {len(runs)} diverged)" if diverged else ""
        described.append(f"{name} {mean(final_accuracies(runs)):.1f} %{suffix}")
    seeds = max(map(len, contestants.values()))
    case = f"batch {batch_size}: test accuracy, {'1 seed' if seeds == 1 else f'mean of {seeds} seeds'}"
    return [case, described[0], "; ".join(described[1:]), "-"]


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(value: float) -> str:
    """At least three significant digits of what takes 10 microseconds or more, without an exponent."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 4}f}"


def update_readme(readme: Path, all_results: Iterable[Results]) -> None:
    """Put the tables between the markers of a README."""
    text = readme.read_text()
    if START not in text or END not in text:
        raise SystemExit(f"{readme} lacks the markers {START} and {END}")
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    readme.write_text(f"{before}{START}\n{readme_section(all_results)}\n{END}{after}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.report", description="Renders stored benchmark results.")
    parser.add_argument("results", nargs="*", type=Path, help="result folders; default: all in benchmarks/results")
    parser.add_argument("--readme", action="store_true", help="update the table in README.md instead of printing")
    arguments = parser.parse_args()
    folders = arguments.results or sorted(path.parent for path in REPOSITORY.glob("benchmarks/results/*/results.json"))
    all_results = [Results.load(folder) for folder in folders]
    if arguments.readme:
        update_readme(REPOSITORY / "README.md", all_results)
        return
    for folder, results in zip(folders, all_results, strict=True):
        print_report(results, make_console())
        write_report(results, folder)
    make_console().print(rich_table("Goals", COLUMNS["goals"], goal_rows(all_results)))


if __name__ == "__main__":
    main()
