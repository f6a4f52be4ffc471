"""What can be checked without a GPU of the run on one: stages, random cases, comparisons, goals and the harness."""

import contextlib
import json
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from rich.progress import Progress

from benchmarks import (
    __main__,
    bench_agc,
    bench_residual,
    bench_scaled_activation,
    bench_sgd_agc,
    bench_weight_standardize,
    clocks,
    goals,
    gpu_cases,
    gpu_check,
    gpu_draw,
    gpu_served,
    gpu_step_graph,
    harness,
)
from benchmarks.environment import REPOSITORY
from benchmarks.gpu_check import Stage
from benchmarks.harness import Comparison, Contestant, Session, Settings
from benchmarks.results import Results
from nfnets_kernels import backend, functional
from nfnets_kernels.backend import Description

from . import emulator
from .report_cases import MATMUL, environment

PYTHON = (sys.executable, "-c")
QUICK = Settings(device="cpu", quick=True, seed=0, rounds=1, batch_size=1, image_size=32)


def test_without_cuda_it_says_so_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "benchmarks.gpu_check needs a CUDA device, and torch sees none: nothing was done\n"
    assert not list(tmp_path.iterdir())


FAKE_STAGES = [
    Stage("good", (*PYTHON, "print('fine')"), 30),
    Stage("bad", (*PYTHON, "print('first'); print('boom'); raise SystemExit(3)"), 30),
    # The process that it starts must end with it: it would hold the log open.
    Stage("slow", (*PYTHON, "import subprocess; print('on', flush=True); subprocess.run(['sleep', '60'])"), 2, least=1),
    Stage("module", (*PYTHON, ""), 30, modules=("torch", "no_such_module")),
    Stage("program", ("no-such-program",), 30),
    Stage("late", (*PYTHON, ""), 30, least=1000),
    Stage("variable", (*PYTHON, "import os; raise SystemExit(os.environ['NFK_X'] != '1')"), 30,
          environment={"NFK_X": "1"}),
]  # fmt: skip


def test_stages_fail_alone(tmp_path, capsys):
    outcomes = gpu_check.check(tmp_path, FAKE_STAGES, budget=100)
    assert [(one.stage, one.status, one.detail) for one in outcomes] == [
        ("good", "passed", ""),
        ("bad", "failed", "boom"),
        ("slow", "timed out", "after 2 s; on"),
        ("module", "not run", "not installed: no_such_module"),
        ("program", "not run", "no-such-program is neither on PATH nor in CUDA_HOME"),
        ("late", "not run", "out of time"),
        ("variable", "passed", ""),
    ]
    assert 2 <= outcomes[2].seconds < 20
    assert (tmp_path / "bad.log").read_text() == "first\nboom\n"
    assert not (tmp_path / "late.log").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["passed"] is False
    assert [stage["status"] for stage in summary["stages"]] == [one.status for one in outcomes]
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == [one.stage for one in outcomes]
    assert told[1] == f"{'bad':<26}failed     {outcomes[1].seconds:>8.1f}  boom"


def test_the_budget_also_ends_a_running_stage(tmp_path):
    slow = Stage("slow", (*PYTHON, "import time; time.sleep(60)"), most=50, least=0.5)
    ended, late = gpu_check.check(tmp_path, [slow, slow], budget=1.5)
    assert (ended.status, late.status, late.detail) == ("timed out", "not run", "out of time")


@pytest.mark.parametrize("chosen, status", [(FAKE_STAGES[:1], 0), (FAKE_STAGES[:2], 1), (FAKE_STAGES[5:6], 1)])
def test_exit_status_and_results(chosen, status, tmp_path, monkeypatch, capsys):
    def stages(folder, capability):
        assert capability == "9.0"
        (folder / "results").mkdir()
        (folder / "results" / "results.json").write_text("{}")
        return chosen

    monkeypatch.setattr(gpu_check, "stages", stages)
    monkeypatch.setattr(gpu_check, "REPOSITORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path / "out")])
    assert gpu_check.main() == status
    assert (tmp_path / "benchmarks" / "results" / "some-gpu-80gb" / "results.json").read_text() == "{}"
    packed = tmp_path / "out" / "gpu_check.tar.gz"
    assert capsys.readouterr().out.splitlines()[-1] == f"Everything is in {packed}"
    with tarfile.open(packed) as archive:
        names = set(archive.getnames())
    assert {"gpu_check/summary.json", "gpu_check/results/results.json"} < names
    assert ("gpu_check/good.log" in names) == (chosen[0].name == "good")
    assert "gpu_check/gpu_check.tar.gz" not in names
    with pytest.raises(SystemExit):  # the folder is not empty now
        gpu_check.main()


def test_the_stages_name_what_there_is(tmp_path):
    todo = gpu_check.stages(tmp_path, "9.0")
    names = [stage.name for stage in todo]
    assert len(set(names)) == len(names)
    assert {"build", "describe", "graphs", "digits", "compare", "memcheck", "racecheck", "benchmarks"} < set(names)
    assert todo[0].environment == {"NFK_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    before_the_tests = todo[: names.index("report") + 1]
    assert sum(stage.most for stage in before_the_tests) < gpu_check.BUDGET_SECONDS
    assert sum(stage.least for stage in todo) < gpu_check.BUDGET_SECONDS
    for stage in todo:
        module = stage.command[stage.command.index("-m") + 1]
        assert find_spec(module), module
        assert all((REPOSITORY / part).exists() for part in stage.command if part.startswith("tests/"))


def test_a_toolkit_outside_path_is_found(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.find_sanitizer() == str(program)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert gpu_check.find_sanitizer() == "compute-sanitizer"


@pytest.fixture
def small_cases(monkeypatch):
    """Triton's interpreter takes part."""
    monkeypatch.setattr(gpu_draw, "SIZES", (1, 3, 7, 8, 9))
    monkeypatch.setattr(gpu_draw, "LENGTHS", (9, 64))
    monkeypatch.setattr(gpu_draw, "FAN_INS", ((31, 1, 1), (7, 3, 3)))
    monkeypatch.setattr(gpu_draw, "COUNTS", (1, 5))


def test_random_cases_pass_on_this_device_and_notice_a_wrong_result(small_cases, monkeypatch, capsys):
    cases = list(islice(gpu_draw.Draw("cpu", seed=0).cases(), 10))
    names = backend.BACKENDS[1:]
    tally = gpu_cases.run_checks(gpu_cases.check_backends, iter(cases), names, seconds=60)
    assert (tally.cases, tally.failures) == (10, 0)
    assert all(
        tally.runs[op, name] == 2 for op in ("agc", "sgd_agc", "weight_standardize") for name in ("cpu", "reference")
    )
    assert tally.missing(backend.OPS, ["triton", "reference"]) == []
    assert tally.missing(backend.OPS, ["cuda"]) == ["weight_standardize on cuda", "agc on cuda", "sgd_agc on cuda"]
    assert "agc: triton 2, cpu 2, reference 2 cases right" in str(tally)
    right = functional.scaled_activation

    def wrong_on_others(x, *arguments, backend, **options):
        out = right(x, *arguments, backend=backend, **options)
        return out if backend == "reference" else out * 1.05

    monkeypatch.setattr(functional, "scaled_activation", wrong_on_others)
    chosen = [case for case in cases if case.op == "scaled_activation"]
    tally = gpu_cases.run_checks(gpu_cases.check_backends, iter(chosen), names, seconds=60)
    assert tally.failures == tally.cases == len(chosen) > 0
    assert "failed: scaled_activation" in capsys.readouterr().out


def test_cases_give_the_same_results_again(small_cases, monkeypatch):
    """What a CUDA graph is checked for, with calls in place of replays."""
    monkeypatch.setattr(gpu_cases, "captured", lambda run: run)
    cases = gpu_cases.graph_cases(islice(gpu_draw.Draw("cpu", 0).cases(), 5))
    tally = gpu_cases.run_checks(gpu_cases.check_graph, cases, ["triton"], 60)
    assert (tally.cases, tally.failures, tally.runs["agc", "triton"]) == (6, 0, 2)


@pytest.mark.parametrize("factor", [0.7, None])
def test_a_whole_step_trains_as_before_and_one_that_misses_the_schedule_is_noticed(factor, monkeypatch):
    """With calls in place of replays; a graph that holds the learning rate of its capture would go on with that."""

    def captured(run):
        if factor is None:
            monkeypatch.setattr(torch.optim.lr_scheduler.ExponentialLR, "step", lambda self: None)
        return run

    monkeypatch.setattr(gpu_step_graph, "captured", captured)
    with contextlib.nullcontext() if factor else pytest.raises(AssertionError, match="not close"):
        gpu_step_graph.compare("cpu")


@pytest.mark.parametrize("expected, status", [("cuda", 0), ("triton", 1)])
def test_cuda_kernels_pass_the_random_cases_of_full_size(expected, status, monkeypatch, capsys):
    """In the emulator: units of all lengths, a crowd of tensors for each op."""
    ops = "agc", "sgd_agc", "weight_standardize"
    chosen = ["--ops", *ops, "--backends", "cuda", "--expect", expected, "--cases", "18"]
    monkeypatch.setattr(sys, "argv", ["gpu_cases", "compare", "--device", "cpu", "--seconds", "100", *chosen])
    with emulator.serving_cpu_tensors(emulator.build(sanitize=False)):
        assert gpu_cases.main() == status
    out = capsys.readouterr().out
    assert "\n".join([*(f"{op}: cuda 6 cases right" for op in ops), "0 of 18 cases failed"]) in out
    assert (f"never ran right: {', '.join(f'{op} on triton' for op in ops)}" in out) == bool(status)


def test_what_serves_instead_of_a_cuda_kernel_is_noticed():
    built = {"CUDA kernels": "built by nvcc"}
    serving = {"agc": "cuda", "sgd_agc": "cuda", "weight_standardize": "cuda"}
    right = Description(build=built, serving={"cuda": serving}, reasons={"cuda": {}})
    assert gpu_served.shortcomings(right) == []
    reasons = {"cuda": {"agc": ["not cuda: no reason"]}}
    wrong = Description(build={"CUDA kernels": "gone"}, serving={"cuda": serving | {"agc": "triton"}}, reasons=reasons)
    assert gpu_served.shortcomings(wrong) == ["CUDA kernels: gone", "agc is served by triton: not cuda: no reason"]


@pytest.fixture
def tiny_on_gpu(monkeypatch):
    """What a GPU would be given, in tiny and on the CPU."""
    monkeypatch.setattr(Settings, "on_gpu", True)
    monkeypatch.setattr(bench_scaled_activation, "GPU_SHAPE", (2, 4, 3, 3))
    monkeypatch.setattr(bench_residual, "GPU_SHAPE", (2, 4, 3, 3))
    parameters = bench_agc.make_params

    def make_params(model, device, one_in=1):
        monkeypatch.setattr(
            bench_agc.peers, "create_model", lambda name: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False))
        )
        return parameters(model, device, one_in)

    def make_convolutions(model, device, memory_format):
        weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=memory_format)
        inputs = [weight.requires_grad_()], [torch.rand(8, 1, 1, 1).requires_grad_()]
        return bench_weight_standardize.Convolutions(*inputs, scales=[1.7], eps=1e-5)

    monkeypatch.setattr(bench_agc, "make_params", make_params)
    monkeypatch.setattr(bench_weight_standardize, "make_convolutions", make_convolutions)


@pytest.mark.parametrize(
    "bench", [bench_agc, bench_sgd_agc, bench_weight_standardize, bench_scaled_activation, bench_residual]
)
def test_contestants_are_right_in_every_direction_and_every_goal_is_a_case(bench, tiny_on_gpu):
    cases = []

    def compare(comparison: Comparison) -> None:
        cases.append(comparison.case)
        for contestant in comparison.contestants:
            # Twice: backward starts from the same graph again.
            for _ in range(0 if contestant.optional or contestant.role == "ceiling" else 2):
                comparison.setup()
                comparison.check(contestant.name, contestant.run())

    bench.run(SimpleNamespace(settings=QUICK, compare=compare, track=lambda items, description: items))
    assert {goal.case for goal in goals.GOALS if goal.bench == bench.BENCH} <= set(cases)


def test_a_gpu_is_measured_by_graphs_where_they_can_be_captured(monkeypatch, tmp_path):
    def captured(run, pool):
        if run is hopeless:
            raise RuntimeError("not captured: operation not permitted")
        return run

    def ours():
        return functional.scaled_activation(torch.ones(3), "relu")

    def hopeless():
        return None

    monkeypatch.setattr(Settings, "on_gpu", True)
    monkeypatch.setattr(harness, "captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(harness, "peak_memory", lambda run: 7)
    monkeypatch.setattr(harness, "host_clock", clocks.wall_clock)
    monkeypatch.setattr(harness, "measure_bandwidth", lambda device, clock: {"copy": 1e9})
    monkeypatch.setattr(harness, "measure_matmul", lambda device, clock: MATMUL)
    checked = []
    contestants = [Contestant("ours", ours, "ours", ["scaled_activation"]), Contestant("hopeless", hopeless)]
    comparison = Comparison(
        "scaled_activation", "case", contestants, lambda name, value: checked.append(name), traffic={"copy": 24}
    )
    results = Results(environment("Some GPU"))
    with Progress(disable=True) as progress:
        Session(QUICK, results, tmp_path, progress).compare(comparison)
    assert [(one.method, one.peak_bytes, one.traffic_bytes) for one in results.timings] == [
        ("graph", 7, 24),
        ("calls", 7, 24),
    ]
    assert all(one.host_ms is not None for one in results.timings)
    assert checked == ["ours", "ours, replayed", "hopeless"]
    skipped = [incident.reason for incident in results.incidents if incident.kind == "skipped"]
    assert skipped == ["hopeless: calls are timed, not captured: operation not permitted"]
    assert Results.load(tmp_path) == results


def run_main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", "--no-keep-memory", *arguments])
    monkeypatch.setattr(harness, "measure_bandwidth", lambda device, clock: {"copy": 1e9, "read": 1e9, "update": 1e9})
    monkeypatch.setattr(harness, "measure_matmul", lambda device, clock: MATMUL)
    return __main__.main()


def test_the_residual_benchmark_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_residual, "SHAPE", (2, 8, 5, 5))
    assert run_main(monkeypatch, "--quick", "--only", "residual", "--rounds", "2", "--output", str(tmp_path)) == 0
    timings = Results.load(tmp_path).timings
    assert {one.case for one in timings} == {"NHWC float32, forward + backward", "NHWC bfloat16, forward + backward"}
    assert [(one.contestant, one.backend, one.method) for one in timings[:2]] == [
        ("residual", "cpu", "calls"),
        ("eager", "", "calls"),
    ]
    assert "Residual epilogue" in (tmp_path / "summary.md").read_text()


def test_host_time_is_measured_without_a_gpu(monkeypatch, tmp_path):
    assert run_main(monkeypatch, "--quick", "--only", "host", "--rounds", "2", "--output", str(tmp_path)) == 0
    results = Results.load(tmp_path)
    of_host = {goal.case for goal in goals.GOALS if (goal.machine, goal.bench) == ("CPU", "host")}
    assert of_host < {one.case for one in results.timings}
    assert {(one.backend, one.method) for one in results.timings} == {("cuda", "host")}
    assert {one.kind for one in results.incidents} <= {"disturbed"}
    assert backend.unavailable("agc", "cuda", "cpu") == "it does not run on cpu tensors"


def test_host_time_without_a_compiler_is_not_measured(monkeypatch, tmp_path):
    def build(sanitize):
        raise FileNotFoundError("no g++")

    monkeypatch.setattr(emulator, "build", build)
    assert run_main(monkeypatch, "--quick", "--only", "host", "--rounds", "2", "--output", str(tmp_path)) == 0
    results = Results.load(tmp_path)
    assert not results.timings
    assert "Host time of one call\n\nnot measured yet" in (tmp_path / "summary.md").read_text()
    assert [one.reason for one in results.incidents] == ["the emulator of CUDA was not built: no g++"]


def test_a_benchmark_that_breaks_is_reported_and_the_next_one_runs(monkeypatch, tmp_path):
    def broken(session):
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr(bench_agc, "run", broken)
    monkeypatch.setattr(bench_residual, "SHAPE", (2, 8, 5, 5))
    assert run_main(monkeypatch, "--only", "agc", "residual", "--rounds", "1", "--output", str(tmp_path)) == 1
    results = Results.load(tmp_path)
    assert results.incidents[0].reason == "RuntimeError: no memory"
    assert results.timings
