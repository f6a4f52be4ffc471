"""What clipping counts, unit by unit, on every backend against float64."""

import math

import pytest
import torch
from torch import Tensor

from . import agc_cases, sgd_agc_cases
from .agc_cases import DTYPES, RULES, bits, random_pair
from .sgd_agc_cases import Parameter
from .statistics_cases import counted, counted_once, norms
from .tolerances import assert_accurate

NORMS = (2.0, 1.0, math.inf, 3.0)
SHAPES = [(), (9,), (6, 1, 1, 1), (1, 6), (6, 35), (5, 4, 3, 3), (2, 9000)]
AGC_OP = torch.ops.nfnets_kernels.agc_
STEPS = 3


def zeros(weight: Tensor, rule: str = "timm") -> Tensor:
    return torch.zeros(len(norms(weight, 2.0, rule)), 3)


def assert_counts(statistics: Tensor, expected: Tensor, length: int) -> None:
    assert torch.equal(statistics[:, :2].double(), expected[:, :2])
    assert_accurate(statistics[:, 2], expected[:, 2], unit_length=length, magnitude=0.0)


def assert_agc_counts(backend: str, pairs: list[tuple[Tensor, Tensor]], steps: int = 1, **options) -> list[Tensor]:
    """The counts of `steps` steps by the same gradients; they are those of the formula."""
    rule = options.get("rule", "timm")
    statistics = [zeros(weight, rule) for weight, _ in pairs]
    settings = {"clip_factor": 0.01, "eps": 1e-3, "norm_type": 2.0, "rule": "timm", **options}
    for _ in range(steps):
        grads = [grad.clone() for _, grad in pairs]
        AGC_OP([weight for weight, _ in pairs], grads, *settings.values(), backend, statistics)
    for (weight, grad), counts in zip(pairs, statistics, strict=True):
        assert_counts(counts, counted([counted_once(weight, grad, **options)] * steps), weight.numel())
    return statistics


@pytest.mark.parametrize("kernel", agc_cases.KERNELS)
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("rule", RULES)
def test_agc_counts_units(kernel, norm_type, rule):
    pairs = [random_pair(shape, DTYPES[i % 3]) for i, shape in enumerate(SHAPES)]
    pairs.append((random_pair((6, 35))[0], random_pair((6, 35), torch.float64)[1]))
    with agc_cases.using(kernel) as backend:
        statistics = torch.cat(assert_agc_counts(backend, pairs, norm_type=norm_type, rule=rule))
    assert 0 < statistics[:, 1].sum() < len(statistics), "all units were clipped, or none"


@pytest.mark.parametrize("kernel", agc_cases.KERNELS)
@pytest.mark.parametrize("norm_type", NORMS)
def test_agc_adds_up_over_steps(kernel, norm_type):
    weight = torch.randn(6, 35)
    grads = [random_pair((6, 35))[1] * factor for factor in (0.3, 3.0, 0.1)]
    statistics = zeros(weight)
    expected = counted([counted_once(weight, grad, norm_type=norm_type) for grad in grads])
    with agc_cases.using(kernel) as backend:
        for grad in grads:
            AGC_OP([weight], [grad], 0.01, 1e-3, norm_type, "timm", backend, [statistics])
    assert_counts(statistics, expected, 35)
    assert len(set(statistics[:, 1].tolist())) > 2


@pytest.mark.parametrize("kernel", sgd_agc_cases.KERNELS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grad_scale", [None, 1024.0])
def test_sgd_agc_counts_units(kernel, rule, grad_scale):
    parameters = [sgd_agc_cases.random_parameter(shape, DTYPES[i % 3]) for i, shape in enumerate(SHAPES)]
    expected: list[list[Tensor]] = [[] for _ in parameters]
    for p in parameters:
        p.statistics = zeros(p.weight, rule)
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    with sgd_agc_cases.using(kernel) as backend:
        for _ in range(STEPS):
            for p, of_p in zip(parameters, expected, strict=True):
                p.grad = p.grad * 0.3 * (grad_scale or 1.0)
                of_p.append(counted_once(p.weight, p.grad, rule, grad_scale=grad_scale or 1.0))
            sgd_agc_cases.step(parameters, backend, rule=rule, grad_scale=scale)
            for p in parameters:
                p.grad = p.grad / (grad_scale or 1.0)
    for p, of_p in zip(parameters, expected, strict=True):
        assert_counts(p.statistics, counted(of_p), p.weight.numel())


@pytest.mark.parametrize("kernel", sgd_agc_cases.KERNELS)
def test_sgd_agc_counts_in_clipped_groups_alone(kernel):
    parameters = [sgd_agc_cases.random_parameter((6, 35)) for _ in range(2)]
    for p in parameters:
        p.statistics = zeros(p.weight)
    with sgd_agc_cases.using(kernel) as backend:
        sgd_agc_cases.step_groups(parameters, [0, 1], [{}, {"clip_factor": None}], backend)
    assert parameters[0].statistics[:, 0].tolist() == [1.0] * 6
    assert not parameters[1].statistics.any()


EXTREMES = [
    *[(0.0, 0.0, 1e-3), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 1e-3), (1.0, 0.0, 0.0), (1.0, 1e38, 1e-3)],
    *[(1e-25, 1e-25, 0.0), (1e-25, 1e-28, 0.0), (1e30, 1e-3, 0.0), (1e-20, 3e38, 0.0)],
]


@pytest.mark.parametrize("kernel", agc_cases.KERNELS)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0])
def test_extremes_of_agc(kernel, norm_type):
    with agc_cases.using(kernel) as backend:
        for weight, grad, eps in EXTREMES:
            pair = torch.full((3, 33), weight), torch.full((3, 33), grad)
            assert_agc_counts(backend, [pair], norm_type=norm_type, eps=eps)


@pytest.mark.parametrize("kernel", sgd_agc_cases.KERNELS)
def test_extremes_of_sgd_agc(kernel):
    with sgd_agc_cases.using(kernel) as backend:
        for weight, grad, eps in EXTREMES:
            p = Parameter(torch.full((3, 33), weight), torch.full((3, 33), grad), statistics=torch.zeros(3, 3))
            expected = counted_once(p.weight, p.grad, eps=eps)
            sgd_agc_cases.step([p], backend, eps=eps)
            assert_counts(p.statistics, expected, 33)


@pytest.mark.parametrize("kernel", agc_cases.KERNELS)
@pytest.mark.parametrize("tensor", ["weight", "grad"])
def test_a_unit_with_nan_counts_as_clipped_and_its_ratio_stays_nan(kernel, tensor):
    weight, grad = random_pair((4, 35))
    (weight if tensor == "weight" else grad)[1, 3] = math.nan
    p = Parameter(weight.clone(), grad.clone(), statistics=torch.zeros(4, 3))
    with agc_cases.using(kernel) as backend:
        (statistics,) = assert_agc_counts(backend, [(weight, grad)], steps=2)
        AGC_OP([torch.ones(4, 35)], [torch.ones(4, 35)], 0.01, 1e-3, 2.0, "timm", backend, [statistics])
    with sgd_agc_cases.using(kernel) as backend:
        for weight_now, grad_now in ((weight, grad), (weight, grad), (torch.ones(4, 35), torch.ones(4, 35))):
            p.weight, p.grad = weight_now.clone(), grad_now
            sgd_agc_cases.step([p], backend)
    for counts in (statistics, p.statistics):
        assert counts[1, :2].tolist() == [3.0, 3.0]
        assert counts[:, 2].isnan().tolist() == [False, True, False, False]
        assert (counts[[0, 2, 3], 2] >= 1.0).all()


@pytest.mark.parametrize("kernel", agc_cases.KERNELS)
@pytest.mark.parametrize("norm_type", NORMS)
def test_counting_changes_no_bit(kernel, norm_type):
    pairs = [random_pair(shape, dtype) for shape in ((), (6, 35), (2, 500)) for dtype in DTYPES]
    grads = [[grad.clone() for _, grad in pairs] for _ in range(2)]
    weights = [weight for weight, _ in pairs]
    with agc_cases.using(kernel) as backend:
        for of_run, statistics in zip(grads, (None, list(map(zeros, weights))), strict=True):
            AGC_OP(weights, of_run, 0.01, 1e-3, norm_type, "timm", backend, statistics)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*grads, strict=True))
    parameters = [Parameter(weight.clone(), grad) for weight, grad in pairs]
    counting = [Parameter(weight.clone(), grad, statistics=zeros(weight)) for weight, grad in pairs]
    with sgd_agc_cases.using(kernel) as backend:
        sgd_agc_cases.step(parameters, backend)
        sgd_agc_cases.step(counting, backend)
    assert all(torch.equal(bits(p.weight), bits(q.weight)) for p, q in zip(parameters, counting, strict=True))
