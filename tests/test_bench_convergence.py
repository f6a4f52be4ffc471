"""The benchmark of training on digits: its data, its recipe, what it counts as diverged, its tables and its plot."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks import __main__, bench_convergence, harness, tune_convergence
from benchmarks.bench_convergence import Threshold
from benchmarks.digits import ARCHITECTURE, CHANCE, Digits, Recipe, train
from benchmarks.environment import REPOSITORY, Environment
from benchmarks.report import documents, notes, tables
from benchmarks.results import BENCHES, Results, Training

from .report_cases import MATMUL

METHODS = {method.name: method for method in bench_convergence.METHODS}
AGC, NORM, UNCLIPPED, TWIN = METHODS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many short parallel regions, as tiny networks have, crawl where other processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def few(digits: Digits, images: int) -> Digits:
    return replace(digits, train_images=digits.train_images[:images], train_labels=digits.train_labels[:images])


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))


def test_every_fifth_image_is_for_testing():
    digits, labels = Digits.load("cpu"), torch.tensor(load_digits().target)
    assert digits.test_labels.equal(labels[::5])
    assert digits.train_labels.equal(labels[[i for i in range(len(labels)) if i % 5]])
    torch.testing.assert_close(digits.train_images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(digits.train_images.std(), torch.tensor(1.0))
    # Nearest neighbours: every pixel twice in both directions.
    image = load_digits().images[0]
    enlarged = torch.tensor(image, dtype=torch.float32).repeat_interleave(2, 0).repeat_interleave(2, 1)
    correlation = torch.corrcoef(torch.stack([digits.test_images[0].flatten(), enlarged.flatten()]))[0, 1]
    torch.testing.assert_close(correlation, torch.tensor(1.0))


def test_validation_does_not_see_the_test_images():
    digits = Digits.load("cpu")
    held_out = digits.for_validation()
    assert held_out.test_labels.equal(digits.train_labels[::5])
    assert len(held_out.train_labels) + len(held_out.test_labels) == len(digits.train_labels)
    # Up to the scale, as they are standardized once more.
    torch.testing.assert_close(held_out.train_images.std(), torch.tensor(1.0))
    shown = [
        torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        for a, b in zip(held_out.test_images[:5], digits.train_images[::5][:5], strict=True)
    ]
    torch.testing.assert_close(torch.stack(shown), torch.ones(5))


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    recipe = Recipe(batch_size=32, learning_rate=1.0, epochs=30, warm_up_epochs=5)
    steps = recipe.steps(1437)
    assert steps == 30 * 1437 // 32
    factors = [recipe.learning_rate_factor(steps, step) for step in range(steps)]
    warm_up = steps // 6
    for step in (0, 10, warm_up - 1):
        assert factors[step] == pytest.approx((step + 1) / (steps / 6))
    assert max(factors) <= 1.0
    assert factors[warm_up + (steps - warm_up) // 2] == pytest.approx(0.5, abs=0.01)
    assert factors[-1] < 1e-4
    # Few large batches: no division by zero, nothing beyond the full rate.
    large = Recipe(batch_size=1024, learning_rate=1.0, epochs=2, warm_up_epochs=1)
    assert all(0 <= large.learning_rate_factor(2, step) <= 1 for step in range(2))


@pytest.mark.parametrize("batch_size", [32, 64, 128, 256, 512, 1024])
def test_learning_rate_and_clip_factor_follow_the_batch_size(batch_size):
    times = batch_size // 32
    assert bench_convergence.recipe_for(batch_size).learning_rate == pytest.approx(
        times * bench_convergence.BASE_LEARNING_RATE
    )
    network = METHODS[AGC].network(**ARCHITECTURE)
    agc = METHODS[AGC].clipping(network, batch_size).__self__
    assert agc.clip_factor == bench_convergence.CLIP_FACTOR.at(batch_size)
    assert Threshold(0.5, falling=True).at(batch_size) == pytest.approx(0.5 / times)
    assert Threshold(0.5, falling=False).at(batch_size) == 0.5
    excluded = {id(p) for p in network.parameters()} - {id(p) for p in agc.parameters}
    assert excluded == {id(p) for p in network.fc.parameters()}


def test_clipping_the_global_norm():
    network = nn.Linear(3, 2)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    METHODS[NORM].clipping(network, 32)()
    squares = sum(parameter.grad.square().sum() for parameter in network.parameters())
    torch.testing.assert_close(squares.sqrt(), torch.tensor(bench_convergence.MAX_NORM.at(32)))


def test_training_is_that_of_sgd_written_out():
    """Against Nesterov's momentum with the decay in the gradient, in plain tensors, over the same batches."""
    digits = few(Digits.load("cpu"), 96)
    recipe = Recipe(batch_size=64, learning_rate=0.1, epochs=4, warm_up_epochs=1)
    model, expected = classifier(), classifier()
    outcome = train(model, lambda: None, digits, recipe, seed=3)
    parameters = list(expected.parameters())
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    generator = torch.Generator().manual_seed(3)
    order = torch.cat([torch.randperm(96, generator=generator) for _ in range(4)])
    losses = []
    for step in range(6):  # 384 images
        indices = order[64 * step : 64 * (step + 1)]
        log_probabilities = expected(digits.train_images[indices]).log_softmax(1)
        targets = 0.9 * nn.functional.one_hot(digits.train_labels[indices], 10) + 0.01
        loss = -(targets * log_probabilities).sum(1).mean()
        losses.append(loss.item())
        rate = 0.1 * recipe.learning_rate_factor(6, step)
        with torch.no_grad():
            for parameter, momentum, grad in zip(
                parameters, momenta, torch.autograd.grad(loss, parameters), strict=True
            ):
                grad = grad + 5e-4 * parameter
                momentum.mul_(0.9).add_(grad)
                parameter.sub_(rate * (grad + 0.9 * momentum))
    for actual, wanted in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(actual, wanted)
    # Six steps in four epochs: 2, 2, 1 and 1.
    wanted = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4], losses[5]]
    assert outcome.train_loss == pytest.approx(wanted, rel=1e-5)
    correct = expected(digits.test_images).argmax(1) == digits.test_labels
    assert outcome.test_accuracy[-1] == pytest.approx(100 * correct.float().mean().item())
    assert len(outcome.test_accuracy) == 4


def test_clipping_comes_between_backward_and_step():
    digits, model = few(Digits.load("cpu"), 64), classifier()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    calls = []

    def clip():
        calls.append(all(parameter.grad.any() for parameter in model.parameters()))
        for parameter in model.parameters():
            parameter.grad = -5e-4 * parameter.detach()  # cancels the decay

    train(model, clip, digits, Recipe(32, 0.1, epochs=2, warm_up_epochs=1), seed=0)
    assert calls == [True] * 4
    for parameter, expected in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), expected)


def test_what_diverged():
    digits = few(Digits.load("cpu"), 64)
    recipe = Recipe(32, 0.1, epochs=3, warm_up_epochs=1)
    fine = train(classifier(), lambda: None, Digits.load("cpu"), recipe, seed=0)
    assert not fine.diverged and fine.test_accuracy[-1] > 80

    model = classifier()
    ended = train(model, lambda: model[1].weight.grad.fill_(math.nan), digits, recipe, seed=0)
    assert ended.diverged
    # The first epoch's second loss was NaN already: nothing came after it, and the loss is not kept.
    assert (len(ended.test_accuracy), ended.train_loss) == (1, [])

    constant = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    nn.init.zeros_(constant[1].weight)
    guessing = train(constant, lambda: [p.grad.zero_() for p in constant.parameters()], digits, recipe, seed=0)
    assert guessing.diverged and guessing.test_accuracy[-1] <= CHANCE
    assert all(map(math.isfinite, guessing.train_loss)) and len(guessing.train_loss) == 3


def run(monkeypatch, folder, *arguments) -> int:
    command = ["benchmarks", "--device", "cpu", "--no-keep-memory", "--only", "convergence", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", [*command, "--threads", "1", *arguments])
    monkeypatch.setattr(harness, "measure_bandwidth", lambda device, clock: {"copy": 1e9})
    monkeypatch.setattr(harness, "measure_matmul", lambda device, clock: MATMUL)
    load = Digits.load
    monkeypatch.setattr(bench_convergence.Digits, "load", lambda device: few(load(device), 128))
    monkeypatch.setattr(bench_convergence, "recipe_for", lambda size: Recipe(size, size / 3200, epochs=2))
    monkeypatch.setattr(bench_convergence, "BATCH_SIZES", (16, 64))
    monkeypatch.setattr(bench_convergence, "QUICK_BATCH_SIZES", (32,))
    monkeypatch.setattr(bench_convergence, "SEEDS", 2)
    return __main__.main()


def test_the_command_trains_with_every_method(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, "--full", "--seed", "5") == 0
    stored = Results.load(tmp_path)
    assert [(one.batch_size, one.contestant, one.seed) for one in stored.trainings] == [
        (size, name, seed) for size in (16, 64) for name in METHODS for seed in (5, 6)
    ]
    assert {one.contestant: one.backend for one in stored.trainings} == {
        AGC: "cpu",
        NORM: "cpu",
        UNCLIPPED: "cpu",
        TWIN: "",
    }
    assert {(one.batch_size, one.learning_rate) for one in stored.trainings} == {(16, 0.005), (64, 0.02)}
    assert all(len(one.test_accuracy) == 2 for one in stored.trainings)
    assert (tmp_path / "convergence.png").stat().st_size > 10_000
    assert f"## {BENCHES['convergence']}\n\n2 epochs" in (tmp_path / "summary.md").read_text()
    # Networks of one seed start alike however they are clipped, those of another seed do not.
    first = {(one.contestant, one.seed): one.train_loss[0] for one in stored.trainings if one.batch_size == 64}
    assert first[AGC, 5] == pytest.approx(first[UNCLIPPED, 5], rel=0.05)
    assert first[UNCLIPPED, 5] != first[UNCLIPPED, 6]


def test_quick_and_what_an_interruption_leaves(monkeypatch, tmp_path):
    original, calls = bench_convergence.train_from, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(bench_convergence, "train_from", interrupted)
    assert run(monkeypatch, tmp_path) == 130
    assert [(one.batch_size, one.contestant) for one in Results.load(tmp_path).trainings] == [(32, AGC), (32, NORM)]
    assert (tmp_path / "convergence.png").exists()


def test_a_method_that_does_not_run_its_ops_is_not_reported(monkeypatch):
    told = SimpleNamespace(trainings=[], incidents=[])
    told.settings = harness.Settings("cpu", quick=True, seed=0, rounds=None, batch_size=8, image_size=224)
    told.track = lambda items, description: items
    told.add_training, told.report_incident = told.trainings.append, told.incidents.append
    monkeypatch.setattr(bench_convergence, "QUICK_BATCH_SIZES", (64,))
    monkeypatch.setattr(bench_convergence, "METHODS", (replace(METHODS[TWIN], ops=("agc",)), METHODS[TWIN]))
    load = Digits.load
    monkeypatch.setattr(bench_convergence.Digits, "load", lambda device: few(load(device), 64))
    monkeypatch.setattr(bench_convergence, "recipe_for", lambda size: Recipe(size, 0.01, epochs=1, warm_up_epochs=0))
    bench_convergence.run(told)
    assert [one.contestant for one in told.trainings] == [TWIN]
    assert "did not run ['agc']" in told.incidents[0].reason


def stored_results(reached: dict[int, dict[str, list[float]]]) -> Results:
    """Results whose runs reached these accuracies; one of at most 10 % diverged."""
    results = Results(Environment.record("cpu", keeps_memory=False))
    for size, contestants in reached.items():
        for name, accuracies in contestants.items():
            role = "peer" if name == TWIN else "ours"
            for seed, last in enumerate(accuracies):
                curves = {"test_accuracy": [50.0, last], "train_loss": [1.0], "diverged": last <= 10}
                results.trainings.append(
                    Training(name, role, "cpu", seed, 2.0, **curves, batch_size=size, learning_rate=size / 3200)
                )
    return results


REACHED = {
    32: {AGC: [98.0, 99.0], NORM: [98.0, 98.5], UNCLIPPED: [97.0, 98.0], TWIN: [98.0, 98.0]},
    64: {AGC: [96.0, 97.0], NORM: [96.5, 96.5], UNCLIPPED: [10.0, 90.0], TWIN: [97.5, 98.5]},
}


def test_table_and_note():
    columns, rows = tables.table(stored_results(REACHED), "convergence")
    assert all(len(row) == len(columns) for row in rows)
    assert [row[0] for row in rows] == [
        "batch 32, learning rate 0.01", "", "", "", "batch 64, learning rate 0.02", "", "", ""
    ]  # fmt: skip
    assert rows[0][1:] == [AGC, "cpu", "98.5", "98.0 to 99.0", "0 of 2", "2.0"]
    assert rows[6][1:] == [UNCLIPPED, "cpu", "50.0", "10.0 to 90.0", "1 of 2", "2.0"]  # nothing is dropped
    note = notes.trainings_note(stored_results(REACHED))
    assert f"no seed diverged: {AGC} 64, {NORM} 64, {UNCLIPPED} 32, {TWIN} 64." in note
    assert f"+0.0 {NORM} (the seeds' ranges overlap), +46.5 {UNCLIPPED}, -1.5 {TWIN}." in note
    nowhere = notes.trainings_note(stored_results({32: {AGC: [10.0]}, 64: {AGC: [99.0]}}))
    assert nowhere.endswith(f"no seed diverged: {AGC} none.")


def test_older_results_are_of_one_batch_size(tmp_path):
    for path in (REPOSITORY / "benchmarks" / "results").glob("*/results.json"):
        stored = json.loads(path.read_text())
        for row in stored["trainings"]:
            for name in ("batch_size", "learning_rate", "diverged"):
                row.pop(name, None)
        (tmp_path / "results.json").write_text(json.dumps(stored))
        older = Results.load(tmp_path)
        assert set(older.trained()) == ({32} if stored["trainings"] else set())
        documents.summary(older)


def test_tuning_prefers_the_highest_mean_on_held_out_images(monkeypatch, capsys):
    seen = []

    def train_from(seed, method, recipe, digits):
        seen.append((seed, len(digits.test_labels)))
        base = 32 * recipe.learning_rate / recipe.batch_size
        accuracy = 90 - 100 * abs(base - 0.01) + (5 if method.name == AGC else 0)
        return SimpleNamespace(test_accuracy=[accuracy])

    monkeypatch.setattr(tune_convergence, "train_from", train_from)
    tune_convergence.main()
    assert "chosen: base learning rate 0.01, " in capsys.readouterr().out
    held_out = len(Digits.load("cpu").train_labels[::5])
    assert set(seen) == {(tune_convergence.SEED, held_out)}
    assert tune_convergence.SEED not in range(bench_convergence.SEEDS)


def test_the_settings_are_among_those_that_were_compared():
    assert bench_convergence.BASE_LEARNING_RATE in tune_convergence.LEARNING_RATES
    assert bench_convergence.MAX_NORM in tune_convergence.MAX_NORMS
    assert bench_convergence.CLIP_FACTOR in tune_convergence.CLIP_FACTORS
