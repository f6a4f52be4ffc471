"""Plots of the results, one PNG per bench."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.results import BENCHES, Results, Role, Timing

COLOURS: dict[Role, str] = {"ours": "#1b7f5c", "peer": "#9aa5b1", "ceiling": "#c8553d"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "savefig.dpi": 150,
}


def save_plots(results: Results, folder: Path) -> None:
    """Plot every bench that has figures."""
    with plt.rc_context(STYLE):
        for bench, title in BENCHES.items():
            if cases := results.cases(bench):
                plot_timings(title, results.environment.machine, cases, folder / f"{bench}.png")
        if results.trainings:
            plot_trainings(results, folder / "convergence.png")


def plot_timings(title: str, machine: str, cases: dict[str, list[Timing]], path: Path) -> None:
    """A panel per case: a bar per contestant, whiskers from the 20th to the 80th percentile, ceilings as lines."""
    rows = (len(cases) + 1) // 2
    bars = max(sum(timing.role != "ceiling" for timing in timings) for timings in cases.values())
    figure, grid = plt.subplots(
        rows, 2, figsize=(12, rows * (0.3 * bars + 0.9) + 0.5), squeeze=False, layout="constrained"
    )
    figure.suptitle(f"{title} ({machine}); shorter is faster", fontweight="bold")
    panels = list(grid.flat)
    for axes, (case, timings) in zip(panels, cases.items(), strict=False):
        plot_case(axes, case, timings)
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    ceilings, names = panels[0].get_legend_handles_labels()
    if ceilings:
        figure.legend(ceilings, names, frameon=False, ncols=len(names), loc="outside lower center")
    figure.savefig(path)
    plt.close(figure)


def plot_case(axes: Axes, case: str, timings: list[Timing]) -> None:
    """The bars of one case."""
    bars = [timing for timing in timings if timing.role != "ceiling"]
    medians = [timing.median_ms for timing in bars]
    whiskers = [
        [timing.median_ms - timing.p20_ms for timing in bars],
        [timing.p80_ms - timing.median_ms for timing in bars],
    ]
    labels = [timing.contestant for timing in bars]
    axes.barh(labels, medians, xerr=whiskers, color=[COLOURS[timing.role] for timing in bars], height=0.65)
    for position, timing in enumerate(bars):
        factor = "" if timing.role == "ours" else f"  ({timing.relative_time:.2f}x ours)"
        axes.text(timing.p80_ms, position, f"  {timing.median_ms:.3g} ms{factor}", va="center", fontsize=8)
    ceilings = [timing for timing in timings if timing.role == "ceiling"]
    for timing, linestyle in zip(ceilings, itertools.cycle(("--", ":"))):
        axes.axvline(timing.median_ms, color=COLOURS["ceiling"], linestyle=linestyle, label=timing.contestant)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(timing.p80_ms for timing in bars))
    axes.set_xlabel("ms")
    axes.set_title(case)


def plot_trainings(results: Results, path: Path) -> None:
    """Test accuracy by epoch, one line per network and seed."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    labelled = set()
    for training in results.trainings:
        label = None if training.contestant in labelled else training.contestant
        labelled.add(training.contestant)
        epochs = range(1, len(training.test_accuracy) + 1)
        axes.plot(epochs, training.test_accuracy, color=COLOURS[training.role], label=label, linewidth=1.5)
    axes.set_ylim(80, 100.5)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{BENCHES['convergence']} ({results.environment.machine})", fontweight="bold")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)
    plt.close(figure)
