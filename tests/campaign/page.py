"""docs/robustness.md's table, from the published figures."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ..native import ROOT
from .properties import OPS

FIGURES = ROOT / "docs" / "data" / "robustness.json"
PAGE = ROOT / "docs" / "robustness.md"
_MARKED = re.compile(r"(<!-- robustness:start -->\n).*?(<!-- robustness:end -->)", re.DOTALL)
RUNS = ("built", "interpreted", "sanitized", "emulated")
# The kernels of each column: the run that tries them, and the backend.
_COLUMNS = {
    "reference": ("built", "reference"),
    "CPU, baseline": ("built", "cpu:baseline"),
    "CPU, AVX2": ("built", "cpu:avx2"),
    "CPU, AVX-512": ("built", "cpu:avx512"),
    "Triton, interpreted": ("interpreted", "triton"),
    "CPU, sanitized": ("sanitized", "cpu:baseline"),
    "CUDA, emulated, sanitized": ("emulated", "cuda"),
}


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def inputs_table(figures: dict[str, Any]) -> list[str]:
    """Inputs tried, by op and by who was given them; "-" for none."""
    inputs = {(row["op"], run, row["backend"]): row["inputs"] for run in RUNS for row in _rows(figures, run)}
    rows = [_row(["Inputs tried", *_COLUMNS]), _row(["---", *["---:"] * len(_COLUMNS)])]
    for op in OPS:
        cells = (inputs.get((op, *column)) for column in _COLUMNS.values())
        rows.append(_row([f"`{op}`", *("-" if cell is None else f"{cell:,}" for cell in cells)]))
    return rows


def _rows(figures: dict[str, Any], run: str) -> list[dict[str, Any]]:
    return figures.get(run, {}).get("rows", [])


def soak_table(figures: dict[str, Any]) -> list[str]:
    """What the soak's checks saw."""
    if "soak" not in figures:
        return ["The soak: not run yet on this version."]
    found = figures["soak"]
    rows = [f"The soak took {found['seconds']:,} s for {found['steps']:,} steps.", ""]
    rows += [_row(["Steps", "Mean loss", "Resident memory", "Tensors alive"]), _row(["---:"] * 4)]
    for check in found["checks"]:
        cells = [f"{check['step']:,}", f"{check['loss']:.2f}", f"{check['resident'] / 1e6:.0f} MB"]
        rows.append(_row([*cells, str(check["held"]["tensors"])]))
    return rows


def rendered(figures: dict[str, Any]) -> str:
    """The part between the marks."""
    of = figures["built"]["environment"]
    rows = [row for run in RUNS for row in _rows(figures, run)]
    tried, failing = (sum(row[key] for row in rows) for key in ("inputs", "failing"))
    reports = sum(figures.get(run, {}).get("reports", 0) for run in RUNS)
    changed = " with uncommitted changes" if of["dirty"] else ""
    lines = [
        f"{tried:,} inputs, {failing} that failed, {reports} reports of sanitizers. {of['date'][:10]}, {of['cpu']}, "
        f"torch {of['torch']}, triton {of['triton']}, hypothesis {of['hypothesis']}, Python {of['python']}, commit "
        f"`{of['commit'][:9]}`{changed}.",
        "",
        *inputs_table(figures),
        "",
        *soak_table(figures),
    ]
    return "\n".join(lines) + "\n"


def written(page: str, figures: dict[str, Any]) -> str:
    """The page with the part between the marks replaced."""
    assert len(_MARKED.findall(page)) == 1, "the page must have one pair of marks"
    return _MARKED.sub(lambda marks: marks[1] + rendered(figures) + marks[2], page)


def write() -> None:
    PAGE.write_text(written(PAGE.read_text(), json.loads(FIGURES.read_text())))


def publish(results: Path) -> None:
    """The page and its figures are those of these results."""
    FIGURES.parent.mkdir(exist_ok=True)
    shutil.copyfile(results, FIGURES)
    write()
