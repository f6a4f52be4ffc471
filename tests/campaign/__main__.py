"""`python -m tests.campaign`: the robustness campaign and its figures.

Each part, when it has ended, puts its figures into build/robustness.json, where the other's stay. A campaign that found
nothing publishes them: docs/data/robustness.json and the table of docs/robustness.md.
"""

import argparse
import collections
import dataclasses
import json
import sys
import time
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.environment import Environment
from benchmarks.torchvision_compat import prepare

from .. import native
from . import page, properties

RESULTS = native.ROOT / "build" / "robustness.json"


def environment() -> dict[str, Any]:
    """When, on what machine, and with what this ran."""
    names = ("date", "cpu", "threads", "python", "torch", "triton", "nfnets_kernels", "commit", "dirty")
    recorded = dataclasses.asdict(Environment.record("cpu", False))
    return {**{name: recorded[name] for name in names}, "hypothesis": version("hypothesis")}


def try_properties(run: properties.Run, bars: Progress) -> dict[str, Any]:
    """Inputs tried and failed for each op and backend of a run; prints what fails."""
    bar = bars.add_task(f"{run.name}: compiling", total=None)

    def show(result: properties.Result) -> None:
        bars.update(bar, description=f"{run.name}: {len(result.lines)} tests, {result.inputs:,} inputs")

    start = time.perf_counter()
    result = properties.execute(run, show)
    show(result)
    bars.update(bar, total=1, completed=1)
    sums: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in result.lines:
        sums[line["op"], line["backend"]].update(inputs=line["inputs"], failing=line["failing"])
    if result.returncode:
        bars.console.print(result.output[-20_000:], markup=False, highlight=False)
    return {
        "seconds": round(time.perf_counter() - start),
        "returncode": result.returncode,
        "reports": result.reports,
        "rows": [{"op": op, "backend": backend, **of_pair} for (op, backend), of_pair in sums.items()],
    }


def soak(steps: int, bars: Progress) -> dict[str, Any]:
    """The figures of the soak, which asserts what must not grow."""
    from . import soak as soaking

    torch.set_num_threads(1)
    bar = bars.add_task("soak", total=steps)
    checks, start = [], time.perf_counter()
    for check in soaking.soak(steps):
        bars.advance(bar)
        if check:
            checks.append(check)
            bars.update(bar, description=f"soak: loss {check.loss:.3f}, {check.resident / 1e6:.0f} MB")
    soaking.assert_flat(checks)
    seconds = round(time.perf_counter() - start)
    return {"steps": steps, "seconds": seconds, "returncode": 0, "checks": [check._asdict() for check in checks]}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000, help="inputs to ask for, per test and backend")
    parser.add_argument("--steps", type=int, default=10_000, help="of the soak")
    parser.add_argument("--only", choices=(*page.RUNS, "soak", "page"), help="one part, or writing the page alone")
    return parser.parse_args(arguments)


def save(part: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Puts a part's figures into the results, and returns all."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[part] = figures
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.only == "page":
        page.publish(RESULTS)
        return 0
    prepare()
    parts = {run.name: partial(try_properties, run) for run in properties.runs(options.examples)}
    parts["soak"] = partial(soak, options.steps)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    results: dict[str, Any] = {}
    try:
        with Progress(*columns, console=Console(stderr=True)) as bars:
            for name in [options.only] if options.only else parts:
                started = environment()
                results = save(name, {"environment": started, **parts[name](bars)})
    except KeyboardInterrupt:
        print(f"interrupted; the parts that have ended are in {RESULTS}", file=sys.stderr)
        return 130
    if any(results[part]["returncode"] for part in results):
        return 1
    if results.keys() == parts.keys():
        page.publish(RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
