"""The report as one HTML page that needs nothing but itself."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from rich.console import Console
from rich.progress import track

from benchmarks.goals import goal_rows, own_goal_rows
from benchmarks.report.documents import METHOD
from benchmarks.report.headlines import across_machines, headline_table, sentences, unmeasured_kinds
from benchmarks.report.machines import Machine, commit, run_line, teraflops
from benchmarks.report.notes import note
from benchmarks.report.plots import drawings, svg
from benchmarks.report.tables import GOALS, Table, incident_table, kernel_table, table
from benchmarks.results import BENCHES, Results

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Section:
    """One bench on one machine; a table without rows where it was not measured."""

    title: str
    source: str
    note: str
    table: Table
    plot: str
    kernels: Table
    """of profiles, the names behind the table's categories"""


@dataclass(frozen=True)
class Chapter:
    """One machine."""

    machine: Machine
    headlines: Table
    sentences: list[str]
    environment: Table
    ceilings: Table
    sections: list[Section]
    goals: Table
    incidents: Table


def page(machines: Sequence[Machine], console: Console) -> str:
    """All machines in HTML."""
    templates = Templates(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["code"] = code
    return templates.get_template(TEMPLATE).render(
        chapters=[chapter(machine, console) for machine in machines],
        across=across_machines(machines),
        unmeasured=unmeasured_kinds(machines),
        open_goals=Table(GOALS[1:3], [row[1:3] for row in goal_rows(one.results for one in machines) if row[0] == "-"]),
        method=METHOD,
    )


def code(text: str) -> Markup:
    """What stands between backticks as code, everything escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def chapter(machine: Machine, console: Console) -> Chapter:
    """Everything about one machine; its plots take seconds."""
    results = machine.results
    draw = drawings(results)
    about = f"plots of {machine.name}"
    plots = {bench: svg(draw[bench], f"{machine.slug}-{bench}") for bench in progress(draw, about, console)}
    return Chapter(
        machine=machine,
        headlines=headline_table(results),
        sentences=sentences(machine),
        environment=environment_table(machine),
        ceilings=ceiling_table(results),
        sections=[section(machine, bench, plots.get(bench, "")) for bench in BENCHES],
        goals=Table(GOALS[1:], [row[1:] for row in own_goal_rows(results)]),
        incidents=incident_table(results.incidents),
    )


def progress(items: Collection[str], about: str, console: Console) -> Iterable[str]:
    """Iterate with a progress bar, which goes away at the end and is left out of files and pipes."""
    return track(items, about, console=console, transient=True, disable=not console.is_terminal)


def section(machine: Machine, bench: str, plot: str) -> Section:
    """Table, note and plot of a bench."""
    source, full = machine.source(bench), table(machine.results, bench)
    return Section(
        title=BENCHES[bench],
        source="" if source is None or source is machine.main else run_line(source.results),
        note=note(machine.results, bench) if full.rows else "",
        table=full,
        plot=Markup(plot),
        kernels=kernel_table(machine.results) if bench == "profile" else Table([], []),
    )


def environment_table(machine: Machine) -> Table:
    """What the figures depend on besides the code, a column per run."""
    columns = [environment_cells(run.results) for run in machine.runs]
    names = list(dict.fromkeys(name for cells in columns for name in cells))
    return Table(
        ["", *(f"Run {number}" if len(columns) > 1 else "Run" for number in range(1, len(columns) + 1))],
        [[name, *(cells.get(name, "-") for cells in columns)] for name in names],
    )


def environment_cells(results: Results) -> dict[str, str]:
    """The environment of one run as text."""
    environment = results.environment
    stored = asdict(environment)
    return {
        "command": environment.command,
        "date": environment.date,
        "device": environment.device,
        "CPU": environment.cpu,
        "CPU threads": str(environment.threads),
        "GPU": environment.gpu or "none",
        "last-level cache": f"{environment.cache_bytes / 1e6:.1f} MB" if environment.cache_bytes else "unknown",
        **{f"{name}, as found": value for name, value in environment.clocks.items()},
        "malloc": "keeps freed memory" if environment.keeps_memory else "as the system has it",
        "code": f"nfnets_kernels {environment.nfnets_kernels}, {commit(results)}",
        **{name: stored[name] or "none" for name in ("python", "torch", "torchvision", "timm", "triton", "cuda")},
    }


def ceiling_table(results: Results) -> Table:
    """What the machine can do at most, as measured beside the figures."""
    bandwidth = [[f"memory, {kind}", f"{rate / 1e9:.1f} GB/s"] for kind, rate in results.bandwidth.items()]
    matmul = [[f"matrix products, {dtype}", teraflops(rate)] for dtype, rate in results.matmul.items()]
    return Table(["Ceiling", "Measured"], bandwidth + matmul)
