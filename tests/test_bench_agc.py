"""The shares of gradients that the benchmark of clipping clips, what they cost at least, and how they are checked."""

from types import SimpleNamespace

import pytest
import torch

import nfnets_kernels as nfk
from benchmarks import bench_agc
from benchmarks.checks import BenchmarkError
from benchmarks.harness import Settings

SHAPES = [(64, 3, 3, 3), (64,), (30, 1, 1, 1), (7, 50)]
UNITS = 64 + 1 + 30 + 7


@pytest.fixture(autouse=True)
def small(monkeypatch):
    model = torch.nn.ParameterList(torch.empty(shape) for shape in SHAPES)
    monkeypatch.setattr(bench_agc.peers, "create_model", lambda name: model)


def session() -> SimpleNamespace:
    return SimpleNamespace(settings=Settings("cpu", True, 0, 1, 1, 32))


@pytest.mark.parametrize("share, clipped", [("none", 0), ("10 %", 11), ("all", UNITS)])
def test_as_many_units_are_clipped_as_the_case_says(share, clipped):
    """Counted by the op itself, which numbers units by its own rule."""
    torch.manual_seed(0)
    params = bench_agc.make_params("any", "cpu", bench_agc.SHARES[share])
    agc = nfk.AGC(params, bench_agc.CLIP_FACTOR, bench_agc.EPS, statistics=True)
    before = [param.grad.clone() for param in params]
    agc.clip_()
    for grad, param in zip(before, params, strict=True):
        over = bench_agc.over_the_limit(grad)
        assert param.grad[~over].equal(grad[~over]) and not param.grad[over].eq(grad[over]).any()
    assert sum(round(row.fraction * row.units) for row in agc.stats()) == clipped


@pytest.mark.parametrize("share", bench_agc.SHARES)
def test_gradients_are_written_only_where_they_are_clipped(share):
    comparison = bench_agc.comparison(session(), "NF-ResNet-50", share)
    assert comparison.case == f"NF-ResNet-50, {share} clipped"
    count = sum(torch.Size(shape).numel() for shape in SHAPES)
    # Units 0, 10, ... 60 of the first, none of the vector, 70, 80, 90 of the third and 100 of the last tensor.
    clipped = {"none": 0, "10 %": 7 * 27 + 3 + 50, "all": count}[share]
    assert comparison.traffic == {"read": 8 * count - 4 * clipped, "update": 8 * clipped}


@pytest.mark.parametrize("share", bench_agc.SHARES)
def test_every_way_clips_right_and_a_wrong_one_is_noticed(share):
    comparison = bench_agc.comparison(session(), "NF-ResNet-50", share)
    for contestant in comparison.contestants:
        if contestant.role != "ceiling":
            comparison.setup()
            comparison.check(contestant.name, contestant.run())
    if share != "none":
        comparison.setup()
        with pytest.raises(BenchmarkError, match="gradients"):
            comparison.check("nothing", None)
