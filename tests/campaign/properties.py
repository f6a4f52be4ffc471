"""The property tests of every op, with the kernels as built and with the sanitizers; what they tried."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .. import emulator, native
from .counting import FILE

OPS = ("agc", "sgd_agc", "weight_standardize", "scaled_activation", "residual")
TESTS = [f"tests/test_{name}.py" for name in (*OPS, "residual_bias")]
_REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error: ")


class Run(NamedTuple):
    """The property tests of some backends in one process."""

    name: str
    selected: str
    """pytest's -k"""
    tests: list[str]
    examples: int
    """that hypothesis is asked for, per test and backend"""
    environment: Callable[[], dict[str, str]]
    """compiles what it needs"""


def _sanitized_cpu() -> dict[str, str]:
    return native.sanitized_environment(NFK_TEST_EXTENSION=str(native.build_extension()))


def _sanitized_cuda() -> dict[str, str]:
    return native.sanitized_environment(NFK_TEST_CUDA_EMULATOR=str(emulator.build(sanitize=True)))


def runs(examples: int) -> list[Run]:
    """All of them; of emulated kernels, which are slow, a fraction of the examples."""
    with_cuda = [test for test in TESTS if re.search("/test_(agc|sgd_agc|weight_standardize)", test)]
    return [
        Run("built", "test_any and not triton", TESTS, examples, lambda: dict(os.environ)),
        Run("interpreted", "test_any and triton", TESTS, examples // 4, lambda: dict(os.environ)),
        Run("sanitized", "test_any and cpu", TESTS, examples // 2, _sanitized_cpu),
        Run("emulated", "test_any and cuda", with_cuda, examples // 10, _sanitized_cuda),
    ]


class Result(NamedTuple):
    """What a run has tried."""

    lines: list[dict[str, Any]]
    """of `counting`, one per test and backend"""
    returncode: int
    output: str

    @property
    def inputs(self) -> int:
        return sum(line["inputs"] for line in self.lines)

    @property
    def reports(self) -> int:
        """Of sanitizers."""
        return len(_REPORT.findall(self.output))


def execute(run: Run, progress: Callable[[Result], None]) -> Result:
    """Runs the tests, and tells every second what they have tried so far."""
    with tempfile.TemporaryDirectory() as folder:
        counts, log = Path(folder, "counts"), Path(folder, "log")
        counts.touch()
        command = [sys.executable, "-m", "pytest", *run.tests, "-k", run.selected, "-q", "-p", "no:cacheprovider"]
        command += ["-p", "tests.campaign.counting", "--hypothesis-profile=long"]
        environment = {**run.environment(), FILE: str(counts), "NFK_TEST_EXAMPLES": str(max(1, run.examples))}

        def result() -> Result:
            lines = [json.loads(line) for line in counts.read_text().splitlines()]
            return Result(lines, process.poll() or 0, log.read_text())

        with open(log, "w") as file:
            process = subprocess.Popen(command, cwd=native.ROOT, env=environment, stdout=file, stderr=file)
            try:
                while process.poll() is None:
                    progress(result())
                    time.sleep(1.0)
            finally:
                process.terminate()
                process.wait()
        return result()
