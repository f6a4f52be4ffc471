"""What adaptive gradient clipping did to each parameter, drawn."""

from __future__ import annotations

from os import PathLike
from typing import Any

from ..optim import AGC, SGD_AGC, ClippingStatistics
from .figures import new_figure, save

_INCHES_PER_ROW = 0.16


def plot(
    clipped: AGC | SGD_AGC | ClippingStatistics,
    path: str | PathLike[str] | None = None,
    *,
    clip_factor: float | None = None,
) -> Any:
    """Draws for every parameter which fraction of its units was clipped, and how far their gradients went.

    Args:
        clipped: what clips with `statistics=True`, or what its `stats()` returned.
        path: where to write it, for instance "clipping.png"; None: nowhere.
        clip_factor: drawn as a line, above which units were clipped; None takes that of an AGC or SGD_AGC.

    Returns:
        The matplotlib Figure, parameters from top to bottom as they were given, fraction of units clipped on the left,
        largest ratio of gradient norm to parameter norm on the right.

    Raises:
        ImportError: matplotlib is not installed.
        RuntimeError: nothing was counted.
        TypeError: clipped is something else.
        ValueError: no parameter was counted yet.
    """
    if not isinstance(clipped, (AGC, SGD_AGC, ClippingStatistics)):
        raise TypeError(
            f"clipped must be an AGC, an SGD_AGC or what their stats() returns, got {type(clipped).__name__}"
        )
    statistics = clipped if isinstance(clipped, ClippingStatistics) else clipped.stats()
    if not statistics:
        raise ValueError("clipped must have clipped gradients at least once, got no parameter that was counted")
    if clip_factor is None:
        clip_factor = _clip_factor(clipped)
    figure = new_figure(11.0, 1.2 + _INCHES_PER_ROW * len(statistics))
    fractions, ratios = figure.subplots(1, 2, sharey=True)
    rows = range(len(statistics))
    fractions.barh(rows, [row.fraction for row in statistics])
    fractions.set_yticks(rows, [row.name for row in statistics], fontsize=6)
    fractions.set_xlim(0.0, 1.0)
    fractions.set_xlabel(f"fraction of units clipped ({statistics.fraction:.1%} of all)")
    fractions.set_ylim(len(statistics) - 0.5, -0.5)
    ratios.plot([row.largest_ratio for row in statistics], rows, "o", markersize=3)
    ratios.set_xscale("log")
    ratios.set_xlabel("largest ratio of gradient norm to parameter norm")
    if clip_factor is not None:
        ratios.axvline(clip_factor, color="black", linewidth=0.8, linestyle="--")
        ratios.set_title(f"dashed: clip_factor {clip_factor:g}", fontsize="medium")
    for axes in (fractions, ratios):
        axes.grid(axis="x", alpha=0.3)
    return save(figure, path)


def _clip_factor(clipped: AGC | SGD_AGC | ClippingStatistics) -> float | None:
    """The one factor that all clipped groups share."""
    if isinstance(clipped, SGD_AGC):
        factors = {group["clip_factor"] for group in clipped.param_groups} - {None}
        return factors.pop() if len(factors) == 1 else None
    return clipped.clip_factor if isinstance(clipped, AGC) else None
