"""The CUDA sources, built for the CPU with the stand-in of tests/cuda_emulator, and how to get at what it counts."""

import contextlib
import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest import mock

import pybind11
from filelock import FileLock

from nfnets_kernels import backend

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "tests" / "cuda_emulator"
CSRC = ROOT / "csrc"

FLAGS = [
    *["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"],
    *["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"],  # g++ does not know `#pragma unroll`
    *[f"-I{folder}" for folder in (STAND_IN, pybind11.get_include(), sysconfig.get_path("include"))],
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS]
# Python does not unload what it leaks, and it is not itself built with the sanitizer.
ASAN_OPTIONS = "detect_leaks=0:verify_asan_link_order=0"


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


def build_library(name: str, sources: Iterable[Path], headers: Iterable[Path], flags: list[str]) -> Path:
    """Compiles the sources, and the emulator, side by side; skipped where the same was built before."""
    sources = [*sources, STAND_IN / "emulator.cpp"]
    digest = _digest([*FLAGS, *flags], [*sources, *headers, *STAND_IN.glob("*.h")])
    library = ROOT / "build" / f"cuda_emulator-{digest}" / name
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.parent / "lock"):  # another process may need the same
        if not library.exists():
            _compile(library, sources, flags)
    return library


def build(sanitize: bool, *flags: str) -> Path:
    """The pybind11 module of csrc/cuda."""
    sources = sorted([*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cpp")])
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]
    name = f"_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    return build_library(name, sources, headers, [*(SANITIZED if sanitize else ["-O2"]), *flags])


def load(path: Path) -> ModuleType:
    """A built module, beside the one for GPUs."""
    # By a name of its own: of modules of one name, pybind11 gives out the first.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._cuda", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve_cpu_tensors(path: Path) -> None:
    """Backend "cuda" serves CPU tensors with a built module, where it is asked for by name."""
    backend.cuda_extension = load(path)
    backend._DEVICES["cuda"] = ("cpu",)
    backend.serving.cache_clear()
    backend._cuda_obstacle.cache_clear()


@contextlib.contextmanager
def serving_cpu_tensors(path: Path) -> Iterator[None]:
    """`serve_cpu_tensors` until the end of the `with` block."""
    with mock.patch.object(backend, "cuda_extension"), mock.patch.dict(backend._DEVICES):
        serve_cpu_tensors(path)
        yield
    backend.serving.cache_clear()
    backend._cuda_obstacle.cache_clear()


def controls(path: Path) -> ctypes.CDLL:
    """The functions emulator_* at the end of tests/cuda_emulator/emulator.cpp, of a library that is loaded or not."""
    library = ctypes.CDLL(str(path))
    for name in ("emulator_launches", "emulator_last_grid", "emulator_last_block", "emulator_last_stream"):
        getattr(library, name).restype = ctypes.c_int64
    return library


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[ctypes.CDLL]:
    """Backend "cuda" serves CPU tensors inside the `with` block, with a module built with these flags; its controls."""
    path = build(False, *flags)
    with serving_cpu_tensors(path):
        yield controls(path)


def sanitized_environment() -> dict[str, str]:
    """In which a Python process can load sanitized libraries."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        runtimes.append(str(Path(found.stdout.strip()).resolve()))
    return {**os.environ, "LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": ASAN_OPTIONS}
