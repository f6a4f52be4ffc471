"""The CPU kernels and the bindings under AddressSanitizer and UBSan, which watch, and find nothing."""

import re

import pytest

from .native import assert_overrun_is_reported, build_extension, run_sanitized

PROPERTIES = ["test_agc", "test_sgd_agc", "test_weight_standardize", "test_scaled_activation", "test_residual",
              "test_residual_bias"]  # fmt: skip


@pytest.fixture(scope="session")
def extension() -> str:
    return str(build_extension())


def test_sanitizers_see_an_overrun_of_one_vector(extension):
    assert_overrun_is_reported("cpu", 16, "agc.h", extension)


@pytest.mark.slow
def test_properties_of_the_ops_hold_sanitized(extension):
    files = [f"tests/{name}.py" for name in PROPERTIES]
    selected = ["-k", "test_any and cpu", "-x", "-q", "-p", "no:cacheprovider"]
    run = run_sanitized("-m", "pytest", *files, *selected, NFK_TEST_EXTENSION=extension, OMP_NUM_THREADS="2")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert re.match(rf"{len(PROPERTIES)} passed, \d+ deselected", run.stdout.splitlines()[-1]), run.stdout[-4000:]
