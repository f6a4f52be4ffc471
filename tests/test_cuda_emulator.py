"""The CUDA kernels on the CPU: the stand-in for CUDA finds what it has to, and under sanitizers the ops' tests pass."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from . import emulator
from .native import SANITIZED, assert_overrun_is_reported, run_sanitized

OP_TESTS = [
    *["test_agc", "test_agc_contract", "test_agc_oracles", "test_optim_agc"],
    *["test_sgd_agc", "test_sgd_agc_contract", "test_sgd_agc_oracles", "test_weight_standardize"],
]
LAUNCH_FAILURE = 719


def build_kernels(*flags: str) -> Path:
    return emulator.build_library("libkernels.so", [emulator.STAND_IN / "test_kernels.cu"], [], list(flags))


class Kernels:
    """The kernels of tests/cuda_emulator/test_kernels.cu."""

    def __init__(self, path: Path) -> None:
        self.library = emulator.controls(path)

    def run(self, name: str, *, grid: int = 1, block: int = 64, x: np.ndarray, out: np.ndarray, n: int = 0) -> str:
        """The message of the launch's error, empty if there is none."""
        launch = getattr(self.library, f"run_{name}")
        launch.restype = ctypes.c_char_p
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, out)]
        return (launch(grid, block, *pointers, ctypes.c_int64(n)) or b"").decode()

    def run_with_parameters(self, size: int) -> str:
        launch = getattr(self.library, f"run_take_{size}_bytes")
        launch.restype = ctypes.c_char_p
        return (launch() or b"").decode()


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return Kernels(build_kernels("-O2"))


def sums(kernels: Kernels, x: np.ndarray, block: int) -> np.ndarray:
    out = np.full(len(x), np.nan, dtype=np.float32)
    assert not kernels.run("sum_rows", grid=len(x), block=block, x=x, out=out, n=x.shape[1])
    return out


@pytest.mark.parametrize("block", [32, 128, 1024])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (20, 1000)], ids=str)
def test_sums_over_a_block(kernels, shape, block):
    x = floats(*shape)
    np.testing.assert_allclose(sums(kernels, x, block), x.sum(axis=1), rtol=0, atol=1e-6 * abs(x).sum(axis=1).max())


@pytest.mark.parametrize("block", [32, 64, 1024])
def test_shuffles_of_every_type(kernels, block):
    out = np.full(block, np.nan, dtype=np.float32)
    assert not kernels.run("shuffle_types", block=block, x=out, out=out)
    lanes = np.arange(block) % 32
    np.testing.assert_array_equal(out, -(lanes ^ 1) - 5)


@pytest.mark.parametrize("n", [128, 126, 128 * 7 + 2])
def test_vectors(kernels, n):
    x, out = floats(n + 1), np.full(n + 1, np.nan, dtype=np.float32)
    assert not kernels.run("copy_vectors", grid=8, block=32, x=x, out=out, n=n)
    np.testing.assert_array_equal(out[:n], x[:n])
    assert np.isnan(out[n])


@pytest.mark.parametrize(
    "name, message",
    [
        ("write_twice", r"block 0, thread [67] writes 4 bytes at 0x\w+, which this launch has written before"),
        ("read_what_was_written", r"block 0, thread 33 reads 4 bytes at 0x\w+ with __ldg, which this launch has writ"),
        ("end_before_barrier", r"thread 0 waits at __syncthreads \(.*\.cu:\d+\), which thread 40 .*: it has ended"),
        ("part_at_two_barriers", r"thread \d+ arrives at __syncthreads \(.*\) while others wait at __syncthreads \("),
        ("half_a_warp_at_barrier", r"thread 0 waits at __syncthreads .* thread 16 .*: it waits at __shfl_xor_sync \("),
        ("end_before_shuffle", r"thread 0 waits at __shfl_xor_sync \(.*\.cu:\d+\), which thread 31 .*: it has ended"),
        ("shuffle_in_two_branches", r"thread \d+ arrives at __shfl_xor_sync \(.*\) while others wait at __shfl_xor_s"),
        ("shuffle_half_a_warp", r"thread \d+ calls __shfl_xor_sync \(.*\) with the mask 0xffff, not a full one"),
    ],
)
def test_a_fault_fails_its_launch_and_no_other(kernels, name, message):
    x, out = floats(2, 64), np.empty(128, dtype=np.float32)
    assert re.search(message, kernels.run(name, grid=2, x=x, out=out))
    np.testing.assert_allclose(sums(kernels, x, 64), x.sum(axis=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [1, 31, 2, 30, 4, 28, 8, 24, 16])
def test_a_missing_barrier_between_lanes_gives_wrong_results(kernels, n):
    x, out = floats(32) + n, np.empty(32, dtype=np.float32)  # shared memory still holds what the last launch left there
    assert not kernels.run("pass_on_without_barrier", block=32, x=x, out=out, n=n)
    assert (out != np.roll(x, -n)).any()


def test_a_missing_barrier_around_what_one_thread_tells_gives_wrong_results(kernels):
    x, out = floats(2), np.empty((2, 64), dtype=np.float32)
    assert not kernels.run("tell_without_barrier", x=x, out=out)
    assert (out[0] != x[0]).any()
    assert not kernels.run("tell_the_next_too_soon", x=x, out=out)
    assert (out != x[:, None]).any()


def test_lanes_that_a_warp_does_not_have_are_not_read(kernels):
    out = np.empty(63, dtype=np.float32)
    message = kernels.run("read_missing_lane", block=63, x=out, out=out)
    assert re.fullmatch(r"block 0, thread (3[2-9]|[45]\d|6[0-2]) reads lane 31, which its warp does not have", message)


@pytest.mark.parametrize("n, vector", [(8, 16), (2, 8)])
@pytest.mark.parametrize("misaligned, access", [("x", "reads"), ("out", "writes")])
def test_misaligned_vectors(kernels, n, vector, misaligned, access):
    arrays = {"x": floats(16), "out": floats(16)}
    arrays[misaligned] = arrays[misaligned][1:]
    message = kernels.run("copy_vectors", **arrays, n=n)
    assert re.search(
        rf"block 0, thread \d+ {access} {vector} bytes at 0x\w+, which is no multiple of {vector}", message
    )


@pytest.mark.parametrize("grid, block", [(0, 32), (1, 0), (1, 1025), (2**31, 32), (2**32 - 1, 32)])
def test_grids_and_blocks_have_limits(kernels, grid, block):
    out = np.empty(1, dtype=np.float32)
    assert re.search(r"the grid has|a block has", kernels.run("sum_rows", grid=grid, block=block, x=out, out=out))


def test_parameters_have_the_limit_of_the_cuda_version(kernels):
    assert not kernels.run_with_parameters(4096) and not kernels.run_with_parameters(32764)
    assert kernels.run_with_parameters(32768) == "the kernel takes 32768 bytes of parameters, more than 32764"
    old = Kernels(build_kernels("-O2", "-DCUDART_VERSION=12000"))
    assert not old.run_with_parameters(4096)
    assert old.run_with_parameters(32764) == "the kernel takes 32764 bytes of parameters, more than 4096"


def test_launches_are_counted_and_the_last_is_described(kernels):
    before = kernels.library.emulator_launches()
    sums(kernels, floats(3, 5), 64)
    sums(kernels, floats(7, 5), 32)
    assert kernels.library.emulator_launches() == before + 2
    assert (kernels.library.emulator_last_grid(), kernels.library.emulator_last_block()) == (7, 32)
    assert (kernels.library.emulator_last_device(), kernels.library.emulator_last_stream()) == (0, 0)


def test_a_planted_error_fails_one_launch(kernels):
    x, out = floats(2, 5), np.zeros(2, dtype=np.float32)
    kernels.library.emulator_fail_next_launch(LAUNCH_FAILURE)
    assert kernels.run("sum_rows", grid=2, x=x, out=out, n=5) == "unspecified launch failure"
    assert not out.any()
    assert sums(kernels, x, 64).all()


def test_a_stub_launches_without_running(kernels):
    out = np.zeros(2, dtype=np.float32)
    kernels.library.emulator_set_stub(1)
    try:
        assert not kernels.run("sum_rows", grid=2, x=floats(2, 5), out=out, n=5)
        assert kernels.run("sum_rows", grid=0, x=floats(2, 5), out=out, n=5)
    finally:
        kernels.library.emulator_set_stub(0)
    assert not out.any()


def test_devices(kernels):
    assert kernels.library.emulator_set_device(1) == 0
    try:
        sums(kernels, floats(2, 5), 32)
        assert kernels.library.emulator_device() == kernels.library.emulator_last_device() == 1
        assert kernels.library.emulator_set_device(2) != 0
        assert kernels.library.emulator_device() == 1
    finally:
        kernels.library.emulator_set_device(0)


LAUNCHES = """
import sys
from pathlib import Path
import numpy as np
from tests.test_cuda_emulator import Kernels

kernels = Kernels(Path(sys.argv[1]))
x, out = np.ones((1, 1024), dtype=np.float32), np.ones(1024, dtype=np.float32)
assert "has ended" in kernels.run("end_before_barrier", x=x, out=out)  # leaves stacks as they are
for n in sys.argv[4:]:
    print("error:", kernels.run(sys.argv[2], block=int(sys.argv[3]), x=x, out=out, n=int(n)), flush=True)
"""


@pytest.mark.parametrize(
    "name, block, n, allowed, report",
    [
        ("sum_rows", 64, 1025, 1024, r"heap-buffer-overflow.*READ of size 4.*__ldg"),
        ("copy_vectors", 512, 1026, 1024, r"heap-buffer-overflow.*copy_vectors"),
        ("overflow_shared", 32, 1, 0, r"global-buffer-overflow.*WRITE of size 4.*overflow_shared"),
        ("shift", 32, 33, 30, r"runtime error: shift exponent 33"),
    ],
)
def test_sanitizers_watch(name, block, n, allowed, report):
    # Without the other sanitizer's check of sizes, which would find the overflow of a shared array first, but not all.
    library = str(build_kernels(*SANITIZED, "-fno-sanitize=object-size"))
    run = run_sanitized("-c", LAUNCHES, library, name, str(block), str(allowed), str(n))
    assert run.stdout == "error: \n", run.stderr  # of the allowed n; the other ends the process
    assert run.returncode != 0
    assert re.search(report, run.stderr, re.DOTALL), run.stderr


@pytest.fixture(scope="session")
def module() -> str:
    return str(emulator.build(sanitize=True))


def test_sanitizers_watch_the_ops(module):
    assert_overrun_is_reported("cuda", 1, "agc.cu", module)


@pytest.mark.slow
def test_tests_of_the_ops_pass_sanitized(module):
    files = [f"tests/{name}.py" for name in OP_TESTS]
    selected = ["-k", "cuda", "-x", "-q", "-p", "no:cacheprovider"]
    run = run_sanitized("-m", "pytest", *files, *selected, NFK_TEST_CUDA_EMULATOR=module, OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    outcome = run.stdout.splitlines()[-1]
    passed = re.search(r"(\d+) passed", outcome)
    assert passed and int(passed[1]) > 400, outcome
    assert not re.search("skipped|xfailed|error", outcome)
