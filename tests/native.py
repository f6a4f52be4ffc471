"""Compiles C++ of this repository for tests, sanitized or not, and loads what it has compiled.

It imports nothing of the package: what it loads may take the place of nfnets_kernels._C.
"""

import hashlib
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
from filelock import FileLock

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"

FLAGS = [
    *["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"],
    *["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"],  # g++ does not know `#pragma unroll`
    *[f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))],
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS]
# Python does not unload what it leaks, and it is not itself built with the sanitizer.
ASAN_OPTIONS = "detect_leaks=0:verify_asan_link_order=0"

EXTENSION = "nfnets_kernels._C"


def _digest(flags: Iterable[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256(repr(list(flags)).encode())
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    compiled = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert compiled.returncode == 0, f"{' '.join(command)}\n{compiled.stderr}"


def _compile(library: Path, sources: Iterable[Path], flags: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(source: Path) -> str:
            out = str(Path(folder, source.name).with_suffix(source.suffix + ".o"))
            _run(["g++", *FLAGS, *flags, "-x", "c++", "-c", str(source.relative_to(ROOT)), "-o", out])
            return out

        linked = Path(folder, library.name)
        _run(["g++", "-shared", *flags, *pool.map(compile_one, sources), "-o", str(linked)])
        linked.replace(library)  # whole or not there, should the build be interrupted


def build_library(kind: str, name: str, sources: list[Path], headers: Iterable[Path], flags: list[str]) -> Path:
    """Compiles the sources side by side; skipped where the same was built before."""
    library = ROOT / "build" / f"{kind}-{_digest([*FLAGS, *flags], [*sources, *headers])}" / name
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.parent / "lock"):  # another process may need the same
        if not library.exists():
            _compile(library, sources, flags)
    return library


def module_name(stem: str) -> str:
    return f"{stem}{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def build_extension(*flags: str) -> Path:
    """nfnets_kernels._C for the sanitizers, with the kernels of the baseline instruction set alone.

    The instruction sets compile the same source, and a sanitized loop is not vectorized.
    """
    sources = [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    flags = (
        *[*SANITIZED, "--param=asan-instrumentation-with-call-threshold=0"],  # which halves the time to compile
        *["-fopenmp", "-Wno-psabi", "-DNFK_ISA=baseline", "-DNFK_BASELINE_ONLY"],
        *['-DNFK_CUDA_BUILD="not built: this build is for the sanitizers"', *flags],
    )
    return build_library("sanitized", module_name("_C"), sources, CSRC.rglob("*.h"), list(flags))


def load(path: Path, name: str) -> ModuleType:
    """A compiled module by a name of its own: of modules of one name, pybind11 gives out the first."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve_extension(path: Path) -> None:
    """The package that is imported afterwards takes what `build_extension` built as its nfnets_kernels._C."""
    import torch  # noqa: F401  # with the OpenMP runtime that the extension shares

    assert "nfnets_kernels" not in sys.modules, "the package has loaded its own"
    sys.modules[EXTENSION] = load(path, EXTENSION)


def sanitized_environment(**variables: str) -> dict[str, str]:
    """In which a Python process can load sanitized libraries."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        runtimes.append(str(Path(found.stdout.strip()).resolve()))
    return {**os.environ, "LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": ASAN_OPTIONS, **variables}


def run_sanitized(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in `sanitized_environment`."""
    environment = sanitized_environment(**variables)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


# The gradient's memory ends after 4096 elements, as the sanitizer knows and torch does not.
_CLIP = """
import os, sys
from pathlib import Path
import numpy as np
import torch
from tests.native import serve_extension

backend, length, library = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
if backend == "cuda":
    from tests.emulator import serve_cpu_tensors

    serve_cpu_tensors(library)
else:
    serve_extension(library)
import nfnets_kernels as nfk

memory = np.ones(4096, dtype=np.float32)
p = torch.nn.Parameter(torch.ones(length))
p.grad = torch.from_numpy(np.lib.stride_tricks.as_strided(memory, (length,)))
nfk.agc_(p, backend=backend)
print("clipped:", bool((torch.from_numpy(memory) < 1).all()))
"""


def assert_overrun_is_reported(backend: str, elements: int, source: str, library: str) -> None:
    """A sanitized library clips a gradient in its memory, and is caught where it reads so many elements beyond it."""
    right = run_sanitized("-c", _CLIP, backend, "4096", library)
    assert (right.returncode, right.stdout) == (0, "clipped: True\n"), right.stderr
    wrong = run_sanitized("-c", _CLIP, backend, str(4096 + elements), library)
    assert wrong.returncode != 0 and "clipped:" not in wrong.stdout
    assert re.search(rf"heap-buffer-overflow.*{re.escape(source)}", wrong.stderr, re.DOTALL), wrong.stderr
