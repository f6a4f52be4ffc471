"""The rules of the house: one op = one basename everywhere, arrows point one way, what csrc may include and export."""

import ast
import graphlib
import importlib.metadata
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from nfnets_kernels import backend

ROOT = Path(__file__).parents[1]
PACKAGE, CSRC = ROOT / "nfnets_kernels", ROOT / "csrc"
# bias_activation is run by the kernels of residual.
NO_OPS = {"__init__", "library", "snapshot", "bias_activation"}
OPS = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - NO_OPS

# Each part may import those of its own and of earlier layers, `backend` from everywhere; cycles are excluded by a test.
LAYERS = (
    {"backend"},
    {"reference", "triton_kernels"},
    {"ops"},
    {"sharded"},
    {"functional", "modules", "optim"},
    {"models", "integrations", "diagnostics", "deployment"},
    {"benchmarks"},
)
LAYER_OF = {part: i for i, parts in enumerate(LAYERS) for part in parts}


def setup_constants() -> dict:
    """The globals of setup.py, run without calling setup()."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


SETUP = setup_constants()


def stems(folder: Path, pattern: str) -> set[str]:
    return {path.stem for path in folder.glob(pattern)} - {"__init__"}


def registered(name: str) -> set[str]:
    return {op for op, served_by in backend._kernels if served_by == name}


def imported_names(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, at any depth; `from . import a` gives the package's `a`."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def part_of(name: str) -> str | None:
    """The part that a dotted name belongs to: "ops" for nfnets_kernels.ops.agc, None for what is not ours."""
    first, *rest = name.split(".")
    if first == "benchmarks":
        return first
    return (rest[0] if rest else "the whole package") if first == "nfnets_kernels" else None


def arrows() -> set[tuple[str, str]]:
    """(importing part, imported part) of every import between parts; the package's __init__ may import all of them."""
    found = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        source = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if source not in ("__init__", "__main__"):
            found |= {(source, part_of(name)) for name in imported_names(path)}
    return {(source, target) for source, target in found if target not in (None, source)}


def test_every_part_of_the_package_has_a_layer():
    parts = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} | stems(PACKAGE, "*.py")
    assert parts - {"__main__"} <= set(LAYER_OF)


def test_arrows_point_one_way():
    found = arrows()
    assert {("ops", "reference"), ("ops", "backend"), ("functional", "ops"), ("models", "modules")} <= found
    allowed = {("backend", "__version__"), ("benchmarks", "the whole package"), ("benchmarks", "__version__")}
    wrong = {
        (source, target)
        for source, target in found - allowed
        if target not in LAYER_OF or LAYER_OF[target] > LAYER_OF[source]
    }
    assert not wrong


def test_no_two_parts_import_each_other():
    graph: dict[str, set[str]] = {}
    for source, target in arrows():
        graph.setdefault(source, set()).add(target)
    graphlib.TopologicalSorter(graph).prepare()


def test_the_package_needs_only_its_dependencies():
    """Except for integrations, which are for those who have the other package, Triton, and plots."""
    required = [text for text in importlib.metadata.requires("nfnets_kernels") or [] if "extra ==" not in text]
    allowed = {re.match(r"[\w-]+", text)[0] for text in required} | {"nfnets_kernels"} | sys.stdlib_module_names
    assert {"torch", "numpy"} <= allowed
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0]
        if part != "integrations":
            imported = {name.split(".")[0] for name in imported_names(path)}
            optional = {"triton_kernels": {"triton"}, "diagnostics": {"matplotlib"}}.get(part, set())
            assert imported <= allowed | optional, path


def test_the_package_imports_without_optional_packages():
    optional = [
        "timm",
        "torchvision",
        "lightning",
        "pytorch_lightning",
        "ninja",
        "pybind11",
        "rich",
        "matplotlib",
        "huggingface_hub",
        "safetensors",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "jax",
    ]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({optional})); import nfnets_kernels as n; n.backend.describe()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_ops_have_the_basename_of_their_reference_and_their_tests():
    assert {"weight_standardize", "scaled_activation", "residual", "agc"} <= OPS
    assert set(backend.OPS) == OPS == registered("reference")
    assert stems(PACKAGE / "reference", "*.py") == OPS
    assert {f"test_{op}" for op in OPS} <= stems(ROOT / "tests", "test_*.py")


def test_cpu_kernels_have_the_basename_of_their_op():
    sources = stems(CSRC / "cpu", "*.cpp") - {"isa"}
    assert sources == set(SETUP["KERNEL_SOURCES"]) == registered("cpu")
    assert sources <= stems(CSRC / "kernels", "*.h")
    assert stems(CSRC / "kernels", "*.h") - OPS == {"number", "order"}


@pytest.mark.parametrize("name, folder, pattern", [("triton", PACKAGE / "triton_kernels", "*.py"),
                                                   ("cuda", CSRC / "cuda", "*.cu")])  # fmt: skip
def test_gpu_kernels_have_the_basename_of_their_op(name, folder, pattern):
    assert stems(folder, pattern) & OPS == registered(name)


def csrc_includes() -> list[tuple[Path, str]]:
    paths = [path for path in CSRC.rglob("*") if path.is_file()]
    return [(path, name) for path in paths for name in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())]


def test_csrc_includes_no_header_of_torch_and_only_the_bindings_include_python():
    """The bindings, and csrc/python, whose headers are theirs: what they do with Python objects is more than a line."""
    found = csrc_includes()
    assert (CSRC / "bindings.cpp", "pybind11/pybind11.h") in found
    for path, name in found:
        of_python = path.name == "bindings.cpp" or path.parent.name == "python"
        assert not re.match(r"(torch|ATen|c10|caffe2|THC)\b", name), f"{path} includes {name}"
        assert not re.match(r"(pybind11|Python\.h|(.*/)?python/)", name) or of_python, f"{path} includes {name}"


def test_what_happens_to_one_unit_does_not_know_where_it_runs():
    found = [(path, name) for path, name in csrc_includes() if path.parent.name == "kernels" or path.name == "units.h"]
    assert (CSRC / "kernels" / "agc.h", "number.h") in found
    for path, name in found:
        assert not re.search(r"(cpu|cuda)/|omp\.h|cuda", name), f"{path} includes {name}"


def test_kernel_launches_stand_in_one_file():
    launching = {path.name for path in CSRC.rglob("*") if path.is_file() and "<<<" in path.read_text()}
    assert launching <= {"launch.cuh"}


@pytest.mark.parametrize("folder", ["nfnets_kernels", "csrc", "benchmarks", "tests"])
def test_files_are_short(folder):
    sources = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    assert sources
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert not {path: length for path, length in lengths.items() if length >= 400}


@pytest.mark.parametrize("source", SETUP["KERNEL_SOURCES"])
def test_a_kernel_of_one_instruction_set_shares_no_symbol_with_another(source, tmp_path):
    """The linker would keep one of two weak definitions, perhaps the AVX-512 one, for every caller on every CPU."""
    isa, flags = list(SETUP["ISA_FLAGS"].items())[-1]
    out = tmp_path / f"{source}.o"
    command = [SETUP["find_compiler"](), *SETUP["COMMON_FLAGS"], f"-DNFK_ISA={isa}", *flags]
    subprocess.run([*command, "-c", str(CSRC / "cpu" / f"{source}.cpp"), "-o", str(out)], check=True)
    symbols = subprocess.run(["nm", "--format=posix", str(out)], check=True, capture_output=True, text=True).stdout
    by_kind: dict[str, list[str]] = {}
    for name, kind in (line.split()[:2] for line in symbols.splitlines()):
        by_kind.setdefault(kind, []).append(name)
    assert "-O3" in command
    assert not {kind: names for kind, names in by_kind.items() if kind in "WwVvui"}
    exported = [name for kind, names in by_kind.items() if kind.isupper() and kind != "U" for name in names]
    assert exported
    assert all(name.startswith(f"_ZN3nfk3cpu{len(isa)}{isa}") for name in exported)
    assert not [name for name in by_kind.get("U", []) if name.startswith("_Z")]
