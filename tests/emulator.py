"""The CUDA sources, built for the CPU with the stand-in of tests/cuda_emulator, and how to get at what it counts."""

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

from nfnets_kernels import backend

from . import native

STAND_IN = native.ROOT / "tests" / "cuda_emulator"


def build_library(name: str, sources: Iterable[Path], headers: Iterable[Path], flags: list[str]) -> Path:
    """Compiles the sources and the emulator."""
    sources = [*sources, STAND_IN / "emulator.cpp"]
    headers = [*headers, *STAND_IN.glob("*.h")]
    return native.build_library("cuda_emulator", name, sources, headers, [f"-I{STAND_IN}", *flags])


def build(sanitize: bool, *flags: str) -> Path:
    """The pybind11 module of csrc/cuda."""
    sources = sorted([*(native.CSRC / "cuda").glob("*.cu"), *(native.CSRC / "cuda").glob("*.cpp")])
    headers = [*native.CSRC.rglob("*.h"), *native.CSRC.rglob("*.cuh")]
    optimized = native.SANITIZED if sanitize else ["-O2"]
    return build_library(native.module_name("_cuda"), sources, headers, [*optimized, *flags])


def serve_cpu_tensors(path: Path) -> None:
    """Backend "cuda" serves CPU tensors with a built module, where it is asked for by name."""
    backend.cuda_extension = native.load(path, f"{path.parent.name}._cuda")
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
