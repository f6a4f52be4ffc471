"""The benchmark of whole networks: the memory it measures, what it runs, its tables, its plot and the memory goal."""

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.progress import Progress
from torch import nn

import nfnets_kernels as nfk
from benchmarks import __main__, bench_models, bench_step, harness, training
from benchmarks.bench_models import Architecture
from benchmarks.environment import REPOSITORY, Environment
from benchmarks.goals import GOALS, Goal
from benchmarks.harness import Comparison, Contestant, Session
from benchmarks.memory import available_memory, peak_tensor_memory
from benchmarks.report import documents, tables
from benchmarks.report.machines import Run, group
from benchmarks.results import BENCHES, NOT_MEASURED, Results, Timing
from nfnets_kernels.models.nfnet import VARIANTS

from .report_cases import MATMUL

KILO = 1 << 10  # float32 elements: 4096 bytes


def allocate_and_drop():
    for _ in range(3):
        torch.empty(KILO)


def hold_three_at_once():
    first = torch.empty(KILO)
    second = torch.add(first, first)
    del first
    third = torch.add(second, second)
    return torch.add(third, third)


KEPT = [torch.empty(KILO)]


def replace_what_was_there():
    KEPT[0] = torch.empty(KILO)


def hold_views_and_write_in_place():
    x = torch.empty(KILO)
    return x.view(32, 32).t().neg_()


@pytest.mark.parametrize(
    "function, tensors",
    [
        (lambda: None, 0),
        (lambda: torch.empty(KILO), 1),
        (allocate_and_drop, 1),
        (hold_three_at_once, 3),
        (replace_what_was_there, 1),
        (hold_views_and_write_in_place, 1),
    ],
)
def test_peak_of_known_functions(function, tensors):
    assert peak_tensor_memory(function) == 4 * KILO * tensors
    assert peak_tensor_memory(function) == 4 * KILO * tensors  # what ran before does not matter


def test_peak_counts_what_backward_needs_and_what_an_op_needs_inside():
    x = torch.ones(KILO, requires_grad=True)
    tensors = []

    def step():
        y = x.exp()
        tensors.append(y)
        y.backward(torch.ones_like(y))

    # The result, the gradient of the result and that of x.
    assert peak_tensor_memory(step) == 3 * 4 * KILO
    strided = torch.empty(2 * KILO)[::2]
    assert peak_tensor_memory(lambda: strided.contiguous().sum()) > 4 * KILO


def test_available_memory():
    assert (available_memory() or 1 << 40) > 1 << 20


def tiny(name: str, device: str):
    if name == "ours":
        model = nfk.models.NFResNet(depth=(1, 1, 1, 1), width=1, num_classes=training.CLASSES)
        return training.clipped_by_ours("nfnets_kernels tiny", model, device)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(8, training.CLASSES))
    return training.unclipped(f"timm {name}", model, device)


TINY = [
    Architecture("Tiny", 32, [partial(tiny, "ours"), partial(tiny, "tiny")], 50.0, "nobody"),
    Architecture("Other", 48, [partial(tiny, "other")]),
]


def run(monkeypatch, folder, *arguments) -> int:
    command = ["benchmarks", "--device", "cpu", "--no-keep-memory", "--only", "models", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(folder), *arguments])
    monkeypatch.setattr(harness, "measure_bandwidth", lambda device, clock: {"copy": 1e9})
    monkeypatch.setattr(harness, "measure_matmul", lambda device, clock: MATMUL)
    monkeypatch.setattr(bench_models, "architectures", lambda: TINY)
    return __main__.main()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Results, str]:
    folder = tmp_path_factory.mktemp("models")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Many short parallel regions, as tiny networks have, crawl where other processes share the cores.
        assert run(monkeypatch, folder, "--full", "--rounds", "2", "--threads", "1") == 0
    torch.set_num_threads(threads)
    assert (folder / "models.png").exists()
    return Results.load(folder), (folder / "summary.md").read_text()


def test_every_network_is_trained_and_run(results):
    stored, _ = results
    assert [one.contestant for one in stored.models] == ["nfnets_kernels tiny", "timm tiny", "timm other"]
    assert [one.case for one in stored.models] == [
        "Tiny, batch 2 at 32, float32",
        "Tiny, batch 2 at 32, float32",
        "Other, batch 2 at 48, float32",
    ]
    for model in stored.models:
        steps, inference = stored.times(model)
        assert (steps.rounds, inference.rounds) == (2, 2)
        assert steps.peak_bytes > 4 * model.parameters  # the gradients, at least
        assert steps.backend == ("cpu" if model.role == "ours" else "")
    assert stored.models[2].multiply_adds == 8 * 27 * 12 * 12 + 8 * 1000
    assert stored.models[2].parameters == 8 * 27 + 8 + 2 * 8 + 8 * 1000 + 1000


def test_tables(results):
    stored, summary = results
    columns, rows = tables.table(stored, "models")
    assert [len(row) for row in rows] == [len(columns)] * 3
    assert [row[-1] for row in rows] == ["50.0", "50.0", "-"]
    step, _ = stored.times(stored.models[0])
    assert rows[0][columns.index("Step, ms")] == tables.milliseconds(step.median_ms / 2)
    note = "accuracy as published, not trained here (nobody: Tiny)"
    for text in (summary, documents.docs_section(group([Run(stored)]), "models")):
        assert note in text
        assert "| nfnets_kernels tiny | " in text


def test_older_results_have_no_networks(tmp_path):
    for path in (REPOSITORY / "benchmarks" / "results").glob("*/results.json"):
        stored = json.loads(path.read_text())
        stored.pop("models", None)
        stored["timings"] = [row for row in stored["timings"] if row["bench"] != "models"]
        (tmp_path / "results.json").write_text(json.dumps(stored))
        older = Results.load(tmp_path)
        assert older.models == []
        assert f"## {BENCHES['models']}\n\n{NOT_MEASURED}" in documents.summary(older)


def session(**settings) -> SimpleNamespace:
    """One that keeps what it is told to compare."""
    told = SimpleNamespace(comparisons=[], models=[], incidents=[])
    chosen = {"device": "cpu", "quick": False, "seed": 0, "rounds": 1, "batch_size": 2, "image_size": 32} | settings
    told.settings = harness.Settings(**chosen)
    told.track = lambda items, description: items
    told.compare, told.add_model = told.comparisons.append, told.models.append
    told.report_incident = told.incidents.append
    return told


def test_a_network_that_needs_too_much_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(bench_models, "available_memory", lambda: 1 << 10)
    told = session()
    bench_models.measure(told, TINY[0])
    assert told.comparisons == []
    assert len(told.models) == len(told.incidents) == 2
    assert "nfnets_kernels tiny: a step needs about" in told.incidents[0].reason
    # The quick ones are known to fit.
    monkeypatch.setattr(bench_models, "QUICK", {"Tiny"})
    bench_models.measure(told, TINY[0])
    assert [comparison.rounds for comparison in told.comparisons] == [bench_models.ROUNDS_FULL] * 2


def test_what_quick_leaves_out(monkeypatch):
    names = [architecture.name for architecture in bench_models.architectures()]
    assert len(set(names)) == len(names) == 3 + 1 + 8 + 3 + 7
    assert set(names) > bench_models.QUICK
    measured = []
    monkeypatch.setattr(bench_models, "measure", lambda told, architecture: measured.append(architecture.name))
    for quick, count in ((True, len(bench_models.QUICK)), (False, len(names))):
        measured.clear()
        bench_models.run(session(quick=quick))
        assert len(measured) == count


def test_the_quick_networks_come_first(monkeypatch):
    measured = []
    monkeypatch.setattr(bench_models, "measure", lambda told, architecture: measured.append(architecture.name))
    bench_models.run(session(quick=False))
    assert measured[:2] == ["NFNet-F0", "ResNet-50"] and measured[-1] == "NFNet-F6"


def test_a_gpu_runs_nfnet_f0_in_all_forms(monkeypatch):
    """Ours, timm's and timm's accelerated: eager, in a CUDA graph, compiled, and both."""
    f0 = next(one for one in bench_models.architectures() if one.in_all_forms)
    small = [partial(tiny, "ours"), partial(tiny, "theirs"), partial(tiny, "accelerated")]
    monkeypatch.setattr(harness.Settings, "on_gpu", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    told = session(batch_size=2)
    bench_models.measure(told, replace(f0, makes=small, on_gpu=[partial(tiny, "contiguous")], image_size=32))
    assert (f0.name, len(f0.makes), len(f0.on_gpu)) == ("NFNet-F0", 3, 1)
    assert [one.case.split(", ", 3)[-1] for one in told.comparisons] == [
        "training step", "inference", "training step, with torch.compile"
    ]  # fmt: skip
    names = ["nfnets_kernels tiny", "timm theirs", "timm accelerated"]
    steps, _, compiled = ([contestant.name for contestant in one.contestants] for one in told.comparisons)
    assert steps == [f"{name}{form}" for name in (*names, "timm contiguous") for form in ("", ", CUDA graph")]
    assert compiled == [
        names[0],
        *(f"{name}, torch.compile{form}" for name in names for form in ("", ", CUDA graph")),
    ]
    assert all(one.optional and one.compiled for one in told.comparisons[2].contestants[1:])
    assert [one.graphed for one in told.comparisons[0].contestants] == [False, True] * 4


def test_nfnets_are_measured_at_the_size_that_they_are_trained_at():
    assert {variant: size for variant, (size, _) in bench_models.NFNETS.items()} == {
        variant: VARIANTS[variant].train_size for variant in bench_models.NFNETS
    }


def test_comparisons_where_nothing_could_run_have_no_timings(tmp_path):
    def hopeless():
        raise RuntimeError("no memory")

    comparison = Comparison(
        "models", "case", [Contestant("large", hopeless, optional=True)], lambda name, value: None, rounds=1
    )
    with pytest.MonkeyPatch.context() as monkeypatch, Progress(disable=True) as progress:
        monkeypatch.setattr(harness, "measure_bandwidth", lambda device, clock: {"copy": 1e9})
        monkeypatch.setattr(harness, "measure_matmul", lambda device, clock: MATMUL)
        stored = Results(Environment.record("cpu", keeps_memory=False))
        Session(session().settings, stored, tmp_path, progress).compare(comparison)
    assert (stored.timings, [one.kind for one in stored.incidents]) == ([], ["skipped"])


def step_timing(contestant: str, peak: int | None) -> Timing:
    return Timing("step", "case", contestant, "ours", "cpu", 1, 1.0, 1.0, 1.0, 1.0, None, peak_bytes=peak)


def test_the_memory_goal():
    goal = Goal("step", "case", at_most_memory=0.75, against="twin")
    ours = step_timing("ours", 503_000_000)
    assert goal.verdict([ours, step_timing("twin", 682_000_000)]) == (
        "goal met: 503 MB, 0.738x the 682 MB, at most 0.75x the memory of twin"
    )
    assert goal.verdict([ours, step_timing("twin", 600_000_000)]).startswith("goal missed: 503 MB, 0.838x")
    for timings in ([], [ours], [ours, step_timing("twin", None)], [step_timing("ours", None), ours]):
        assert goal.verdict(timings) == NOT_MEASURED


def test_the_memory_goals_are_of_networks_that_are_measured():
    names = {network.name for network in bench_step.make_networks("meta")}
    chosen = [goal for goal in GOALS if goal.at_most_memory]
    assert {goal.machine for goal in chosen} == {"CPU", "GPU"}
    assert {goal.against for goal in chosen} <= names
