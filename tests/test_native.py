"""The CPU kernels and the bindings under AddressSanitizer and UBSan, which watch, and find nothing."""

import re

import pytest

from .native import build_extension, run_sanitized

# The gradient's memory ends after 4096 elements, as the sanitizer knows and torch does not.
CLIP = """
import os, sys
from pathlib import Path
import numpy as np
import torch
from tests.native import serve_extension

serve_extension(Path(os.environ["NFK_TEST_EXTENSION"]))
import nfnets_kernels as nfk

memory, length = np.ones(4096, dtype=np.float32), int(sys.argv[1])
p = torch.nn.Parameter(torch.ones(length))
p.grad = torch.from_numpy(np.lib.stride_tricks.as_strided(memory, (length,)))
nfk.agc_(p, backend="cpu")
print("clipped:", bool((torch.from_numpy(memory) < 1).all()))
"""
PROPERTIES = ["test_agc", "test_sgd_agc", "test_weight_standardize", "test_scaled_activation", "test_residual",
              "test_residual_bias"]  # fmt: skip


@pytest.fixture(scope="session")
def extension() -> str:
    return str(build_extension())


def test_sanitizers_see_an_overrun_of_one_vector(extension):
    right = run_sanitized("-c", CLIP, "4096", NFK_TEST_EXTENSION=extension)
    assert (right.returncode, right.stdout) == (0, "clipped: True\n"), right.stderr
    wrong = run_sanitized("-c", CLIP, str(4096 + 16), NFK_TEST_EXTENSION=extension)
    assert wrong.returncode != 0 and "clipped:" not in wrong.stdout
    assert re.search(r"heap-buffer-overflow.*agc\.h", wrong.stderr, re.DOTALL), wrong.stderr


@pytest.mark.slow
def test_properties_of_the_ops_hold_sanitized(extension):
    files = [f"tests/{name}.py" for name in PROPERTIES]
    selected = ["-k", "test_any and cpu", "-x", "-q", "-p", "no:cacheprovider"]
    run = run_sanitized("-m", "pytest", *files, *selected, NFK_TEST_EXTENSION=extension, OMP_NUM_THREADS="2")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert re.match(rf"{len(PROPERTIES)} passed, \d+ deselected", run.stdout.splitlines()[-1]), run.stdout[-4000:]
