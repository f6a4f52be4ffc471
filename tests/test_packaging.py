"""What users are handed: an sdist that holds what builds and nothing else; a wheel that runs where it is installed."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import nfnets_kernels as nfk

from .test_structure import ROOT, SETUP

TOP = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
GENERATED = {"PKG-INFO", "setup.cfg"}


def run(*command: object, cwd: Path, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def build(source: Path, kind: str, out: Path, **environment: str) -> Path:
    """The sdist or wheel that `python -m build` makes, with what is installed instead of what it would download."""
    run("-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, source, cwd=out.parent, **environment)
    (built,) = out.iterdir()
    return built


def files(folder: Path, *parts: str) -> set[str]:
    """Paths, relative to the folder, of all files in these parts of it."""
    paths = [path for part in parts for path in (folder / part).rglob("*")]
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout without what git ignores."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    copy = tmp_path_factory.mktemp("checkout") / "nfnets"
    return shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *ignored))


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(checkout, "sdist", folder / "dist")) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"nfnets_kernels-{nfk.__version__}"


@pytest.fixture(scope="module")
def metadata(sdist) -> Message:
    return Parser().parsestr((sdist / "PKG-INFO").read_text())


def test_the_sdist_holds_what_builds_and_nothing_else(checkout, sdist):
    expected = files(checkout, "nfnets_kernels", "csrc") | TOP | GENERATED | {"tests/smoke.py"}
    assert {"csrc/dlpack.h", "csrc/cuda/launch.cuh", "nfnets_kernels/py.typed"} <= expected
    assert {name for name in files(sdist, ".") if ".egg-info/" not in name} == expected


@pytest.mark.slow
def test_the_wheel_of_the_sdist_runs_where_it_is_installed(sdist, tmp_path):
    """Not optimized, which takes half a minute instead of three, and the CPU half alone."""
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {SETUP["find_compiler"]()} "$@" -O0\n')
    compiler.chmod(0o755)
    wheel = build(sdist, "wheel", tmp_path / "dist", CXX=str(compiler), NFK_CUDA="0")
    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)

    (installed,) = importlib.metadata.distributions(path=[str(site)])
    info = f"nfnets_kernels-{nfk.__version__}.dist-info"
    extension = SETUP["sysconfig"].get_config_var("EXT_SUFFIX")
    held = {str(path) for path in installed.files if path.suffix != ".pyc"}
    package = {name for name in held if not name.startswith(info)}
    assert package == files(sdist, "nfnets_kernels") | {f"nfnets_kernels/_C{extension}"}
    assert f"{info}/licenses/LICENSE" in held
    assert f"nfnets_kernels {nfk.__version__} works" in run(ROOT / "tests/smoke.py", cwd=tmp_path, PYTHONPATH=str(site))


def test_metadata(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = {text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text}
    assert required == {"torch>=2.10", "numpy"}
    described = (ROOT / "README.md").read_text().strip()
    assert metadata.get_payload().strip() == described


def test_the_version_stands_in_one_place(metadata):
    assert metadata["Version"] == nfk.__version__
    assert not re.search(r"^version", (ROOT / "pyproject.toml").read_text().partition("[tool")[0], re.MULTILINE)
    assert not re.search(r"^version", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\d\S*) - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == nfk.__version__


def test_extras_that_texts_name_exist(metadata):
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        extra
        for text in texts
        for extras in re.findall(r"(?:nfnets-kernels|[ \"'.]\.)\[([\w,-]+)\]", text.read_text())
        for extra in extras.split(",")
    }
    assert "pretrained" in named
    assert named <= set(metadata.get_all("Provides-Extra"))
