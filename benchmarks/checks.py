"""What a figure must pass before it is reported: right values, computed by the backend that was promised."""

from collections.abc import Iterable, Sequence

import torch

import nfnets_kernels as nfk
from benchmarks.results import Role


class BenchmarkError(Exception):
    """A comparison that must not be reported."""


def assert_close(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise ``BenchmarkError`` unless ``actual`` is within ``tolerance`` of ``expected``, relative to its norm."""
    if actual.shape != expected.shape:
        raise BenchmarkError(f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    # The float64 norm of a float32 difference: large tensors would lose digits in a float32 sum.
    error = torch.linalg.vector_norm(actual.float() - expected.float(), dtype=torch.float64).item()
    scale = torch.linalg.vector_norm(expected, dtype=torch.float64).item()
    if not error <= tolerance * max(scale, torch.finfo(torch.float32).tiny):
        raise BenchmarkError(f"{what}: differs from the reference by {error:.2e} with a norm of {scale:.2e}")


def assert_all_close(
    what: str, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float
) -> None:
    """``assert_close`` for each pair of two lists."""
    if len(actual) != len(expected):
        raise BenchmarkError(f"{what}: {len(actual)} tensors instead of {len(expected)}")
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"{what}[{index}]", one, other, tolerance)


def served_by(
    name: str,
    role: Role,
    ops: Iterable[str],
    executed: Iterable[tuple[str, str]],
    device: str,
    backend: str = "auto",
) -> str:
    """The backends that served a contestant, after asserting that it ran what it should, where the package promised."""
    ran: dict[str, set[str]] = {}
    for op, served in executed:
        ran.setdefault(op, set()).add(served)
    if missing := set(ops) - set(ran):
        raise BenchmarkError(f"{name}: did not run {sorted(missing)}")
    if ran and role != "ours":
        raise BenchmarkError(f"{name}: ran {sorted(ran)} of nfnets_kernels, so it is no peer")
    for op, backends in ran.items():
        promised = nfk.backend.serving(op, torch.device(device).type, backend)
        if backends != {promised}:
            raise BenchmarkError(f"{name}: {op} ran on {sorted(backends)} instead of {promised}")
    return "+".join(sorted(set().union(*ran.values())))
