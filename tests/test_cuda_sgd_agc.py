"""The CUDA kernel of sgd_agc, in the emulator: what it makes of units of every size, and how it is launched."""

import ctypes
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from . import emulator
from .helpers import DTYPES, NAN, assert_same, offset
from .sgd_agc_cases import (
    OPTIONS,
    Parameter,
    assert_stepped,
    expected_step,
    random_parameter,
    step_groups,
    unit_norm,
)
from .tolerances import assert_accurate

CLIPPED: dict[str, Any] = {}
UNCLIPPED: dict[str, Any] = {"clip_factor": None, "weight_decay": 0.0}
# Units of a warp, of a block, of neither, and of one element.
SHAPES = [(9, 1152), (12, 33), (3, 1153), (2, 4608), (2, 4609), (2, 9000), (70, 1, 1, 1), (5,), (1,)]
SMALL = [(5, 33), (2, 1300), (2, 5000), (6, 1)]
LAUNCH_FAILURE = 719


@pytest.fixture(scope="module", autouse=True)
def cuda() -> Iterator[ctypes.CDLL]:
    """Backend "cuda" serves CPU tensors; the emulator's controls."""
    with emulator.serving() as controls:
        yield controls


@pytest.fixture
def old_cuda() -> Iterator[ctypes.CDLL]:
    """The same of CUDA 12.0, whose kernels take 4 KB of arguments."""
    with emulator.serving("-DCUDART_VERSION=12000") as controls:
        yield controls


def counted(p: Parameter) -> Parameter:
    """With the statistics of three steps."""
    p.statistics = torch.tensor([[3.0, 1.0, 0.02]]).repeat(p.weight.shape[0] if p.weight.ndim > 1 else 1, 1)
    return p


def parameters_of(shapes: Sequence[tuple[int, ...]], *dtypes: torch.dtype) -> list[Parameter]:
    return [counted(random_parameter(shape, *dtypes)) for shape in shapes]


def assert_counted(p: Parameter, before: Parameter, options: dict[str, Any], grad_scale: Tensor | None) -> None:
    """A step has been added, and its ratio, where the group is clipped."""
    clip_factor = {**OPTIONS, **options}["clip_factor"]
    if clip_factor is None:
        return assert_same(p.statistics, before.statistics)
    norms = [unit_norm(x.double(), "timm").flatten() for x in (before.weight, before.grad)]
    ratio = norms[1] / (1.0 if grad_scale is None else grad_scale) / norms[0].clamp(min={**OPTIONS, **options}["eps"])
    steps, clipped, largest = p.statistics.unbind(dim=1)
    assert torch.equal(steps, before.statistics[:, 0] + 1)
    assert torch.equal(clipped, before.statistics[:, 1] + ~(ratio < clip_factor))
    expected = torch.maximum(before.statistics[:, 2].double(), ratio)  # NaN stays
    assert_accurate(largest, expected, unit_length=p.weight.numel() // len(ratio), magnitude=0.0)


def assert_steps(
    parameters: list[Parameter],
    *options: dict[str, Any],
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """A step of parameters that take turns with the groups is what the formula has in float64, rounded once."""
    groups = [i % len(options) for i in range(len(parameters))]
    before = [p.clone() for p in parameters]
    scalars = {"lr_tensor": lr_tensor, "grad_scale": grad_scale}
    lrs = [lr_tensor] * len(options)
    step_groups(parameters, groups, options, "cuda", lrs=lrs, grad_scale=grad_scale, found_inf=found_inf)
    for p, old, group in zip(parameters, before, groups, strict=True):
        expected = expected_step(old, **scalars, **options[group])
        assert_stepped(p, old, expected, {**OPTIONS, **options[group]}["ema_decay"])
        if p.statistics is not None:
            assert_counted(p, old, options[group], grad_scale)


@pytest.mark.parametrize("dtype, grad_dtype", list(product(DTYPES, DTYPES)), ids=str)
def test_units_of_every_size_and_dtype(dtype, grad_dtype):
    assert_steps(parameters_of(SHAPES, dtype, grad_dtype), CLIPPED)


def test_a_unit_of_100_000_elements():
    assert_steps(parameters_of([(1, 100_000)]), CLIPPED)


@pytest.mark.parametrize("momentum, average, statistics", list(product((False, True), repeat=3)))
@pytest.mark.parametrize("options", [CLIPPED, UNCLIPPED], ids=["clipped", "unclipped"])
def test_states_that_there_are_not(options, momentum, average, statistics):
    parameters = parameters_of(SMALL)
    for p in parameters:
        p.momentum_buffer = p.momentum_buffer if momentum else None
        p.average = p.average if average else None
        p.statistics = p.statistics if statistics else None
    options = options if momentum else {**options, "momentum": 0.0, "nesterov": False}
    assert_steps(parameters, options)


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": False},
        {"nesterov": False, "dampening": 0.3},
        {"maximize": True},
        {"weight_decay": 0.0},
        {"ema_decay": 1.0},
        {"clip_factor": 0.0},
        {"eps": 100.0},
    ],
    ids=str,
)
def test_hyperparameters(options):
    assert_steps(parameters_of(SMALL), options)


@pytest.mark.parametrize("maximize", [False, True])
def test_scalars_in_device_memory(maximize):
    parameters = parameters_of(SMALL * 2, torch.float32, torch.float16)
    for p in parameters:
        p.grad *= 1024.0
    scalars = {"lr_tensor": torch.tensor(0.5), "grad_scale": torch.tensor(1024.0), "found_inf": torch.tensor(0.0)}
    assert_steps(parameters, {"maximize": maximize}, {**UNCLIPPED, "maximize": maximize}, CLIPPED, **scalars)


@pytest.mark.parametrize("found", [1.0, NAN])
def test_infinite_gradients_let_nothing_happen(found):
    parameters = parameters_of(SMALL)
    before = [p.clone().tensors() for p in parameters]
    step_groups(parameters, [0] * len(SMALL), [CLIPPED], "cuda", found_inf=torch.tensor(found))
    assert_same([p.tensors() for p in parameters], before)


@pytest.mark.parametrize(
    "moved",
    [["weight"], ["grad"], ["momentum_buffer"], ["average"], ["weight", "grad", "momentum_buffer", "average"]],
    ids=str,
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_misaligned_tensors(moved, dtypes):
    parameters = parameters_of([(5, 33), (9, 1152), (2, 1153), (2, 4608), (2, 5000)], *dtypes)
    for p, name in product(parameters, moved):
        setattr(p, name, offset(getattr(p, name)))
    assert_steps(parameters, CLIPPED)


@pytest.mark.parametrize("weight_size, grad_size", [(1.0, 1e30), (1e30, 1e28), (1e-25, 1e-3), (1e-30, 1e-30)])
def test_norms_that_float32_does_not_hold(weight_size, grad_size):
    parameters = parameters_of(SMALL)
    for p in parameters:
        p.momentum_buffer = None
        for x, size in ((p.weight, weight_size), (p.average, weight_size), (p.grad, grad_size)):
            x *= size
    assert_steps(parameters, {"momentum": 0.0, "nesterov": False, "eps": 1e-40})


def test_a_unit_with_nan_leaves_the_others_alone():
    parameters = parameters_of([(5, 33), (3, 1300), (3, 5000), (6, 1)])
    for p in parameters:
        p.grad[1, -1] = NAN
    assert_steps(parameters, CLIPPED)
    for p in parameters:
        assert p.weight[1].isnan().all() and not p.weight[::2].isnan().any()
        assert p.statistics[:, 2].isnan().tolist() == [i == 1 for i in range(len(p.weight))]


def launches_of(controls: ctypes.CDLL, parameters: list[Parameter], *options: dict[str, Any]) -> int:
    before = controls.emulator_launches()
    assert_steps(parameters, *options)
    return controls.emulator_launches() - before


@pytest.mark.parametrize("count, launches", [(1, 1), (161, 1), (499, 1), (500, 2)])
def test_three_groups_take_a_launch_per_32_kilobytes_of_table(cuda, count, launches):
    parameters = parameters_of([[(4, 3, 3, 3), (64,), (2, 40), (3, 1)][i % 4] for i in range(count)])
    assert launches_of(cuda, parameters, CLIPPED, UNCLIPPED, {"lr": 0.01}) == launches


@pytest.mark.parametrize("count, launches", [(51, 1), (52, 2), (161, 4)])
def test_three_groups_take_a_launch_per_4_kilobytes_where_cuda_is_older(old_cuda, count, launches):
    assert launches_of(old_cuda, parameters_of([(3, 9)] * count), CLIPPED, UNCLIPPED, {"lr": 0.01}) == launches


@pytest.mark.parametrize("groups, launches", [(8, 1), (9, 2), (17, 3)])
def test_a_launch_takes_eight_groups(cuda, groups, launches):
    options = [{"lr": 0.01 * (i + 1), "momentum": 0.5 + 0.02 * i} for i in range(groups)]
    assert launches_of(cuda, parameters_of([(2, 40)] * 40), *options) == launches


def test_a_launch_for_each_pair_of_dtypes(cuda):
    parameters = [p for dtypes in product(DTYPES, DTYPES) for p in parameters_of([(3, 8)] * 2, *dtypes)]
    assert launches_of(cuda, parameters, CLIPPED) == len(DTYPES) ** 2


@pytest.mark.parametrize(
    "dtype, shapes",
    [
        (torch.float32, [(9, 1152), (12, 33), (3, 1153), (3, 4608), (3, 4609), (3, 100_000), (1025, 1, 1, 1)]),
        (torch.bfloat16, [(9, 1536), (12, 33), (3, 1544), (3, 6144), (3, 6152), (1025, 1, 1, 1)]),
    ],
    ids=str,
)
def test_blocks_hold_units_as_long_as_they_are(cuda, dtype, shapes):
    """Four units that fit a warp, one that needs the block's registers, one that fits none, 512 single elements."""
    for shape in shapes:
        step_groups(parameters_of([shape], dtype, dtype), [0], [CLIPPED], "cuda")
        assert (cuda.emulator_last_grid(), cuda.emulator_last_block()) == (3, 128), shape


@pytest.mark.parametrize(
    "moved, blocks", [([], 2), (["weight"], 8), (["grad", "momentum_buffer", "average"], 2)], ids=str
)
def test_units_need_room_for_what_precedes_a_misaligned_weight(cuda, moved, blocks):
    (p,) = parameters_of([(8, 1152)])
    for name in moved:
        setattr(p, name, offset(getattr(p, name)))
    step_groups([p], [0], [CLIPPED], "cuda")
    assert cuda.emulator_last_grid() == blocks


def test_a_failed_launch_names_op_grid_and_device(cuda):
    (p,) = parameters_of([(3, 2000)])
    before = p.clone()
    cuda.emulator_fail_next_launch(LAUNCH_FAILURE)
    with pytest.raises(RuntimeError, match="CUDA kernel sgd_agc failed on device 0 with a grid of 3 blocks of 128"):
        step_groups([p], [0], [CLIPPED], "cuda")
    assert_same(p.tensors(), before.tensors())


@pytest.mark.parametrize("shape", [(3, 40), (2, 5000), (4, 1)], ids=str)
@pytest.mark.parametrize("shared", ["weight", "momentum_buffer", "average", "statistics"])
def test_a_tensor_that_is_given_twice_is_noticed_by_the_emulator(shape, shared):
    first, second = parameters_of([shape] * 2)
    setattr(second, shared, getattr(first, shared))
    with pytest.raises(RuntimeError, match="which this launch has written before"):
        step_groups([first, second], [0, 0], [CLIPPED], "cuda")


def test_results_are_the_same_from_run_to_run():
    parameters = parameters_of(SHAPES)
    runs = []
    for _ in range(3):
        copies = [p.clone() for p in parameters]
        step_groups(copies, [0] * len(copies), [CLIPPED], "cuda")
        runs.append([p.tensors() for p in copies])
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])
