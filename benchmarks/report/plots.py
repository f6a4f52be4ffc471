"""Plots of the results, one per bench."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.kernel_categories import CATEGORIES, by_category
from benchmarks.report.tables import final_accuracies, gap_name, milliseconds
from benchmarks.results import BENCHES, ModelFigures, Profile, Results, Role, Timing, Training

COLOURS: dict[Role, str] = {"ours": "#1b7f5c", "peer": "#9aa5b1", "ceiling": "#c8553d"}
TRAINING_COLOURS = (COLOURS["ours"], "#d9a441", COLOURS["ceiling"], COLOURS["peer"])
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "nfnets_kernels",  # and the file the same
}
PEER_COLOURS = (COLOURS["peer"], "#d9a441", "#5b8fd0", "#a47fc4", "#c77f9a")
OUR_COLOURS = (COLOURS["ours"], "#6cc5a1", "#3f9fa3")
# Of the categories of kernels, neighbours of different brightness.
CATEGORY_COLOURS = (
    "#3b5f8a", "#9db8d6", "#c8553d", "#e8a87c", "#1b7f5c", "#d9a441", "#7a5ea8", "#c9a3d4", "#6fb7b7", "#9aa5b1",
)  # fmt: skip
FLOORS = {"memory": "memory bandwidth", "matmul": "matrix products"}


def drawings(results: Results) -> dict[str, Callable[[], Figure]]:
    """What draws the plot of a bench, by bench, for all that have figures to plot."""
    machine = results.environment.machine
    found: dict[str, Callable[[], Figure]] = {}
    for bench, title in BENCHES.items():
        if bench not in ("models", "scaling") and (cases := results.cases(bench)):
            found[bench] = partial(plot_timings, title, machine, cases)
    if results.trainings:
        found["convergence"] = partial(plot_trainings, results)
    if results.profiles:
        found["profile"] = partial(plot_profiles, results)
    if any(results.times(model)[0] for model in results.models):
        found["models"] = partial(plot_models, results)
    if sweeps := results.sweeps():
        found["scaling"] = partial(plot_sweeps, machine, sweeps)
    return found


def save_png(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a plot into a file."""
    with plt.rc_context(STYLE):
        figure = draw()
        figure.savefig(path)
        plt.close(figure)


def svg(draw: Callable[[], Figure], name: str) -> str:
    """A plot as an SVG element of a page: in the page's text colour, without a background, its ids in ``name``."""
    with plt.rc_context(STYLE):
        figure, stream = draw(), StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    element = stream.getvalue()
    element = element[element.index("<svg") :].replace("#000000", "currentColor")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", element)


def two_columns(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, of a height in inches, side by side in pairs."""
    rows = (count + 1) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(12, rows * height + 0.5), squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def plot_timings(title: str, machine: str, cases: dict[str, list[Timing]]) -> Figure:
    """A panel per case: a bar per contestant, whiskers from the 20th to the 80th percentile, ceilings as lines."""
    bars = max(sum(timing.role != "ceiling" for timing in timings) for timings in cases.values())
    figure, panels = two_columns(len(cases), 0.3 * bars + 0.9)
    figure.suptitle(f"{title} ({machine}); shorter is faster", fontweight="bold")
    for axes, (case, timings) in zip(panels, cases.items(), strict=True):
        plot_case(axes, case, timings)
    ceilings, names = panels[0].get_legend_handles_labels()
    if ceilings:
        figure.legend(ceilings, names, frameon=False, ncols=len(names), loc="outside lower center")
    return figure


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
        factor = "" if timing.role == "ours" else f" ({timing.relative_time:.2f}x ours)"
        text, beside = f"{milliseconds(timing.median_ms)} ms{factor}", (timing.p80_ms, position)
        axes.annotate(text, beside, xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    ceilings = [timing for timing in timings if timing.role == "ceiling"]
    for timing, linestyle in zip(ceilings, itertools.cycle(("--", ":"))):
        axes.axvline(timing.median_ms, color=COLOURS["ceiling"], linestyle=linestyle, label=timing.contestant)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(timing.p80_ms for timing in bars))
    axes.set_xlabel("ms")
    axes.set_title(fill(case, width=60))


def plot_trainings(results: Results) -> Figure:
    """Test accuracy by batch size, a line per contestant with the range of its seeds: all of it and its upper end."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    figure.suptitle(f"{BENCHES['convergence']} ({results.environment.machine})", fontweight="bold")
    contestants = dict.fromkeys(training.contestant for training in results.trainings)
    for axes, lowest in zip(panels, (0, 90), strict=True):
        for name, colour in zip(contestants, itertools.cycle(TRAINING_COLOURS)):
            plot_training(axes, {size: runs[name] for size, runs in results.trained().items() if name in runs}, colour)
        axes.plot([], [], "x", color="black", label="a seed diverged")
        axes.set_ylim(lowest, 100 + (100 - lowest) / 50)
        axes.set_xlabel("batch size; learning rate in proportion")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(results.trained()))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_ylabel("test accuracy, %")
    panels[0].legend(frameon=False, loc="center right")
    return figure


def plot_training(axes: Axes, runs_of: dict[int, list[Training]], colour: str) -> None:
    """The line of one contestant, given its runs by batch size; a cross where a seed diverged."""
    name = next(iter(runs_of.values()))[0].contestant
    reached = list(map(final_accuracies, runs_of.values()))
    means = [mean(one) for one in reached]
    axes.plot(list(runs_of), means, color=colour, linewidth=1.5, label=name)
    axes.fill_between(list(runs_of), list(map(min, reached)), list(map(max, reached)), color=colour, alpha=0.15, lw=0)
    for size, middle, runs in zip(runs_of, means, runs_of.values(), strict=True):
        axes.plot(size, middle, "x" if any(run.diverged for run in runs) else "o", color=colour, markersize=5)


def plot_models(results: Results) -> Figure:
    """What an image takes in a training step, against the published accuracy and against the multiply-adds."""
    times = {
        model: training.median_ms / model.batch_size
        for model in results.models
        if (training := results.times(model)[0])
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    figure.suptitle(f"{BENCHES['models']} ({results.environment.machine})", fontweight="bold")
    plot_points(left, {model: (ms, model.accuracy) for model, ms in times.items() if model.accuracy})
    left.set_ylabel("ImageNet top-1, %: as published, not trained here")
    plot_points(right, {model: (ms, model.multiply_adds / 1e9) for model, ms in times.items()})
    right.set_yscale("log")
    plain_numbers(right.yaxis)
    right.set_ylabel("multiply-adds of an image, G")
    right.plot([], [], "o", color=COLOURS["ours"], label="nfnets_kernels")
    right.plot([], [], "o", color=COLOURS["peer"], label="peers")
    right.legend(frameon=False, loc="lower right")
    return figure


def plot_points(axes: Axes, points: dict[ModelFigures, tuple[float, float]]) -> None:
    """A point per network, with its name on the left of ours and on the right of a peer."""
    for model, (x, y) in points.items():
        ours = model.role == "ours"
        axes.plot(x, y, "o", color=COLOURS[model.role])
        name = model.contestant if model.contestant.startswith("timm") else model.architecture
        # Two of ours lie close together where timm's network runs with our kernels.
        side, offset = ("right", (-5, -3 if name == model.architecture else 8)) if ours else ("left", (5, -8))
        axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", ha=side, fontsize=7)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel("training step, ms per image")
    axes.margins(x=0.25, y=0.1)


def plot_sweeps(machine: str, sweeps: dict[str, dict[str, list[Timing]]]) -> Figure:
    """A panel per sweep: time against what is varied, both logarithmic, with the floor."""
    figure, panels = two_columns(len(sweeps), height=4)
    figure.suptitle(f"{BENCHES['scaling']} ({machine}); lower is faster", fontweight="bold")
    for axes, (sweep, contestants) in zip(panels, sweeps.items(), strict=True):
        plot_sweep(axes, sweep, contestants)
    return figure


def plot_sweep(axes: Axes, sweep: str, contestants: dict[str, list[Timing]]) -> None:
    """A line per contestant with a band from the 20th to the 80th percentile, and the floor of every point."""
    colours: dict[Role, Iterator[str]] = {
        "ours": itertools.cycle(OUR_COLOURS),
        "peer": itertools.cycle(PEER_COLOURS),
        "ceiling": itertools.cycle([COLOURS["ceiling"]]),
    }
    for name, timings in contestants.items():
        colour, points = next(colours[timings[0].role]), by_value(timings)
        medians, low, high = (
            [getattr(one, key) for one in points.values()] for key in ("median_ms", "p20_ms", "p80_ms")
        )
        axes.plot(list(points), medians, "o-", color=colour, markersize=3, lw=1.5, label=name)
        axes.fill_between(list(points), low, high, color=colour, alpha=0.2, lw=0)
    plot_floor(axes, list(itertools.chain(*contestants.values())))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        plain_numbers(axis)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel(sweep.split(": ")[-1])
    axes.set_ylabel("ms")
    axes.set_title(sweep)
    axes.legend(frameon=False, fontsize=8)


def plot_floor(axes: Axes, timings: Sequence[Timing]) -> None:
    """What the work takes at the ceilings, where that is known; all contestants of a point have the same."""
    floors = {at: one.floor_ms for at, one in sorted(by_value(timings).items()) if one.floor_ms is not None}
    bounds = dict.fromkeys(FLOORS[timing.bound] for timing in timings if timing.bound)
    if floors:
        label = f"floor: {' or '.join(bounds)}"
        axes.plot(list(floors), list(floors.values()), "--", color=COLOURS["ceiling"], lw=1.2, label=label)


def plot_profiles(results: Results) -> Figure:
    """A panel per case: a bar per network, of what its step spends on each category and of what is left."""
    cases = results.profiled()
    heights = [len(profiles) + 1.5 for profiles in cases.values()]
    size = (12, 0.45 * sum(heights) + 1.2)
    figure, grid = plt.subplots(len(cases), figsize=size, height_ratios=heights, squeeze=False, layout="constrained")
    panels = list(grid.flat)
    figure.suptitle(f"{BENCHES['profile']} ({results.environment.machine})", fontweight="bold")
    for axes, (case, profiles) in zip(panels, cases.items(), strict=True):
        plot_profile(axes, profiles, gap_name(results))
        axes.set_title(fill(case, width=100))
    bars, names = panels[0].get_legend_handles_labels()
    figure.legend(bars, names, frameon=False, ncols=4, loc="outside lower center")
    return figure


def plot_profile(axes: Axes, profiles: Sequence[Profile], gap: str) -> None:
    """The bars of one case; all categories, so that every legend is the same."""
    names = [profile.contestant for profile in profiles]
    found = [by_category(profile) for profile in profiles]
    starts = [0.0] * len(profiles)
    for category, colour in zip(CATEGORIES, CATEGORY_COLOURS, strict=True):
        widths = [categories.get(category, (0.0, 0.0))[0] for categories in found]
        axes.barh(names, widths, left=starts, color=colour, height=0.65, label=category)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    gaps = [profile.gap_ms for profile in profiles]
    axes.barh(names, gaps, left=starts, color="none", edgecolor="#9aa5b1", hatch="//", height=0.65, label=gap)
    axes.invert_yaxis()
    axes.set_xlabel("ms")


def by_value(timings: Sequence[Timing]) -> dict[float, Timing]:
    """Timings by the value of what is varied."""
    return {timing.at: timing for timing in timings if timing.at is not None}


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis at 100, 200 and 500, in place of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
