"""Everything there is to check on a CUDA machine, in 8 minutes: ``python -m benchmarks.gpu_check OUTDIR``.

Every stage is a process with its own log and time limit; one that fails does not stop the next. What is left in OUTDIR:
a log per stage, the tests' JUnit file, ``results/`` of the benchmarks with their report, ``summary.json``, and all of
it once more in one archive, ``gpu_check.tar.gz``.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from benchmarks.environment import REPOSITORY, slug

BUDGET_SECONDS = 480.0
ARCHIVE = "gpu_check.tar.gz"
OP_TESTS = (
    *("agc", "agc_contract", "agc_oracles", "sgd_agc", "sgd_agc_contract", "clip_statistics", "weight_standardize"),
    *("scaled_activation", "inplace_activation", "bias_activation", "residual", "residual_bias", "inplace_residual"),
)
# Triton compiles more than a thousand variants for them, each in 0.1 to 0.4 s; a process has a context of 0.5 GB.
MOST_TEST_PROCESSES = 12
# The one that compiles hundreds of tensors for a peer comes last.
OP_BENCHES = ("weight_standardize", "host", "scaled_activation", "residual", "in_step", "step", "sgd_agc", "agc")
PYTHON = (sys.executable, "-u", "-m")


@dataclass(frozen=True)
class Stage:
    """A command, the most and the least seconds that it is given, and the modules without which it cannot run."""

    name: str
    command: Sequence[str]
    most: float
    least: float = 5.0
    modules: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended; ``detail`` says what failed or is missing."""

    stage: str
    status: Literal["passed", "failed", "timed out", "not run"]
    seconds: float
    detail: str


def stages(folder: Path, capability: str) -> list[Stage]:
    """What is done on a card of a compute capability, in this order: what decides most comes first.

    What precedes the tests may take 475 of the 480 seconds even if every stage of it runs into its limit, so that the
    benchmarks are never cut short by what comes before; the tests have what the others leave over.
    """
    results = str(folder / "results")
    # nvcc compiles every kernel once per architecture of a release: for one of them alone it takes seconds.
    this_card = {"NFK_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}
    # Without the caching allocator, so that every tensor has bounds of its own.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    kernels = ("--expect", "cuda", "triton")
    cuda_kernels = ("--ops", "agc", "sgd_agc", "weight_standardize", "--backends", "cuda", "--expect", "cuda")
    return [
        Stage("build", (*PYTHON, "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."), 80,
              modules=("pip", "setuptools", "pybind11", "ninja"), environment=this_card),
        Stage("describe", (*PYTHON, "benchmarks.gpu_served"), 15),
        Stage("graphs", (*PYTHON, "benchmarks.gpu_cases", "graphs", "--seconds", "20", *kernels), 40),
        Stage("step_graph", (*PYTHON, "benchmarks.gpu_step_graph"), 20),
        Stage("digits", (*PYTHON, "benchmarks.gpu_digits"), 25, modules=("sklearn", "rich")),
        Stage("compare", (*PYTHON, "benchmarks.gpu_cases", "compare", "--seconds", "20", *kernels, "reference"), 40),
        # 12 cases hold units of every length, a crowd of tensors for each op, permuted formats and misaligned tensors.
        Stage("memcheck", (*sanitizer("memcheck", "nfk"), "--cases", "12", "--seconds", "15", *cuda_kernels), 35,
              least=20, environment=uncached),
        Stage("racecheck", (*sanitizer("racecheck", "nfk"), "--cases", "12", "--seconds", "15", *cuda_kernels), 35,
              least=20),
        Stage("benchmarks", (*PYTHON, "benchmarks", "--device", "cuda", "--quick", "--output", results,
                             "--only", *OP_BENCHES), 165, least=30,
              modules=("timm", "torchvision", "rich", "matplotlib")),
        Stage("report", (*PYTHON, "benchmarks", "report", results, "--output", str(folder)), 20,
              modules=("rich", "matplotlib", "jinja2")),
        tests(folder),
        Stage("memcheck_triton", (*sanitizer("memcheck"), "--cases", "12", "--backends", "triton"), 90, least=20,
              environment=uncached),
    ]  # fmt: skip


def tests(folder: Path) -> Stage:
    """The tests of all ops on the GPU, in some processes."""
    processes = str(min(MOST_TEST_PROCESSES, os.cpu_count() or 1))
    command = (*PYTHON, "pytest", "-q", "-n", processes, "--dist", "worksteal", f"--junit-xml={folder}/tests.xml")
    files = [f"tests/test_{name}.py" for name in OP_TESTS]
    return Stage("tests", (*command, *files), 240, least=60, modules=("pytest", "xdist", "hypothesis", "timm", "optax"),
                 environment={"NFK_TEST_DEVICE": "cuda"})  # fmt: skip


def sanitizer(tool: str, kernel: str = "") -> tuple[str, ...]:
    """Random cases under a tool of compute-sanitizer that watches the kernels with this in their name, if any, alone.

    The kernels of torch that make the cases would take most of the time.
    """
    watched = ("--kernel-regex", f"kns={kernel}") if kernel else ()
    options = ("--tool", tool, "--error-exitcode", "9", *watched)
    return (find_sanitizer(), *options, *PYTHON, "benchmarks.gpu_cases", "compare")


def find_sanitizer() -> str:
    """compute-sanitizer on PATH or in the CUDA toolkit, else its bare name."""
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    name = "compute-sanitizer"
    found = [shutil.which(name), shutil.which(name, path=f"{home / 'bin'}{os.pathsep}{home / name}")]
    return next(filter(None, found), name)


def obstacle(stage: Stage, seconds_left: float) -> str | None:
    """Why a stage cannot run, or None."""
    missing = [module for module in stage.modules if find_spec(module) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if shutil.which(stage.command[0]) is None:
        return f"{stage.command[0]} is neither on PATH nor in CUDA_HOME"
    return "out of time" if seconds_left < stage.least else None


def run_stage(stage: Stage, folder: Path, deadline: float) -> Outcome:
    """Run a stage into its log, unless something it needs is missing or too little time is left."""
    start = time.monotonic()
    reason = obstacle(stage, deadline - start)
    if reason:
        return Outcome(stage.name, "not run", 0.0, reason)
    log = folder / f"{stage.name}.log"
    limit = min(stage.most, deadline - start)
    with log.open("w") as stream:
        code = run_process(stage, stream.fileno(), limit)
    seconds = round(time.monotonic() - start, 1)
    if code is None:
        return Outcome(stage.name, "timed out", seconds, f"after {limit:.0f} s; {last_line(log)}")
    return Outcome(stage.name, "passed" if code == 0 else "failed", seconds, "" if code == 0 else last_line(log))


def run_process(stage: Stage, output: int, limit: float) -> int | None:
    """The exit status of a stage's command, None if it had to be ended at its limit with all that it started."""
    environment = {**os.environ, **stage.environment}
    process = subprocess.Popen(
        stage.command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=output,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def check(folder: Path, todo: Sequence[Stage], budget: float) -> list[Outcome]:
    """Run the stages one after the other, and keep the summary on disk up to date."""
    deadline = time.monotonic() + budget
    outcomes: list[Outcome] = []
    for stage in todo:
        outcomes.append(run_stage(stage, folder, deadline))
        print(row(outcomes[-1]), flush=True)  # at once: whoever is cut off still knows of this one
        summary = {"passed": all_passed(outcomes), "stages": [asdict(outcome) for outcome in outcomes]}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return outcomes


def all_passed(outcomes: Sequence[Outcome]) -> bool:
    """Whether nothing failed and nothing was left out."""
    return all(outcome.status == "passed" for outcome in outcomes)


def row(outcome: Outcome) -> str:
    """A stage in one line: name, status, seconds, and what failed."""
    return f"{outcome.stage:<26}{outcome.status:<11}{outcome.seconds:>8.1f}  {outcome.detail}".rstrip()


def archive(folder: Path) -> Path:
    """Everything in a folder as one file in it."""
    path = folder / ARCHIVE
    with tarfile.open(path, "w:gz") as packed:
        for member in sorted(folder.iterdir()):
            if member != path:
                packed.add(member, f"gpu_check/{member.name}")
    return path


def publish(results: Path, gpu: str) -> None:
    """Copy what the benchmarks left to where they put their results of this GPU."""
    if (results / "results.json").exists():
        shutil.copytree(results, REPOSITORY / "benchmarks" / "results" / slug(gpu), dirs_exist_ok=True)


def main() -> int:
    """Command line; 0 if every stage passed, 1 if not, 2 without CUDA."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="OUTDIR", help="new or empty")
    folder = parser.parse_args().folder.resolve()

    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu_check needs a CUDA device, and torch sees none: nothing was done", file=sys.stderr)
        return 2
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    try:
        outcomes = check(folder, stages(folder, capability), BUDGET_SECONDS)
        publish(folder / "results", torch.cuda.get_device_name())
    finally:
        print(f"Everything is in {archive(folder)}", flush=True)
    return 0 if all_passed(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
