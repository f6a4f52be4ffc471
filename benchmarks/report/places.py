"""The places in README and docs that are generated from the stored results, and those that disagree with them.

A place lies between the comments ``benchmark-table:start`` and ``benchmark-table:end``, for all machines in short, or
``benchmark-table:NAME:start`` and ``benchmark-table:NAME:end``, for one bench or for "all".
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.environment import REPOSITORY
from benchmarks.report.documents import docs_section, overview, readme_section
from benchmarks.report.machines import Machine
from benchmarks.results import BENCHES

COMMAND = "python -m benchmarks report --readme"
STORED = REPOSITORY / "benchmarks" / "results"
NAMES = ("all", *BENCHES)
# A line of its own each, so that prose can name them.
MARKER = re.compile(r"^<!-- benchmark-table(?::(\w+))?:(start|end) -->$", re.MULTILINE)
PLACE = re.compile(
    r"^(<!-- benchmark-table(?::(\w+))?:start -->)$.*?^(<!-- benchmark-table(?::\w+)?:end -->)$",
    re.MULTILINE | re.DOTALL,
)


def stored_folders() -> list[Path]:
    """Where results of this repository are."""
    return sorted(path.parent for path in STORED.glob("*/results.json"))


def marked_files(root: Path = REPOSITORY) -> list[Path]:
    """README, and every page of the docs."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def filled(path: Path, machines: Sequence[Machine]) -> str:
    """The text of a file with all its places as the results want them; ``ValueError`` where a marker is wrong."""
    text = path.read_text()
    check_markers(path, text)
    return PLACE.sub(partial(fill, machines), text)


def fill(machines: Sequence[Machine], place: re.Match[str]) -> str:
    """One place with its markers."""
    start, name, end = place.groups()
    return f"{start}\n{docs_section(machines, name) if name else readme_section(machines)}\n{end}"


def check_markers(path: Path, text: str) -> None:
    """Raise ``ValueError`` unless every start is followed by its end and names what there is."""
    markers = [(found[1], found[2]) for found in MARKER.finditer(text)]
    starts, ends = markers[::2], markers[1::2]
    if starts != [(name, "start") for name, _ in ends] or ends != [(name, "end") for name, _ in starts]:
        raise ValueError(f"{path}: every benchmark-table:start needs its benchmark-table:end, found {markers}")
    if unknown := [name for name, _ in starts if name not in (None, *NAMES)]:
        raise ValueError(f"{path}: no bench is called {unknown[0]}; there are {', '.join(NAMES)}")


def generated(machines: Sequence[Machine], root: Path = REPOSITORY) -> Iterator[tuple[Path, str]]:
    """Every committed file with generated text, and all of what should stand in it."""
    for path in marked_files(root):
        yield path, filled(path, machines)
    folder = root / STORED.relative_to(REPOSITORY)
    yield folder / "README.md", overview(machines, folder)


def stale_texts(machines: Sequence[Machine], root: Path) -> dict[Path, str]:
    """What should stand in the files in which it does not."""
    return {path: text for path, text in generated(machines, root) if not path.exists() or path.read_text() != text}


def stale(machines: Sequence[Machine], root: Path = REPOSITORY) -> list[Path]:
    """The files whose generated text is not that of the results."""
    return list(stale_texts(machines, root))


def update(machines: Sequence[Machine], root: Path = REPOSITORY) -> list[Path]:
    """Write them anew; the files that changed."""
    changed = stale_texts(machines, root)
    for path, text in changed.items():
        path.write_text(text)
    return list(changed)
