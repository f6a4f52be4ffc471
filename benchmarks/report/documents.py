"""What is written in Markdown: a run's summary, the overview of all runs, and the tables in README and docs."""

from collections.abc import Sequence
from os.path import relpath
from pathlib import Path

from benchmarks.goals import goal_rows
from benchmarks.report.headlines import across_machines, headline_table, sentences, unmeasured_kinds
from benchmarks.report.machines import Machine, Run, machine_line, run_line
from benchmarks.report.notes import note
from benchmarks.report.tables import GOALS, Table, compact, incident_table, kernel_table, table
from benchmarks.results import BENCHES, NOT_MEASURED, Results

METHOD = (
    "All contestants of a case run in one process, in turn: a round calls each of them once, so that a change of clock "
    "or load meets them all. Times are medians of the rounds, with the 20th and 80th percentile.",
    "Before it is timed, a contestant must compute what the reference computes, and ours must have been served by the "
    "backend that it claims; what fails is reported as failed, without a time.",
    "Cache: before a call its data was evicted from the last-level cache (cold), or lay there as the preceding work of "
    "a training step had left it (in step).",
    "The ceilings, memory bandwidth by kind of access and the rate of matrix products, are measured with torch's own "
    "kernels in the same process, each at the 20th percentile of its times, reading by the fastest of several kernels. "
    "The floor of a case is the time that its unavoidable bytes or multiply-adds take "
    'there, whichever is more; "of the ceiling" is that floor over the time reached (memory or matmul: which of the '
    "two). It exceeds 100 % where data was still in a cache, or where a kernel moves data faster than torch's own do.",
    "On a GPU the times are those of the device by CUDA events, of replays of a CUDA graph where a call can be "
    "captured; host time is what a call takes until it returns. Clocks are recorded as found, never changed.",
    "Peers run at their best: fused and foreach forms, torch.compile, CUDA graphs, channels_last; a quick run leaves "
    "most compiled forms out. What the first call of a compiled one takes is told apart. A peer runs none of this "
    "package's ops.",
    "In short tables the first of our forms counts, and of the peers the one that is fastest in that case. Of several "
    "runs on a machine those figures of a benchmark count of which there are most, the newest of equally many.",
)


def summary(results: Results) -> str:
    """Every figure of a run."""
    parts = ["# Benchmark results", f"{machine_line(results)}\n\n`{results.environment.command}`"]
    for bench, title in BENCHES.items():
        full = table(results, bench)
        figures = [note(results, bench), full.markdown()] if full.rows else [NOT_MEASURED]
        if bench == "profile" and full.rows:
            figures.append(kernel_table(results).markdown())
        parts.append("\n\n".join([f"## {title}", *filter(None, figures)]))
    if results.timings:
        parts.append(f"## Goals\n\n{Table(GOALS, goal_rows([results])).markdown()}")
    if results.incidents:
        parts.append(f"## Missing and disturbed figures\n\n{incident_table(results.incidents).markdown()}")
    return "\n\n".join(parts) + "\n"


def overview(machines: Sequence[Machine], base: Path) -> str:
    """The headlines of all machines, with links from a file in the folder ``base`` to everything else."""
    parts = ["# Benchmark results", "Made by `python -m benchmarks report`, which also writes them as one HTML page."]
    for machine in machines:
        parts.append(f"## {machine.name}")
        parts.append(headlines(machine))
        if links := [line for run in machine.runs if (line := link_line(run, base))]:
            parts.append("\n".join(links))
    parts += unmeasured_kinds(machines)
    shared = across_machines(machines)
    if shared.rows:
        parts.append(f"## Across machines\n\nOurs / the strongest peer.\n\n{shared.markdown()}")
    parts.append("## How it was measured\n\n" + bullets(METHOD))
    return "\n\n".join(parts) + "\n"


def link_line(run: Run, base: Path) -> str:
    """Links to what is stored of a run; empty where it has no folder."""
    if run.folder is None:
        return ""
    folder = Path(relpath(run.folder, base)).as_posix()
    files = ["summary.md", "results.json", *sorted(path.name for path in run.folder.glob("*.png"))]
    links = ", ".join(f"[{name}]({folder}/{name})" for name in files)
    return f"- {run_line(run.results)}: {links}"


def headlines(machine: Machine) -> str:
    """A machine in short: a line about it, a dozen of its figures, and what they say."""
    results = machine.results
    about = f"**{machine_line(results)}**, by `{results.environment.command}`"
    return f"{about}\n\n{headline_table(results).markdown()}\n\n{bullets(sentences(machine))}"


def readme_section(machines: Sequence[Machine]) -> str:
    """All machines in short."""
    return "\n\n".join([*map(headlines, machines), *unmeasured_kinds(machines)])


def docs_section(machines: Sequence[Machine], name: str) -> str:
    """A row per case of one bench, or of "all", on every machine."""
    benches = BENCHES if name == "all" else [name]
    parts = []
    for machine in machines:
        parts.append(f"**{machine_line(machine.results)}**")
        parts += [bench_section(machine, bench, titled=name == "all") for bench in benches]
    if name == "all":
        parts.append(f"**Goals**\n\n{Table(GOALS, goal_rows(machine.results for machine in machines)).markdown()}")
    return "\n\n".join([*parts, *unmeasured_kinds(machines)])


def bench_section(machine: Machine, bench: str, titled: bool) -> str:
    """The short table of one bench on one machine."""
    rows = compact(machine.results, bench)
    parts = [f"**{BENCHES[bench]}**"] if titled else []
    source = machine.source(bench)
    if source is not None and source is not machine.main:
        parts.append(f"Measured at {run_line(source.results)}.")
    parts += [note(machine.results, bench), rows.markdown()] if rows.rows else [f"{NOT_MEASURED}."]
    return "\n\n".join(filter(None, parts))


def bullets(lines: Sequence[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)
