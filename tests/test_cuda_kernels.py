"""How the CUDA kernels are launched: how often, where, with what table, and what an error says; in the emulator."""

import ctypes
import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from nfnets_kernels import backend, ops
from nfnets_kernels.functional import weight_standardize_many
from nfnets_kernels.reference import agc as reference

from . import emulator
from .agc_cases import assert_clipped, float64_clipped, random_pair
from .helpers import DTYPES, assert_same
from .tolerances import assert_accurate

LAUNCH_FAILURE = 719
# Parameters of the models.
NF_RESNET50, NFNET_F6 = 161, 1457


@pytest.fixture
def cuda() -> Iterator[ctypes.CDLL]:
    """Backend "cuda" serves CPU tensors; the emulator's controls."""
    with emulator.serving() as controls:
        yield controls


@pytest.fixture
def old_cuda() -> Iterator[ctypes.CDLL]:
    """The same of CUDA 12.0, whose kernels take 4 KB of arguments."""
    with emulator.serving("-DCUDART_VERSION=12000") as controls:
        yield controls


def pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    shapes = [(4, 3, 3, 3), (64,), (4, 1, 1, 1), (2, 40)]
    return [random_pair(shapes[i % len(shapes)]) for i in range(count)]


def clip(weights_and_grads: list[tuple[Tensor, Tensor]]) -> None:
    weights, grads = map(list, zip(*weights_and_grads, strict=True))
    ops.agc.agc_(weights, grads, 0.01, 1e-3, 2.0, "timm", "cuda")


def launches_of(controls: ctypes.CDLL, count: int) -> int:
    """Launches that clip so many parameters, after checking what they leave."""
    chosen = pairs(count)
    expected = [float64_clipped(*pair) for pair in chosen]
    before = controls.emulator_launches()
    clip(chosen)
    launches = controls.emulator_launches() - before
    assert_clipped(torch.cat([grad.flatten() for _, grad in chosen]), torch.cat([x.flatten() for x in expected]), 64)
    return launches


@pytest.mark.parametrize("count, launches", [(1, 1), (NF_RESNET50, 1), (818, 1), (819, 2), (NFNET_F6, 2)])
def test_clipping_takes_a_launch_per_32_kilobytes_of_table(cuda, count, launches):
    assert launches_of(cuda, count) == launches


@pytest.mark.parametrize("count, launches", [(101, 1), (102, 2), (NF_RESNET50, 2)])
def test_clipping_takes_a_launch_per_4_kilobytes_where_cuda_is_older(old_cuda, count, launches):
    assert launches_of(old_cuda, count) == launches


@pytest.mark.parametrize("size", [1.0, 1e25])  # squares of 1e25 are held in float64 only
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
def test_every_unit_is_counted_once(cuda, norm_type, size):
    shapes = [(12, 33), (3, 1153), (2, 5000), (70, 1, 1, 1), (5,), (1,)]
    weights, grads = map(list, zip(*[[x * size for x in random_pair(shape)] for shape in shapes], strict=True))
    counts = [torch.tensor([[3.0, 1.0, 0.02]]).repeat(len(weight) if weight.ndim > 1 else 1, 1) for weight in weights]
    expected = [count.clone() for count in counts]
    for weight, grad, count in zip(weights, grads, expected, strict=True):
        reference.agc_(weight.double(), grad.double(), 0.01, 1e-3, norm_type, "timm", count)
    ops.agc.agc_(weights, grads, 0.01, 1e-3, norm_type, "timm", "cuda", counts)
    for count, of_reference in zip(counts, expected, strict=True):
        assert_same(count[:, :2], of_reference[:, :2])
        assert_accurate(count, of_reference.double(), unit_length=5000, magnitude=0.0)


def test_statistics_that_are_given_twice_are_noticed_by_the_emulator(cuda):
    for shape in ((3, 40), (2, 5000), (4, 1)):
        weights, grads = map(list, zip(*[random_pair(shape) for _ in range(2)], strict=True))
        with pytest.raises(RuntimeError, match="which this launch has written before"):
            ops.agc.agc_(weights, grads, 0.01, 1e-3, 2.0, "timm", "cuda", [torch.zeros(shape[0], 3)] * 2)


def standardized(weights: list[Tensor]) -> list[Tensor]:
    leaves = [weight.detach().requires_grad_() for weight in weights]
    outs = weight_standardize_many(leaves, dtype=torch.bfloat16, memory_format=torch.channels_last, backend="cuda")
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(out).cumsum(0) for out in outs])]


@pytest.mark.parametrize("count, launches", [(1, 2), (53, 2), (454, 2), (455, 4)])
def test_weight_standardization_takes_a_launch_forward_and_one_backward(cuda, count, launches):
    weights = [torch.randn(2, 8, 3, 3) for _ in range(count)]
    before = cuda.emulator_launches()
    results = standardized(weights)
    assert cuda.emulator_launches() - before == launches
    assert_same([results[count - 1], results[-1]], standardized(weights[-1:]))


def test_a_launch_for_each_pair_of_dtypes(cuda):
    dtypes = list(product(DTYPES, DTYPES))
    before = cuda.emulator_launches()
    clip([(torch.randn(3, 8).to(a), torch.randn(3, 8).to(b)) for a, b in dtypes * 2])
    assert cuda.emulator_launches() - before == len(dtypes)


def test_a_gradient_that_is_given_twice_is_noticed_by_the_emulator(cuda):
    with pytest.raises(RuntimeError, match="which this launch has written before"):
        clip([random_pair((3, 40))] * 2)


def test_blocks_hold_units_as_long_as_they_are(cuda):
    """Four units that fit a warp, one that needs the block's registers, one that fits none, 512 single elements."""
    of_three_blocks = ((9, 1152), (12, 33), (3, 1153), (3, 4608), (3, 4609), (3, 100_000), (1025, 1, 1, 1))
    for shape in of_three_blocks:
        clip([random_pair(shape)])
        assert (cuda.emulator_last_grid(), cuda.emulator_last_block()) == (3, 128), shape


def test_misaligned_units_need_room_for_what_precedes_them(cuda):
    weight, grad = random_pair((8, 1152))
    for aligned, blocks in ((True, 2), (False, 8)):
        offset = 0 if aligned else 1
        moved = torch.empty(grad.numel() + offset)[offset:].view(grad.shape).copy_(grad)
        clip([(weight, moved)])
        assert cuda.emulator_last_grid() == blocks


def test_tensors_without_elements_are_not_launched(cuda):
    before = cuda.emulator_launches()
    clip([(torch.ones(shape), torch.ones(shape)) for shape in ((0,), (0, 3), (3, 0))])
    assert weight_standardize_many([torch.ones(0, 3, 3, 3)], backend="cuda")[0].shape == (0, 3, 3, 3)
    assert cuda.emulator_launches() == before


def test_a_failed_launch_names_op_grid_and_device_and_leaves_the_next_alone(cuda):
    weight, grad = random_pair((3, 2000))
    before = grad.clone()
    cuda.emulator_fail_next_launch(LAUNCH_FAILURE)
    message = "CUDA kernel agc failed on device 0 with a grid of 3 blocks of 128 threads: unspecified launch failure"
    with pytest.raises(RuntimeError, match=message):
        clip([(weight, grad)])
    assert_same(grad, before)
    clip([(weight, grad)])
    assert not torch.equal(grad, before)
    for failing, op in ((0, "weight_standardize"), (1, "weight_standardize_backward")):
        leaf = torch.randn(3, 8, requires_grad=True)
        out = None if failing == 0 else weight_standardize_many([leaf], backend="cuda")[0]
        cuda.emulator_fail_next_launch(LAUNCH_FAILURE)
        with pytest.raises(RuntimeError, match=f"CUDA kernel {op} failed on device 0 with a grid of 1 blocks"):
            weight_standardize_many([leaf], backend="cuda") if out is None else out.sum().backward()


def run_on(monkeypatch, device: int, stream: int) -> None:
    monkeypatch.setattr(ops.agc, "queue", lambda _: (device, stream))
    clip(pairs(3))


def test_kernels_run_on_the_tensors_device_and_stream_and_leave_the_callers_device_current(cuda, monkeypatch):
    for current, device in product((0, 1), (0, 1)):
        assert cuda.emulator_set_device(current) == 0
        run_on(monkeypatch, device, 0x1230 + device)
        assert cuda.emulator_last_device() == device
        assert cuda.emulator_last_stream() == 0x1230 + device
        assert cuda.emulator_device() == current
    cuda.emulator_set_device(0)


def test_a_device_that_is_not_there_is_named(cuda, monkeypatch):
    with pytest.raises(RuntimeError, match=r"CUDA kernel agc failed on device 7 .*: invalid device ordinal"):
        run_on(monkeypatch, 7, 0)
    assert cuda.emulator_device() == 0


def test_a_device_without_code_is_told_from_one_with(cuda):
    assert backend.cuda_extension.obstacle(0) == ""
    assert backend.cuda_extension.obstacle(1) == "no kernel image is available for execution on the device"
    assert cuda.emulator_device() == 0


def test_results_are_the_same_from_run_to_run(cuda):
    chosen = [random_pair(shape) for shape in ((9, 1152), (3, 4608), (2, 100_000), (70, 33), (300,))]
    runs = []
    for _ in range(3):
        grads = [grad.clone() for _, grad in chosen]
        clip([(weight, grad) for (weight, _), grad in zip(chosen, grads, strict=True)])
        runs.append(grads)
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])
