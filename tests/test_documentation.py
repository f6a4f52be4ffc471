"""The documentation builds without a warning, its links lead somewhere, its examples run, nothing public is missing."""

import functools
import importlib
import inspect
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import nfnets_kernels as nfk

from .helpers import DEVICE
from .module_helpers import on_one_thread

one_thread = pytest.fixture(on_one_thread, autouse=True)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
MODULES = [
    "nfnets_kernels",
    *(f"nfnets_kernels.{name}" for name in ("backend", "functional", "models", "modules", "optim", "sharded")),
    *(f"nfnets_kernels.{name}" for name in ("deployment", "diagnostics", "diagnostics.clipping")),
    *(f"nfnets_kernels.integrations.{name}" for name in ("lightning", "timm", "timm_training")),
]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


class Block(NamedTuple):
    """A piece of code in a page."""

    page: Path
    line: int
    code: str

    def __str__(self) -> str:
        return f"{named(self.page)}:{self.line}"


def blocks(language: str) -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(page, text[: match.start(1)].count("\n") + 1, match[1])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in strict mode: a link or an anchor that leads nowhere, or a page that no menu has, fails the build."""
    pytest.importorskip("mkdocs", reason="the site is built with Python 3.11 and newer")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]  # --quiet hides warnings
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_equations_are_drawn_without_a_script(site):
    for page in PAGES[1:]:
        name = page.relative_to(DOCS).with_suffix("")
        built = (site / (name.parent if name.name == "index" else name) / "index.html").read_text()
        assert "arithmatex" not in built, page
        assert built.count("<math") >= page.read_text().count("$$") // 2, page


def test_relative_links_of_the_readme_lead_to_files():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[0].read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.skipif(DEVICE != "cpu", reason="the examples are for CPU tensors")
@pytest.mark.parametrize("block", [*blocks("python")], ids=str)
def test_an_example_is_clean_and_runs(block, tmp_path, monkeypatch):
    rules = ["--isolated", "--line-length=120", "--target-version=py310", "--select=E,F,B,UP,SIM", "--quiet"]
    lint = [sys.executable, "-m", "ruff", "check", *rules, "-"]
    run = subprocess.run(lint, input=block.code, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    monkeypatch.chdir(tmp_path)  # where plots are written
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")  # tracebacks show the page
    exec(code, {"__name__": "__main__"})


@functools.cache
def help_of(*words: str) -> str:
    """What a module, or a command of it, says to --help; nfnets_kernels takes no arguments and says all it has to."""
    command = [sys.executable, "-m", *words, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


SHELL_LINES = {line.split("#")[0].strip() for block in blocks("bash") for line in block.code.splitlines()} - {""}


@pytest.mark.parametrize("line", sorted(SHELL_LINES))
def test_a_command_exists(line):
    program, *arguments = line.split()
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif (program, arguments[0]) == ("python", "-m"):
        words = itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[1:])
        options = {argument for argument in arguments if argument.startswith("--")}
        assert options <= {"--help", *re.findall(r"--[\w-]+", help_of(*words))}
    else:
        assert (program, arguments[0]) == ("pip", "install")


def test_every_op_has_a_page_with_a_place_for_what_was_measured():
    pages = {path.stem: path.read_text() for path in (DOCS / "ops").glob("*.md") if path.stem != "index"}
    assert set(pages) == set(nfk.backend.OPS)
    for op, text in pages.items():
        assert f"<!-- benchmark-table:{op}:start -->" in text.splitlines()
        assert f"<!-- benchmark-table:{op}:end -->" in text.splitlines()


def public(module: ModuleType) -> dict[str, Any]:
    """The public functions and classes of a module, by the names of where they are defined."""
    own = [name for name in vars(module) if not name.startswith("_")]
    objects = [getattr(module, name) for name in getattr(module, "__all__", own)]
    exported = hasattr(module, "__all__")
    found = [x for x in objects if inspect.isroutine(x) or inspect.isclass(x)]
    return {f"{x.__module__}.{x.__qualname__}": x for x in found if exported or x.__module__ == module.__name__}


def test_everything_public_is_in_the_reference(site):
    names: dict[str, Any] = {}
    for module in map(importlib.import_module, MODULES):
        found = public(module)
        assert found, module
        names |= found
    with (site / "objects.inv").open("rb") as stream:
        documented = importlib.import_module("mkdocstrings").Inventory.parse_sphinx(stream, domain_filter=["py"])
    assert names.keys() - documented.keys() == set()
    assert [name for name, x in names.items() if not inspect.getdoc(x)] == []
