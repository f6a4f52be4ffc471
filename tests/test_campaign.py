"""The robustness campaign: what it counts, what its soak sees, and that the page shows the published figures."""

import json
import subprocess
import sys

import pytest
import torch

from .campaign import page, soak
from .campaign.counting import FILE, inputs_of
from .module_helpers import on_one_thread
from .native import ROOT

one_thread = pytest.fixture(on_one_thread, autouse=True)

PROPERTY = """
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st

@pytest.mark.parametrize("target", ["cpu:baseline"])
@given(x=st.integers(0, 1000))
@settings(database=None)
def test_any(target, x):
    with open(Path(__file__).with_name("ran"), "a") as file:
        file.write(".")
    assert x >= 0

def test_other():
    pass
"""


def test_counts_are_of_what_ran(tmp_path, monkeypatch):
    """As often as the test's body."""
    monkeypatch.setenv(FILE, str(tmp_path / "counts"))
    (tmp_path / "test_residual_bias.py").write_text(PROPERTY)
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.campaign.counting", str(tmp_path)]
    run = subprocess.run([sys.executable, *command, f"--rootdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    (line,) = map(json.loads, (tmp_path / "counts").read_text().splitlines())
    ran = len((tmp_path / "ran").read_text())
    assert ran > 50
    assert {key: line[key] for key in ("op", "backend", "inputs", "failing")} == {
        "op": "residual", "backend": "cpu:baseline", "inputs": ran, "failing": 0,
    }  # fmt: skip


def test_counts_of_statistics():
    text = "- during generate phase:\n - 40 passing, 2 failing, and 7 invalid test cases\n"
    assert inputs_of(text + "- during shrink phase:\n - 1 passing, 3 failing, and 0 invalid test cases") == (46, 5)
    with pytest.raises(AssertionError, match="no longer"):
        inputs_of("- 40 went well")


SHORT_SOAK = """
import torch
from benchmarks.torchvision_compat import prepare

prepare()
torch.set_num_threads(1)
from tests.campaign import soak

for check in filter(None, soak.soak(20)):
    print(check.step, check.held)
"""


def test_a_short_soak():
    """In a process of its own, where nothing that other tests have left behind dies meanwhile."""
    run = subprocess.run([sys.executable, "-c", SHORT_SOAK], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    steps, held = zip(*(line.split(" ", 1) for line in run.stdout.splitlines()), strict=True)
    assert list(map(int, steps)) == list(range(2, 21, 2))
    assert "'tensors': " in held[0]
    assert set(held) == {held[0]}


def test_a_soak_sees_a_step_that_is_not_plain_and_what_is_kept():
    trainee = soak.Trainee.with_optimizer("SGD_AGC")
    trainee.backward(0, *soak.digits())
    trainee.optimizer.param_groups[0]["weight_decay"] += 1e-4
    expected = soak.plain_step(trainee)
    trainee.optimizer.param_groups[0]["weight_decay"] -= 1e-4
    with pytest.raises(AssertionError, match="off by"):
        soak.assert_steps(trainee, expected)
    before = soak.held()
    kept = [torch.ones(1)]
    assert soak.held()["tensors"] == before["tensors"] + len(kept)


def check_of(step: int, **changed: object) -> soak.Check:
    return soak.Check(step, 1.0 / step, 500_000_000, {"tensors": 10})._replace(**changed)


@pytest.mark.parametrize(
    "last, message",
    [
        (check_of(4, held={"tensors": 11}), "tensors"),
        (check_of(4, resident=540_000_000), "40.0 MB more after 4 than after 2 steps"),
        (check_of(4, loss=2.0), "the loss went from 1.0 to 2.0"),
    ],
)
def test_what_grows_is_found(last, message):
    checks = [check_of(1, resident=400_000_000), check_of(2), check_of(3)]
    soak.assert_flat([*checks, check_of(4)])
    with pytest.raises(AssertionError, match=message):
        soak.assert_flat([*checks, last])


def test_the_page_shows_the_published_figures():
    figures = json.loads(page.FIGURES.read_text())
    shown = page.PAGE.read_text()
    assert page.written(shown, figures) == shown, "run `python -m tests.campaign --only page`"
    assert not any(of_part["returncode"] for of_part in figures.values())
    assert page.FIGURES.stat().st_size < 50_000
    figures["built"]["rows"][0]["inputs"] += 1
    assert page.written(shown, figures) != shown
