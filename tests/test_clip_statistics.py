"""What `stats()` of `AGC` and `SGD_AGC` tells of clipping, against float64."""

import copy
import math
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nfnets_kernels as nfk
from nfnets_kernels import AGC
from nfnets_kernels.optim import SGD_AGC
from nfnets_kernels.optim.statistics import ClippingStatistics, ParameterStatistics

from . import agc_cases
from .agc_cases import ALL, DTYPES, RULES, Net, bits, loss, parameter, random_pair
from .statistics_cases import counted, counted_once

STEPS = 3


def expected_row(name: str, weight: Tensor, steps: Sequence[Tensor], rule: str = "timm") -> tuple:
    """Of steps with these gradients."""
    every = counted([counted_once(weight, grad, rule) for grad in steps])
    clipped = float(every[:, 1].sum() / every[:, 0].sum())
    return name, tuple(weight.shape), len(every), len(steps), clipped, pytest.approx(float(every[:, 2].max()), rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_stats_of_a_model_has_a_row_for_each_clipped_parameter(rule):
    model = Net()
    agc = AGC(model, rule=rule, exclude=["fc"], statistics=True)
    steps: dict[str, list[Tensor]] = {}
    for _ in range(STEPS):
        model.zero_grad()
        loss(model).backward()
        for name, p in model.named_parameters():
            steps.setdefault(name, []).append(p.grad.clone())
        agc.clip_()
    names = [name for name, _ in model.named_parameters() if not name.startswith("fc")]
    stats = agc.stats()
    assert list(stats) == [expected_row(name, model.get_parameter(name), steps[name], rule) for name in names]
    units = sum(row.units for row in stats)
    assert stats.fraction == pytest.approx(sum(row.fraction * row.units for row in stats) / units)
    assert stats.largest_ratio == max(row.largest_ratio for row in stats)


def test_steps_are_those_with_a_gradient():
    often, seldom, never = (nn.Parameter(torch.randn(4, 6)) for _ in range(3))
    agc = AGC([often, seldom, never], statistics=True)
    grads: list[list[Tensor]] = [[], []]
    for i in range(5):
        for p, of_p in zip((often, seldom), grads, strict=True):
            p.grad = random_pair((4, 6))[1] if p is often or i in (1, 2) else None
            of_p += [] if p.grad is None else [p.grad.clone()]
        agc.clip_()
    stats = agc.stats()
    assert [row.steps for row in stats] == [5, 2]
    assert list(stats) == [expected_row(f"parameters[{i}]", p, grads[i]) for i, p in enumerate((often, seldom))]
    seen = 4 * 5, 4 * 2
    assert stats.fraction == pytest.approx(sum(r.fraction * n for r, n in zip(stats, seen, strict=True)) / sum(seen))


def agc_over(model: nn.Module) -> AGC:
    return AGC(model, statistics=True)


def optimizer_over(model: nn.Module) -> AGC:
    return AGC(torch.optim.SGD(model.named_parameters(), 1e-3), statistics=True)


def sgd_agc_over(model: nn.Module) -> SGD_AGC:
    return SGD_AGC(model.named_parameters(), 1e-3, statistics=True)


MAKERS: list[Callable] = [agc_over, optimizer_over, sgd_agc_over]


def train(model: nn.Module, clipper: AGC | SGD_AGC, steps: int = 1) -> None:
    for _ in range(steps):
        model.zero_grad()
        loss(model).backward()
        clipper.clip_() if type(clipper) is AGC else clipper.step()


@pytest.mark.parametrize("make", MAKERS)
def test_whatever_clips_counts_the_same(make):
    torch.manual_seed(1)
    model = Net()
    expected = [
        expected_row(name, p, [g]) for (name, p), g in zip(model.named_parameters(), first_grads(model), strict=True)
    ]
    clipper = make(model)
    assert list(clipper.stats()) == []
    train(model, clipper)
    assert list(clipper.stats()) == expected
    assert {row.name for row in clipper.stats()} == ALL
    train(model, clipper, 2)
    assert [row.steps for row in clipper.stats()] == [3] * len(ALL)


def first_grads(model: nn.Module) -> list[Tensor]:
    grads = torch.autograd.grad(loss(model), list(model.parameters()))
    return [grad.clone() for grad in grads]


def test_names_of_parameters_that_have_none():
    parameters = [parameter(*random_pair(shape)) for shape in ((4, 6), (5,))]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    clippers = [
        (AGC(parameters, statistics=True), ["parameters[0]", "parameters[1]"]),
        (AGC(parameters[0], statistics=True), ["parameters[0]"]),
        (AGC(torch.optim.SGD(groups, 0.0), statistics=True), ["param_groups[0][0]", "param_groups[1][0]"]),
        (SGD_AGC(parameters, 0.0, statistics=True), ["param_groups[0][0]", "param_groups[0][1]"]),
    ]
    for clipper, names in clippers:
        clipper.clip_() if type(clipper) is AGC else clipper.step()
        assert [row.name for row in clipper.stats()] == names


def test_groups_that_are_not_clipped_have_no_rows():
    parameters = [parameter(*random_pair((4, 6))) for _ in range(2)]
    groups = [{"params": parameters[:1], "clip_factor": None}, {"params": parameters[1:], "clip_factor": 0.1}]
    for make in (
        lambda: SGD_AGC(groups, 0.0, statistics=True),
        lambda: AGC(torch.optim.SGD(groups, 0.0), statistics=True),
    ):
        optimizer = make()
        optimizer.step()
        assert [row.name for row in optimizer.stats()] == ["param_groups[1][0]"]


@pytest.mark.parametrize("make", MAKERS)
def test_reset_starts_anew(make):
    model = Net()
    clipper = make(model)
    clipper.reset_stats()
    train(model, clipper, 2)
    clipper.reset_stats()
    assert all((row.steps, row.fraction, row.largest_ratio) == (0, 0.0, 0.0) for row in clipper.stats())
    assert clipper.stats().fraction == clipper.stats().largest_ratio == 0.0
    train(model, clipper)
    assert {row.steps for row in clipper.stats()} == {1}
    assert clipper.stats().largest_ratio > 0.0


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deep", "pickle"]
)
def test_copies_count_on_by_themselves(make, copied):
    model = Net()
    clipper = make(model)
    train(model, clipper, 2)
    before = list(clipper.stats())
    other_model, other = copied((model, clipper))
    assert list(other.stats()) == before
    train(other_model, other)
    assert {row.steps for row in other.stats()} == {3}
    assert list(clipper.stats()) == before


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_counting_goes_on_when_the_model_changes_its_dtype(make, dtype):
    model = Net()
    clipper = make(model)
    train(model, clipper, 2)
    model.to(dtype)
    train(model, clipper, 2)
    assert {row.steps for row in clipper.stats()} == {4}


def test_counting_starts_anew_where_units_change():
    p, rest = parameter(*random_pair((6, 1, 1, 1))), parameter(*random_pair((6, 35)))
    agc = AGC([p, rest], statistics=True)
    for rule, units in (("timm", 6), ("deepmind", 1), ("timm", 6)):
        agc.rule = rule
        for step in (1, 2):
            agc.clip_()
            assert agc.stats()[0][2:4] == (units, step)
    p.data, p.grad = torch.ones(3, 2), torch.ones(3, 2)
    agc.clip_()
    assert agc.stats()[0][1:4] == ((3, 2), 3, 1)
    assert agc.stats()[1].steps == 7


@pytest.mark.parametrize("make", MAKERS)
def test_tensors_without_elements_count_nothing(make):
    model = nn.Module()
    for name, shape in (("empty", (0, 3)), ("other", (3, 0)), ("full", (4, 6)), ("last", (0,))):
        model.register_parameter(name, parameter(*random_pair(shape)))
    clipper = make(model)
    for _ in range(STEPS):
        clipper.clip_() if type(clipper) is AGC else clipper.step()
    stats = clipper.stats()
    assert {row.name: row.steps for row in stats} == {"empty": 0, "other": 0, "full": STEPS, "last": 0}
    assert stats.fraction == stats[2].fraction > 0


@pytest.mark.parametrize("make", [lambda m: AGC(m), lambda m: AGC(torch.optim.SGD(m.parameters(), 0.1)),
                                  lambda m: SGD_AGC(m.parameters(), 0.1)])  # fmt: skip
def test_what_counted_nothing_says_so(make):
    model = Net()
    clipper = make(model)
    train(model, clipper)
    with pytest.raises(RuntimeError, match="made without statistics=True"):
        clipper.stats()
    clipper.reset_stats()


@pytest.mark.parametrize("kernel", agc_cases.KERNELS)
def test_gradients_are_clipped_to_the_same_bits(kernel):
    first = [random_pair(shape, dtype) for shape in ((4, 6), (7,), (5, 3, 3, 3)) for dtype in DTYPES]
    grads = []
    for statistics in (False, True):
        parameters = [parameter(*map(torch.clone, pair)) for pair in first]
        with agc_cases.using(kernel) as backend:
            agc = AGC(parameters, backend=backend, statistics=statistics)
            for _ in range(2):
                for p, (_, grad) in zip(parameters, first, strict=True):
                    p.grad = grad.clone()
                agc.clip_()
        grads.append([p.grad for p in parameters])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*grads, strict=True))
    assert {row.steps for row in agc.stats()} == {2}


@pytest.mark.parametrize("make", MAKERS)
def test_compiled_steps_count(make):
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    clipper, other = make(model), make(twin)
    torch._dynamo.reset()
    act = clipper.clip_ if type(clipper) is AGC else clipper.step
    compiled = torch.compile(act, backend="aot_eager", fullgraph=make is not optimizer_over)
    for _ in range(STEPS):
        model.zero_grad()
        loss(model).backward()
        compiled()
    train(twin, other, STEPS)
    for row, expected in zip(clipper.stats(), other.stats(), strict=True):
        assert row[:5] == expected[:5]
        assert row.largest_ratio == pytest.approx(expected.largest_ratio, rel=1e-5)


class NoSynchronization(TorchDispatchMode):
    """Refuses to bring a value to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError("the host waits for the device")
        return func(*args, **(kwargs or {}))


def test_a_value_on_the_host_is_noticed():
    with pytest.raises(AssertionError, match="waits"), NoSynchronization():
        torch.ones(()).item()


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_counting_steps_do_not_wait_for_the_device(kernel, monkeypatch):
    """Neither the first, which checks, nor the next ones; the reference reads found_inf."""
    monkeypatch.setattr(nfk.ops.agc, "agc_", nfk.ops.agc._agc)  # a dispatch mode does not look into ops
    model = Net()
    agc = AGC(model, backend=kernel, statistics=True)
    optimizer = SGD_AGC(model.parameters(), 1e-3, backend=kernel, statistics=True)
    loss(model).backward()
    if kernel != "reference":
        optimizer.found_inf = torch.tensor(0.0)
    optimizer.grad_scale = torch.tensor(8.0)
    with NoSynchronization():
        for _ in range(STEPS):
            agc.clip_()
            optimizer.step()
        agc.reset_stats()
        optimizer.reset_stats()


ROWS = ClippingStatistics([
    ParameterStatistics("stem.weight", (16, 3, 3, 3), 16, 10, 0.25, 0.5),
    ParameterStatistics("gain", (), 1, 10, 1.0, 0.0123),
])  # fmt: skip


def test_a_table_is_printed():
    assert repr(ROWS).splitlines() == [
        "parameter       shape  units  steps  clipped  largest ratio",
        "stem.weight  16x3x3x3     16     10   25.00%            0.5",
        "gain           scalar      1     10  100.00%         0.0123",
        "clipped in all: 29.41%, largest ratio 0.5",
    ]
    assert repr(ClippingStatistics()).splitlines()[1:] == ["clipped in all: 0.00%, largest ratio 0"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nan_is_the_largest_ratio_wherever_it_stands(order):
    rows = ROWS[0], ROWS[1]._replace(largest_ratio=math.nan)
    assert math.isnan(ClippingStatistics([rows[i] for i in order]).largest_ratio)
