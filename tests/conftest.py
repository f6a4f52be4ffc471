"""What every test shares: devices of timm's import, golden vectors, and fresh memory that holds NaN."""

import os
from collections.abc import Iterator
from pathlib import Path

# Triton reads it when a kernel is defined. Interpreted, its kernels run on CPU tensors; on a GPU they are compiled.
DEVICE = os.environ.get("NFK_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks.torchvision_compat import prepare

from .interpreter import prepare_interpreter
from .native import serve_extension

# A build of the CPU kernels that takes the place of nfnets_kernels._C: tests/native.py's for the sanitizers.
if "NFK_TEST_EXTENSION" in os.environ:
    serve_extension(Path(os.environ["NFK_TEST_EXTENSION"]))
prepare_interpreter()
prepare()  # before any test imports timm
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
# The processes of pytest-xdist share the cores; what depends on the number of threads sets it.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
# A module that tests/emulator.py has built: the tests of the ops run the CUDA kernels too, on the CPU.
if "NFK_TEST_CUDA_EMULATOR" in os.environ:
    from .emulator import serve_cpu_tensors

    serve_cpu_tensors(Path(os.environ["NFK_TEST_CUDA_EMULATOR"]))

# `pytest --hypothesis-profile=long` tries more, and `python -m tests.campaign` counts what it tries.
for name, examples in (("ci", 40), ("long", int(os.environ.get("NFK_TEST_EXAMPLES", "2000")))):
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile(name, deadline=None, max_examples=examples, suppress_health_check=unhurried)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """A fixed seed, and NaN in what torch.empty returns: an element that no kernel writes shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def backend(target: str) -> Iterator[str]:
    """The backend of a test's target, whose instruction set is selected while the test runs."""
    from .helpers import serving  # not before `serve_extension`: it imports the package

    with serving(target) as name:
        yield name


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """The vectors of the authors' own code (tests/data/README.md)."""
    with np.load(Path(__file__).parent / "data" / "deepmind.npz") as file:
        return dict(file)
