"""Turns results into tables in the terminal, files beside them, and a report of all machines."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.goals import own_goal_rows
from benchmarks.report import tables
from benchmarks.report.documents import overview, summary
from benchmarks.report.machines import Run, group, machine_line
from benchmarks.report.notes import note
from benchmarks.report.page import page, progress
from benchmarks.report.places import STORED, stored_folders, update
from benchmarks.report.plots import drawings, save_png
from benchmarks.report.tables import Table, table
from benchmarks.results import BENCHES, Results

DESCRIPTION = """\
Writes report.html, one page that needs nothing else, and README.md, a summary, from the results of any number of
machines; and beside the results in every folder their summary.md and plots."""


def make_console() -> Console:
    """A console that leaves the tables room in files and pipes, where rich assumes 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def write_report(results: Results, folder: Path, console: Console) -> None:
    """Write ``summary.md`` and the plots beside ``results.json`` and ``results.csv``."""
    (folder / "summary.md").write_text(summary(results))
    drawn = drawings(results)
    for bench in progress(drawn, f"plots in {folder.name}", console):
        save_png(drawn[bench], folder / f"{bench}.png")


def print_report(results: Results, console: Console) -> None:
    """Print one table per bench that has figures, and the goals."""
    for bench, title in BENCHES.items():
        full = table(results, bench)
        if full.rows:
            console.print(rich_table(title, full))
            if text := note(results, bench):
                console.print(text, highlight=False, markup=False)
    if reached := [row[1:] for row in own_goal_rows(results) if row[-1].startswith("goal")]:
        console.print(rich_table("Goals", Table(tables.GOALS[1:], reached)))
    console.print(machine_line(results), markup=False)


def rich_table(title: str, full: Table) -> RichTable:
    """A table for the terminal, in which a case is a line of its own above its contestants."""
    rendered = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    words = full.columns == tables.GOALS[1:]
    for index, column in enumerate(full.columns[1:] if full.has_cases else full.columns):
        if words or index == 0:
            rendered.add_column(column)
        else:
            # The figures below a long title need less room.
            rendered.add_column(fill(column, width=10), justify="right", no_wrap=True)
    for row in full.rows:
        if full.has_cases and row[0]:
            rendered.add_row(f"[bold]{row[0]}[/]")
        rendered.add_row(*([f"  {row[1]}", *row[2:]] if full.has_cases else row))
    return rendered


def load(paths: Sequence[Path]) -> list[Run]:
    """Read results; ends with a message where that is not possible."""
    try:
        return [Run.load(path) for path in paths]
    except ValueError as error:
        raise SystemExit(str(error)) from error


def main(arguments: Sequence[str]) -> int:
    """Command line of ``python -m benchmarks report``."""
    parser = argparse.ArgumentParser("python -m benchmarks report", description=DESCRIPTION)
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="FOLDER_OR_JSON",
        help="what runs have left (default: every folder in benchmarks/results)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="for the report (default: benchmarks/results)")
    parser.add_argument("--readme", action="store_true", help="update the tables in README.md and docs too")
    chosen = parser.parse_args(arguments)
    if chosen.readme and (chosen.results or chosen.output):
        parser.error("--readme takes all results in benchmarks/results: name neither results nor --output")
    output = chosen.output or STORED
    runs, console = load(chosen.results or stored_folders()), make_console()
    for run in runs:
        if run.folder:
            write_report(run.results, run.folder, console)
    machines = group(runs)
    output.mkdir(parents=True, exist_ok=True)
    (output / "README.md").write_text(overview(machines, output))
    (output / "report.html").write_text(page(machines, console))
    console.print(f"The report is in {output / 'report.html'} and {output / 'README.md'}", soft_wrap=True)
    if chosen.readme:
        for path in update(machines):
            console.print(f"updated {path}", soft_wrap=True)
    return 0
