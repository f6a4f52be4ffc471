"""Training on digits through CUDA graphs: on a CPU in calls, and through a stand-in for the graph."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_digits

from .module_helpers import on_one_thread

one_thread = pytest.fixture(on_one_thread, autouse=True)


def test_training_reaches_the_goal_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_digits", "--device", "cpu"])
    assert gpu_digits.main() == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{gpu_digits.EPOCHS} epochs in ") and "in calls: " in out and out.endswith("at least 97 %\n")


@pytest.mark.parametrize("reached, diverged, status", [(97.0, False, 0), (96.9, False, 1), (97.0, True, 1)])
def test_less_than_the_goal_fails(reached, diverged, status, monkeypatch, capsys):
    outcome = SimpleNamespace(test_accuracy=[10.0, reached], seconds=1.0, diverged=diverged)
    monkeypatch.setattr(gpu_digits, "train", lambda device: outcome)
    monkeypatch.setattr(sys, "argv", ["gpu_digits", "--device", "cpu"])
    assert gpu_digits.main() == status
    assert ("not the 97 %" in capsys.readouterr().out) == (reached < 97)


def test_a_graph_gets_every_batch_in_the_same_buffers_and_its_losses_are_kept(monkeypatch):
    """A replay runs what was captured on the memory of that time, and leaves its loss in the same place."""
    captures, place = [], torch.zeros(())

    def captured(run):
        captures.append(len(seen))

        def replay():
            place.copy_(run())
            return place

        return replay

    seen = []

    def step(images, labels):
        seen.append((images.data_ptr(), labels.data_ptr()))
        return images.sum() + labels.sum()

    monkeypatch.setattr(gpu_digits, "captured", captured)
    run = gpu_digits.graphed(step, torch.zeros(4), torch.zeros(4, dtype=torch.int64))
    losses = [run(torch.full((4,), float(index)), torch.full((4,), index)) for index in range(8)]
    assert [loss.item() for loss in losses] == [8.0 * index for index in range(8)]
    assert captures == [gpu_digits.CALLS_BEFORE_CAPTURE]
    assert len(set(seen)) == 1


def test_on_a_gpu_the_steps_are_replays(monkeypatch):
    told = []
    monkeypatch.setattr(gpu_digits, "is_gpu", lambda device: True)
    monkeypatch.setattr(gpu_digits, "captured", lambda run: (told.append("captured"), run)[1])
    monkeypatch.setattr(gpu_digits, "EPOCHS", 2)
    monkeypatch.setattr(gpu_digits, "WARM_UP_EPOCHS", 1)
    outcome = gpu_digits.train("cpu")
    assert told == ["captured"] and len(outcome.train_loss) == 2
