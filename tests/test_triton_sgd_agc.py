"""The Triton kernels of steps and of clipping: launches, tables, and statistics on each of their paths."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nfnets_kernels.reference.sgd_agc import Hyperparameters
from nfnets_kernels.triton_kernels import launch, table
from nfnets_kernels.triton_kernels.agc import agc
from nfnets_kernels.triton_kernels.sgd_agc import sgd_agc

from .sgd_agc_cases import OPTIONS, Parameter, assert_stepped, expected_step, random_parameter, step_groups
from .tolerances import assert_accurate

CPU = torch.device("cpu")
SHAPES = ((6, 5, 3, 3), (7,), (5, 1, 1, 1), (3, 70))
LONG = (2, 5000)  # no tile holds a unit of it: sums, then steps
CLIPPED, UNCLIPPED = {}, {"clip_factor": None, "weight_decay": 0.0}


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels that are launched."""
    names = []

    def counted(kernel, *arguments, **options):
        names.append(kernel.__name__)
        return launch.launch(kernel, *arguments, **options)

    monkeypatch.setattr(table, "launch", counted)
    return names


def assert_groups_step(parameters: list[Parameter], groups: list[int], options: list[dict[str, Any]]) -> None:
    before = [p.clone() for p in parameters]
    expected = [expected_step(p, **options[group]) for p, group in zip(parameters, groups, strict=True)]
    step_groups(parameters, groups, options, "triton")
    for p, old, of_p in zip(parameters, before, expected, strict=True):
        assert_stepped(p, old, of_p, OPTIONS["ema_decay"])


def test_a_group_takes_one_launch_of_whatever_mix_of_dtypes(launched):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    parameters = [random_parameter(shape, dtype) for shape in SHAPES for dtype in dtypes]
    assert_groups_step(parameters, [i % 2 for i in range(len(parameters))], [CLIPPED, UNCLIPPED])
    assert launched == ["step_kernel"] * 2


def test_long_units_take_two_more_where_they_are_clipped(launched):
    parameters = [random_parameter(shape) for shape in (LONG, (4, 9), LONG)]
    assert_groups_step(parameters, [0, 0, 1], [CLIPPED, UNCLIPPED])
    assert launched == ["step_kernel", "sum_parts_kernel", "step_parts_kernel", "step_kernel"]


def test_a_group_whose_states_are_not_all_there_is_split(launched):
    parameters = [random_parameter((4, 9), states=i > 0) for i in range(3)]
    parameters[2].average = None
    assert_groups_step(parameters, [0] * 3, [{"nesterov": False}])
    assert launched == ["step_kernel"] * 3


def test_tables_are_copied_once_whatever_the_hyperparameters(monkeypatch):
    """Two groups of the same shapes have a table each."""
    table._cached.cache_clear()
    sizes, page_locked = [], table.page_locked
    monkeypatch.setattr(
        table, "page_locked", lambda values, device: sizes.append(len(values)) or page_locked(values, device)
    )
    parameters = [random_parameter(shape) for shape in SHAPES * 2]
    groups = [i // len(SHAPES) for i in range(len(parameters))]
    for lr in (0.1, 0.05):
        assert_groups_step(parameters, groups, [{"lr": lr}, {"lr": 2 * lr, "momentum": 0.5}])
        assert len(sizes) == 2


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def clip(parameters: list[Parameter], norm: float) -> None:
    weights, grads = ([getattr(p, name) for p in parameters] for name in ("weight", "grad"))
    units = [len(w) for w in weights], [w.shape[1] for w in weights]
    dtypes = ([x.dtype for x in column] for column in (weights, grads))
    statistics = [address(p.statistics) for p in parameters]
    agc([*map(address, weights)], [*map(address, grads)], *units, *dtypes, CPU, 0.01, 1e-3, norm, statistics)


def step(parameters: list[Parameter], norm: float) -> None:
    assert norm == 2.0
    weights, grads = ([getattr(p, name) for p in parameters] for name in ("weight", "grad"))
    units = [len(w) for w in weights], [w.shape[1] for w in weights]
    dtypes = ([x.dtype for x in column] for column in (weights, grads))
    states = ([address(getattr(p, name)) for p in parameters] for name in ("momentum_buffer", "average", "statistics"))
    hyper = Hyperparameters(*{**OPTIONS, "lr": 0.0}.values())
    sgd_agc(
        [*map(address, weights)], [*map(address, grads)], *states, *units, *dtypes, [0] * len(weights), CPU,
        [hyper], [0], 0, 0,
    )  # fmt: skip


def ratio_of(p: Parameter, norm: float) -> Tensor:
    norms = (torch.linalg.vector_norm(x.double(), norm, dim=1) for x in (p.weight, p.grad))
    weight_norm, grad_norm = norms
    return grad_norm / weight_norm.clamp(min=1e-3)


UNITS = {"tiles": (37, 20), "one unit in a tile": (3, 4000), "single elements": (600, 1), "parts": (2, 9000)}


@pytest.mark.parametrize("shape", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("dtype, largest", [(torch.float32, 1.0), (torch.float32, 1e30), (torch.bfloat16, 1.0),
                                            (torch.float64, 1.0)], ids=str)  # fmt: skip
@pytest.mark.parametrize("run, norm", [(clip, 2.0), (clip, 1.0), (clip, math.inf), (clip, 3.0), (step, 2.0)])
def test_every_unit_is_counted_once(shape, dtype, largest, run: Callable[[list[Parameter], float], None], norm):
    """In all paths: by tiles, by parts, and once more in float64 where float32 does not hold the norms."""
    parameters = [random_parameter(shape, dtype), random_parameter(shape, dtype), random_parameter((4, 6), dtype)]
    for p in parameters:
        p.grad[: len(p.grad) // 2 + 1] *= largest
    for p in (parameters[0], parameters[2]):
        p.statistics = torch.tensor([5.0, 3.0, 0.02]).repeat(len(p.weight), 1)
    ratios = [ratio_of(p, norm) for p in parameters]
    run(parameters, norm)
    for p, ratio in zip(parameters, ratios, strict=True):
        if p.statistics is not None:
            steps, clipped, most = p.statistics.unbind(dim=1)
            assert (steps == 6).all()
            assert torch.equal(clipped, 3.0 + ~(ratio < 0.01))
            assert_accurate(most, ratio.clamp(min=0.02), unit_length=p.weight.shape[1], magnitude=0.0)


@pytest.mark.parametrize("shape", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("run", [clip, step])
def test_nan_stays_in_the_ratio_of_its_unit(shape, run):
    p = random_parameter(shape)
    p.grad[1, -1] = math.nan
    p.statistics = torch.zeros(len(p.weight), 3)
    grad = p.grad.clone()
    run([p], 2.0)
    p.grad = grad.nan_to_num()
    run([p], 2.0)
    assert (p.statistics[:, 0] == 2).all()
    assert p.statistics[:, 2].isnan().tolist() == [i == 1 for i in range(len(p.weight))]


def test_units_that_are_not_clipped_and_steps_that_are_left_out_are_not_counted():
    p = random_parameter((4, 9))
    p.statistics = torch.zeros(4, 3)
    step_groups([p], [0], [UNCLIPPED], "triton")
    step_groups([p], [0], [CLIPPED], "triton", found_inf=torch.ones(()))
    assert not p.statistics.any()
    step_groups([p], [0], [CLIPPED], "triton", found_inf=torch.zeros(()))
    assert (p.statistics[:, 0] == 1).all()
