"""Figures of the diagnostics."""

from __future__ import annotations

from os import PathLike
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of its own, which touches neither pyplot's state nor a display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: str | PathLike[str] | None) -> Any:
    """The figure, written to a file unless path is None; the format is the suffix's."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
