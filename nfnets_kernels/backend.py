"""Which backend serves an op on a device, and why: nothing falls back silently.

Backends register a function per op; `select` chooses one, `describe` tells what is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Collection, Iterator
from types import ModuleType
from typing import Any

import torch

OPS = ("weight_standardize", "scaled_activation", "residual", "agc", "sgd_agc")
"""names of the ops"""
BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
"""what users may ask for"""

# Fastest first; a device type that is not named here has the reference alone. ROCm calls its devices "cuda" too.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# Triton reads the variable when a kernel is defined. Interpreted kernels check the logic on CPU tensors, some thousand
# times slower than compiled ones: they serve where they are asked for by name.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True", "on")
_TRITON_AT_LEAST = (3, 6)

# Whose memory an extension's kernels can address.
_DEVICES = {"cuda": ("cuda",), "cpu": ("cpu",)}

# Codes shared with csrc/units.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclasses.dataclass(frozen=True)
class _Kernel:
    implementation: Any  # what the op's module calls: a function, or a pair of them
    variants: Collection[str] | None  # the activations it knows; None: all


_kernels: dict[tuple[str, str], _Kernel] = {}
_recorders: list[list[tuple[str, str]]] = []


def _import_extension(name: str, advice: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"nfnets_kernels.{name}"), ""
    except ImportError as error:
        return None, f"nfnets_kernels.{name} is not built ({error}); {advice}"


def _triton_version() -> tuple[str, str]:
    """Version of Triton, and why its kernels cannot be used, each empty where there is none."""
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            if tuple(int(part) for part in version.split(".")[:2]) < _TRITON_AT_LEAST:
                needed = ".".join(map(str, _TRITON_AT_LEAST))
                return version, f"triton {version} is installed and {needed} or newer needed"
            return version, ""
    return "", "triton is not installed; install it with `pip install triton`"


_triton, _triton_missing = _triton_version()

# torch is imported above, so the extension shares the OpenMP runtime (and its threads) that torch has loaded.
extension, _extension_missing = _import_extension("_C", "install the package with `pip install .`")
if extension is not None and extension.cuda_build.startswith("not built"):  # then one that is there is another build's
    cuda_extension, _cuda_missing = None, f"nfnets_kernels._cuda is {extension.cuda_build}"
else:
    cuda_extension, _cuda_missing = _import_extension("_cuda", "install the package with NFK_CUDA=1 in the environment")


def register(op: str, backend: str, variants: Collection[str] | None = None) -> Callable[[Any], Any]:
    """Decorator: this is `backend`'s implementation of `op`, for those activations only where variants is given."""

    def decorate(implementation: Any) -> Any:
        _kernels[op, backend] = _Kernel(implementation, variants)
        return implementation

    return decorate


def _misplaced(backend: str, device: str) -> str | None:
    """Why a backend cannot address a device's memory; the reference can any."""
    if backend == "triton" and device == "cpu" and not TRITON_INTERPRETED:
        return "it runs on cpu tensors only under Triton's interpreter (TRITON_INTERPRET=1 in the environment)"
    if backend == "triton" and device == "cuda" and TRITON_INTERPRETED:
        return "TRITON_INTERPRET is set, and Triton's interpreter cannot follow tables of pointers into a GPU's memory"
    devices = ("cpu", "cuda") if backend == "triton" else _DEVICES.get(backend, (device,))
    return None if device in devices else f"it does not run on {device} tensors"


@functools.cache
def _cuda_obstacle() -> str | None:
    """Why the CUDA extension serves no tensors here.

    Only the current device is asked: each that is asked gets a context, some hundred MB of its memory.
    """
    if cuda_extension is None:
        return _cuda_missing
    if torch.version.hip is not None:
        return "torch is a ROCm build"
    if torch.cuda.is_available() and (obstacle := cuda_extension.obstacle(torch.cuda.current_device())):
        return f"{obstacle}: {torch.cuda.get_device_name()}, for kernels of {getattr(extension, 'cuda_build', None)}"
    return None


def unavailable(op: str, backend: str, device: str, variant: str | None = None) -> str | None:
    """Why `backend` cannot serve `op` (of that activation) on a device type, or None if it can."""
    misplaced = _misplaced(backend, device)
    if misplaced:
        return misplaced
    if backend == "cpu" and extension is None:
        return _extension_missing
    if backend == "cuda" and (obstacle := _cuda_obstacle()):
        return obstacle
    if backend == "triton" and _triton_missing:
        return _triton_missing
    kernel = _kernels.get((op, backend))
    if kernel is None:
        return f"this version has no {backend} kernel for {op}"
    if variant is not None and kernel.variants is not None and variant not in kernel.variants:
        return f"its {backend} kernel knows {', '.join(sorted(kernel.variants))}, not {variant}"
    return None


@functools.cache
def serving(op: str, device: str = "cpu", backend: str = "auto", variant: str | None = None) -> str:
    """Name of the backend that serves `op` on a device type; `variant` is the activation where an op has one.

    Raises:
        ValueError: op or backend is unknown, or the backend was asked for by name and cannot serve (with the reason).
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {OPS}, got {op!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend != "auto":
        reason = unavailable(op, backend, device, variant)
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot serve {op} on {device}: {reason}")
        return backend
    return next(b for b in _PREFERENCE.get(device, ("reference",)) if unavailable(op, b, device, variant) is None)


def select(op: str, device: str, backend: str = "auto", variant: str | None = None) -> Any:
    """The implementation of `op` for a device type; see `serving` for the choice and its errors."""
    name = serving(op, device, backend, variant)
    record(op, name)
    return _kernels[op, name].implementation


def record(op: str, backend: str) -> None:
    """Tells every `recording` block that `backend` runs `op`."""
    for recorder in _recorders:
        recorder.append((op, backend))


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Collects the (op, backend) of every op executed inside the `with` block, in order."""
    record: list[tuple[str, str]] = []
    _recorders.append(record)
    try:
        yield record
    finally:
        _recorders[:] = [recorder for recorder in _recorders if recorder is not record]


@dataclasses.dataclass(frozen=True)
class Description:
    """What is built and what serves each op; prints as text."""

    build: dict[str, str]
    """what was built, and for what"""
    serving: dict[str, dict[str, str]]
    """device type -> op -> backend"""
    reasons: dict[str, dict[str, list[str]]]
    """device type -> op -> why each preferred backend does not serve it, or not all of it"""

    def __str__(self) -> str:
        lines = [f"{key}: {value}" for key, value in self.build.items()]
        for device, ops in self.serving.items():
            lines.append(f"on {device} tensors:")
            for op, backend in ops.items():
                reasons = "; ".join(self.reasons[device][op])
                lines.append(f"  {op:<20} {backend}" + (f"  ({reasons})" if reasons else ""))
        return "\n".join(lines)


def _reasons(op: str, device: str) -> list[str]:
    preference = _PREFERENCE[device]
    served = serving(op, device)
    skipped = preference[: preference.index(served)]
    reasons = [f"not {b}: {unavailable(op, b, device)}" for b in skipped]
    variants = _kernels[op, served].variants
    if variants is not None:
        reasons.append(f"for {', '.join(sorted(variants))}; the reference serves the others")
    return reasons


def describe() -> Description:
    """What was built, which backend serves each op on CPU and CUDA tensors, and why not a preferred one."""
    from . import __version__

    build = {"nfnets_kernels": __version__, "torch": torch.__version__, "machine": platform.machine()}
    if extension is None:
        build["CPU kernels"] = _extension_missing
    else:
        threads = f"OpenMP, {torch.get_num_threads()} threads" if extension.openmp else "no OpenMP: one thread"
        build["CPU kernels"] = f"built; instruction set {extension.isa()}; {threads}"
    build["CUDA kernels"] = _cuda_obstacle() or f"built by {getattr(extension, 'cuda_build', None)}"
    interpreted = "; interpreted, and on cpu tensors where asked for by name" if TRITON_INTERPRETED else ""
    build["Triton kernels"] = _triton_missing or f"compiled at first use by triton {_triton}{interpreted}"
    build["CUDA device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible to torch"
    return Description(
        build=build,
        serving={device: {op: serving(op, device) for op in OPS} for device in _PREFERENCE},
        reasons={device: {op: _reasons(op, device) for op in OPS} for device in _PREFERENCE},
    )
