"""The benchmarks of steps: their forms and the check of each, float16, what is timed within a step, the sweeps."""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.progress import Progress
from torch import nn

import nfnets_kernels as nfk
from benchmarks import (
    __main__,
    bench_in_step,
    bench_models,
    bench_scaling,
    bench_step,
    clocks,
    forms,
    harness,
    training,
)
from benchmarks.bn_resnet import BNResNet
from benchmarks.checks import BenchmarkError
from benchmarks.environment import Environment
from benchmarks.harness import Point, Session, Settings
from benchmarks.results import Results
from benchmarks.training import CLASSES, Batch

from .module_helpers import on_one_thread

one_thread = pytest.fixture(on_one_thread, autouse=True)

SETTINGS = Settings(device="cpu", quick=True, seed=0, rounds=1, batch_size=2, image_size=32)
TINY = {"depth": (1, 1, 1, 1), "width": 1, "num_classes": CLASSES}


def tiny_networks(device: str = "cpu", count: int = 3):
    return [
        training.clipped_by_ours("ours", nfk.models.NFResNet(**TINY), device),
        training.clipped_by_timm("timm", BNResNet(**TINY), device),
        training.unclipped("BatchNorm", BNResNet(**TINY), device),
    ]


@pytest.fixture
def session(tmp_path, monkeypatch):
    """One with made-up ceilings."""
    rates = dict.fromkeys(("read", "copy", "update", "float32", "bfloat16"), 1e9)
    monkeypatch.setattr(harness, "measure_bandwidth", lambda device, clock: rates)
    monkeypatch.setattr(harness, "measure_matmul", lambda device, clock: rates)
    monkeypatch.setattr(clocks, "eviction_bytes", lambda device: 1 << 16)
    with Progress(disable=True) as progress:
        yield Session(SETTINGS, Results(Environment.record("cpu", keeps_memory=False)), tmp_path, progress)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_step_has_the_gradients_of_the_reference_and_a_wrong_kernel_is_noticed(dtype, monkeypatch):
    ours = tiny_networks()[0]
    batch = Batch.random("cpu", 4, 32, dtype)
    forms.check_form("ours", ours, ours, batch)
    key = ("weight_standardize", "cpu")
    kernel = nfk.backend._kernels[key]

    def wrong(*args, outs=None, grads=None):
        kernel.implementation(*args, outs=outs, grads=grads)
        if grads is not None:
            torch._foreach_mul_(grads[1], 1.3)  # those of the weights

    monkeypatch.setitem(nfk.backend._kernels, key, replace(kernel, implementation=wrong))
    with pytest.raises(BenchmarkError, match="ours: gradients: differs from the reference"):
        forms.check_form("ours", ours, ours, batch)


def test_ops_run_by_reference_and_by_kernels_again():
    def backends() -> set[str]:
        with nfk.backend.recording() as executed:
            Batch.random("cpu", 1, 32).gradients(tiny_networks()[0])
        return {served for _, served in executed}

    with forms.by_reference():
        assert backends() == {"reference"}
    assert backends() == {"cpu"}


def test_a_compiled_peer_must_have_the_loss_of_its_eager_form():
    peer = tiny_networks()[2]
    batch = Batch.random("cpu", 4, 32)
    same = replace(peer, compiled=True)
    forms.check_form("same", same, peer, batch)
    other = replace(tiny_networks()[2], compiled=True)
    nn.init.constant_(other.model.fc.bias, 1.0)
    nn.init.normal_(other.model.fc.weight)
    with pytest.raises(BenchmarkError, match="other: loss: differs"):
        forms.check_form("other", other, peer, batch)


def test_forms_of_a_cpu_and_of_a_gpu(monkeypatch):
    network = tiny_networks()[2]
    assert [one.name for one in forms.all_forms(network, SETTINGS, compile_too=False)] == ["BatchNorm"]
    names = ["BatchNorm", "BatchNorm, torch.compile"]
    assert [one.name for one in forms.all_forms(network, SETTINGS, compile_too=True)] == names
    monkeypatch.setattr(Settings, "on_gpu", True)
    found = forms.all_forms(network, SETTINGS, compile_too=True)
    assert [one.name for one in found] == [*names, *(f"{name}, CUDA graph" for name in names)]
    assert [(one.compiled, one.graphed) for one in found] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]


def described(**changes) -> list[str]:
    found = bench_step.variants(replace(SETTINGS, **changes))
    return [f"{one.batch_size} {one.layout} {one.precision.name}" for one in found]


def test_what_quick_leaves_out(monkeypatch):
    assert described() == ["2 NHWC float32", "2 NHWC bfloat16 autocast"]
    assert described(quick=False) == [
        f"2 {layout} {name}" for name in ("float32", "bfloat16 autocast") for layout in ("NHWC", "NCHW")
    ]
    monkeypatch.setattr(Settings, "on_gpu", True)
    assert [one.split(",")[0] for one in described()] == ["2 NHWC bfloat16 autocast", "2 NHWC float32"]


def test_a_gpu_is_measured_at_two_batch_sizes_and_in_bfloat16_first(monkeypatch):
    monkeypatch.setattr(Settings, "on_gpu", True)
    full = described(quick=False, batch_size=256, small_batch_size=32)
    assert full[:6] == [
        "256 NHWC bfloat16 autocast", "32 NHWC bfloat16 autocast", "256 NCHW bfloat16 autocast",
        "32 NCHW bfloat16 autocast", "256 NHWC float16 autocast", "32 NHWC float16 autocast",
    ]  # fmt: skip
    assert len(set(full)) == len(full) == 3 * 2 * 2


@pytest.mark.parametrize(
    "arguments, sizes",
    [((), (256, None)), (("--full",), (256, 32)), (("--full", "--batch-size", "64"), (64, None))],
)
def test_batch_sizes_of_a_gpu(arguments, sizes, monkeypatch):
    class Chosen(Exception):
        pass

    def chosen(**settings):
        raise Chosen(settings["batch_size"], settings["small_batch_size"])

    monkeypatch.setattr(harness, "Settings", chosen)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda", *arguments])
    with pytest.raises(Chosen) as raised:
        __main__.main()
    assert raised.value.args == sizes


def test_in_each_precision_what_takes_minutes_to_compile_comes_last(monkeypatch):
    monkeypatch.setattr(Settings, "on_gpu", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back in the end
    measured = []
    monkeypatch.setattr(bench_step, "measure", lambda session, *what: measured.append(what))
    settings = replace(SETTINGS, quick=False, batch_size=256, small_batch_size=32)
    bench_step.run(SimpleNamespace(settings=settings, track=lambda items, description: items))
    assert [compile_too for _, compile_too in measured] == ([False] * 4 + [True] * 2) * 3
    assert [variant.batch_size for variant, compile_too in measured if compile_too][:2] == [256, 32]
    assert [variant.precision.dtype for variant, _ in measured[:7:6]] == [torch.bfloat16, torch.float16]


def test_the_slowest_mode_of_the_compiler_is_for_ops_unless_asked_for(monkeypatch):
    full = replace(SETTINGS, quick=False)
    assert (full.compile_mode, full.compile_mode_of_networks) == (None, None)
    monkeypatch.setattr(Settings, "on_gpu", True)
    assert (full.compile_mode, full.compile_mode_of_networks) == ("max-autotune-no-cudagraphs", None)
    assert replace(full, max_autotune=True).compile_mode_of_networks == "max-autotune-no-cudagraphs"


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("index", range(3))
def test_a_float16_step_moves_parameters_as_a_float32_step(index):
    """The loss is scaled, and gradients are clipped as if it were not."""
    moved = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(1)
        network = tiny_networks()[index]
        torch.manual_seed(2)
        batch = Batch.random("cpu", 16, 32, dtype)
        before = flat(network.model)
        loss = training.training_step(network, batch)()
        training.check_loss(network.name, loss)
        moved.append(flat(network.model) - before)
    assert moved[0].norm() > 0
    cosine = torch.cosine_similarity(*moved, dim=0)
    assert cosine > 0.98  # float16 has 11 bits, after each of 17 layers and in batch statistics of 16 pixels
    torch.testing.assert_close(moved[1].norm(), moved[0].norm(), rtol=0.05, atol=0)


@pytest.mark.parametrize("layout", bench_step.FORMATS)
def test_weights_lie_as_images_do(layout):
    memory_format = bench_step.FORMATS[layout]
    for network in bench_step.make_networks("meta", memory_format):
        weights = [p for p in network.model.parameters() if p.ndim == 4 and p.shape[1] > 1 < p.shape[2]]
        assert len(weights) > 10
        assert all(weight.is_contiguous(memory_format=memory_format) for weight in weights)


def test_only_networks_with_batch_norm_are_folded():
    ours, _, twin = tiny_networks()
    for network in (ours, twin):
        network.model.eval()
    assert bench_step.folded(ours) is None
    folded = bench_step.folded(twin)
    assert folded.name == "BatchNorm, BatchNorm folded"
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded.model(x), twin.model(x), rtol=1e-3, atol=1e-4)


def test_the_operations_of_a_step():
    batch = Batch.random("cpu", 4, 32, torch.bfloat16)
    assert batch.operations(1000, passes=3) == {"bfloat16": 2 * 3 * 1000 * 4}


@pytest.mark.parametrize("comparison", [bench_in_step.after_backward, bench_in_step.before_forward])
def test_what_is_timed_within_a_step_is_right(comparison, session, monkeypatch):
    monkeypatch.setattr(nfk.models, "nf_resnet50", partial(nfk.models.NFResNet, **TINY))
    monkeypatch.setattr(bench_in_step, "IMAGE_SIZE", 32)
    session.compare(comparison(session))
    assert {one.kind for one in session.results.incidents} <= {"disturbed"}
    ours, *others = session.results.timings
    assert (ours.role, ours.cache, ours.backend) == ("ours", "in step", "cpu")
    assert any(one.role == "peer" for one in others)


def test_sweeps_of_ops_and_steps(session, monkeypatch):
    monkeypatch.setattr(bench_scaling, "MILLION", 1000)
    monkeypatch.setattr(bench_scaling, "NF_RESNET_50", (20_000, 7))
    monkeypatch.setattr(bench_scaling, "PARAMETERS", (100, 500))
    monkeypatch.setattr(bench_scaling, "TENSORS", (3, 10))
    monkeypatch.setattr(bench_scaling, "BATCH_SIZES", (1, 2))
    monkeypatch.setattr(bench_scaling, "QUICK_BATCH_SIZES", (2,))
    session.settings = replace(SETTINGS, quick=False)
    monkeypatch.setattr(bench_scaling, "IMAGE_SIZE", 64)
    monkeypatch.setattr(bench_scaling, "make_networks", tiny_networks)
    monkeypatch.setattr(bench_scaling, "thread_counts", lambda: [1, 2])
    before = torch.get_num_threads()
    bench_scaling.run(session)
    assert torch.get_num_threads() == before
    assert {one.kind for one in session.results.incidents} <= {"disturbed"}
    sweeps = session.results.sweeps()
    ops = ("agc", "sgd_agc", "weight_standardize")
    assert set(sweeps) == {
        *(f"{op}: {varied}" for op in ops for varied in ("parameters", "tensors", "threads")),
        "training step: batch size",
        "training step: threads",
    }
    for name, contestants in sweeps.items():
        assert len(contestants) >= 2, name
        ours, *_ = contestants.values()
        assert [one.backend for one in ours] == ["cpu"] * 2
        assert all(one.floor_ms > 0 for one in ours)
    floors = [one.floor_ms for one in sweeps["agc: parameters"]["AGC.clip_"]]
    assert floors[1] > floors[0]
    assert {one.bound for one in sweeps["training step: batch size"]["ours"]} == {"matmul"}


@pytest.mark.parametrize("op", bench_scaling.OPS)
def test_a_sweep_notices_an_op_that_does_nothing(op, session, monkeypatch):
    if op == "agc":
        monkeypatch.setattr(nfk.AGC, "clip_", lambda self: None)
    elif op == "sgd_agc":
        monkeypatch.setattr(nfk.optim.SGD_AGC, "step", lambda self: None)
    comparison = bench_scaling.OPS[op]("cpu", [(4, 64, 3, 3)] * 3)
    ours = replace(comparison.contestants[0], ops=())
    if op == "weight_standardize":
        ours = replace(ours, run=clocks.Rotation([lambda: [torch.zeros(4, 64, 3, 3)] * 3], clocks.turns(1)))
    session.compare(replace(comparison, case="case", contestants=[ours]))
    assert session.results.timings == []
    assert "differs from the reference" in session.results.incidents[0].reason


def test_a_point_that_needs_too_much_memory_is_left_out(session, monkeypatch):
    monkeypatch.setattr(bench_scaling, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(bench_models, "available_memory", lambda: 1 << 10)
    monkeypatch.setattr(bench_scaling, "make_networks", tiny_networks)
    bench_scaling.compare_op("agc", 1_000_000, 10, session, Point("agc: parameters", 1e6))
    bench_scaling.compare_steps(2, session, Point("training step: batch size", 2))
    assert session.results.timings == []
    assert [one.kind for one in session.results.incidents] == ["skipped"] * 4
    assert "of 0 GB available" in session.results.incidents[0].reason


def test_sweeps_grow_to_what_is_asked_for():
    points = {name: [at for at, _ in values] for name, values in bench_scaling.sweeps(replace(SETTINGS, quick=False))}
    for op in bench_scaling.OPS:
        assert (points[f"{op}: parameters"][0], points[f"{op}: parameters"][-1]) == (1e6, 5e8)
        assert (points[f"{op}: tensors"][0], points[f"{op}: tensors"][-1]) == (10, 5000)
    assert points["training step: batch size"] == [2**k for k in range(10)]
