"""AGC of DTensors is that of the whole tensors, on any mesh and placement.

The functions that are not tests run in each of four processes.
"""

import copy
import math
import os

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import nfnets_kernels as nfk
from nfnets_kernels.sharded import clip_sharded_, is_sharded, local, split

from .agc_cases import RULES, assert_clipped, float64_clipped, parameter, random_pair, unit_length
from .distributed import assert_clips_as_whole, clip, dtensors, grid, line, run, whole
from .test_sharded_training import (
    fully_sharded_tensor_parallel_training_is_that_of_one_process,
    hybrid_sharded_gradients_are_clipped_as_whole_ones,
)

S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()
NORMS = (2.0, 1.0, math.inf, 3.0)
# One rank gets two of 5 rows and the last one none; 3 rows and 2 elements are fewer than the ranks.
ON_LINE = [((8, 3, 2), S0), ((5, 4), S0), ((3, 6), S0), ((8, 1, 1), S0), ((6, 4), R), ((5,), R), ((), R), ((7,), S0),
           ((2,), S0), ((4, 8), S1), ((3, 2), S1), ((4, 3, 8), S2), ((2, 9, 1), S1), ((0, 3), S0), ((3, 0), S1),
           ((1, 8), S0), ((1, 8), S1)]  # fmt: skip
ON_GRID = [((8, 6), S0, S1), ((9, 5), S0, S0), ((7, 3, 2), R, S0), ((9,), S0, S0), ((6,), R, S0), ((3,), S0, R),
           ((4, 6), S1, S1), ((4, 6, 5), S2, S1), ((5, 4), S1, S0), ((8, 1, 1), S0, S0), ((), R, R),
           ((5, 3), R, R)]  # fmt: skip


def every_placement_on_a_line_takes_one_all_reduce():
    for rule in RULES:
        for norm_type in NORMS:
            assert assert_clips_as_whole(dtensors(line(), ON_LINE), norm_type, rule) == 1


def every_placement_on_a_grid_takes_an_all_reduce_per_dim():
    for rule in RULES:
        for norm_type in NORMS:
            assert assert_clips_as_whole(dtensors(grid(), ON_GRID), norm_type, rule) == 2


def units_whole_on_a_rank_take_no_communication():
    plain = parameter(*random_pair((5, 3)))
    layouts = [((8, 3, 2), S0), ((5, 4), S0), ((3, 6), S0), ((6, 4), R), ((5,), R), ((), R)]
    assert assert_clips_as_whole([*dtensors(line(), layouts), plain]) == 0
    assert assert_clips_as_whole(dtensors(line(), [((8, 1, 1), S0)]), rule="timm") == 0
    assert assert_clips_as_whole(dtensors(line(), [((8, 1, 1), S0)]), rule="deepmind") == 1
    assert assert_clips_as_whole(dtensors(grid(), [((9, 5), S0, S0), ((7, 3), R, S0)])) == 0
    assert assert_clips_as_whole(dtensors(grid(), [((6,), R, S0), ((3, 8), R, S1)])) == 1


def every_dtype_and_a_mixture():
    layouts = [((5, 6), S0), ((7,), S0), ((4, 9), S1)]
    mixture = []
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert_clips_as_whole(dtensors(line(), layouts, dtype))
        mixture += dtensors(line(), layouts, dtype)
    assert assert_clips_as_whole(mixture) == 1


def values_whose_squares_overflow_float32():
    weight, grad = torch.full((4, 8), 1e25), torch.full((4, 8), 1e28)
    for placement in (S0, S1):
        assert_clips_as_whole([parameter(*(distribute_tensor(x, line(), (placement,)) for x in (weight, grad)))])


def nan_stays_in_its_unit_on_all_its_ranks():
    for norm_type in NORMS:
        for nan in (math.nan, -math.nan):
            for shape, placement in [((4, 8), S1), ((5, 3), S0), ((9,), S0), ((2, 3, 8), S2)]:
                weight, grad = random_pair(shape)
                grad.view(-1)[-1] = nan
                tensors = (distribute_tensor(x, line(), (placement,)) for x in (weight, grad))
                p, other = parameter(*tensors), dtensors(line(), [((6,), S0)])[0]
                clip([p, other], norm_type)
                units = whole(p.grad).reshape(1 if len(shape) == 1 else shape[0], -1).isnan()
                assert units[-1].all() and not units[:-1].any() and whole(other.grad).isfinite().all()


def gradients_that_are_pending_sums():
    pending = Partial()
    on_line, on_grid = (
        ((line(), (pending,), shape) for shape in [(4, 6), (6,), ()]),
        [
            (grid(), (pending, S1), (4, 6)),
            (grid(), (S0, pending), (4, 6)),
            (grid(), (S0, pending), (6,)),
        ],
    )
    for mesh, placements, shape in [*on_line, *on_grid]:
        weight, total = random_pair(shape)
        final = tuple(R if placement.is_partial() else placement for placement in placements)
        group = mesh.get_group(placements.index(pending))
        shares = torch.arange(1.0, 1 + group.size())
        term = distribute_tensor(total, mesh, final).to_local() * (shares / shares.sum())[group.rank()]
        whole_shape = {"shape": total.shape, "stride": total.stride()}
        grad = DTensor.from_local(term, mesh, placements, run_check=False, **whole_shape)
        p = parameter(distribute_tensor(weight, mesh, final), grad)
        clip([p])
        assert p.grad is grad and grad.placements == placements
        # The terms are rounded when they are made, added up for the norm, clipped, and added up again.
        roundings = 4 * group.size()
        assert_clipped(whole(grad), float64_clipped(weight, total), unit_length(total.shape, "timm"), roundings)


def a_nan_in_one_term_of_a_pending_sum():
    terms = torch.ones(2, 3)
    terms[1, 0] = math.nan if distributed.get_rank() == 0 else 1.0
    weight = distribute_tensor(torch.ones(2, 3), line(), (R,))
    p = parameter(weight, DTensor.from_local(terms, line(), (Partial(),)))
    clip([p])
    assert whole(p.grad)[1].isnan().all() and whole(p.grad)[0].isfinite().all()


def gradients_that_a_collective_still_writes():
    weight, grad = random_pair((4, 6))
    expected = float64_clipped(weight, grad)
    quarter = DTensor.from_local(grad / 4, line(), (Partial(),))
    summed = quarter.redistribute(placements=(R,), async_op=True)
    p = parameter(distribute_tensor(weight, line(), (R,)), summed)
    assert type(p.grad.to_local()) is not torch.Tensor and clip([p]) == 0
    assert_clipped(whole(p.grad), expected, 6)


def a_rank_without_gradient_takes_part():
    weight, grad = random_pair((8,))
    rank, world = distributed.get_rank(), distributed.get_world_size()
    p, frozen = (parameter(distribute_tensor(weight, line(), (S0,)), None) for _ in range(2))
    frozen.requires_grad_(False)
    if rank:
        p.grad = distribute_tensor(grad, line(), (S0,), src_data_rank=None)
    assert clip([p, frozen]) == 1
    grad[: 8 // world] = 0
    expected = float64_clipped(weight, grad).chunk(world)[rank]
    assert p.grad is None if rank == 0 else assert_clipped(local(p.grad), expected, 8) is None


def gradients_are_written_where_they_lie():
    for p in dtensors(line(), [((8, 3), S0), ((7,), S0), ((4, 8), S1)]):
        p.grad *= 1000  # all units are clipped then
        grad, held, version = p.grad, local(p.grad), p.grad._version
        before, address = held.clone(), held.data_ptr()
        clip([p, p])
        assert p.grad is grad and grad._version > version and local(grad).data_ptr() == address
        assert not held.numel() or not torch.equal(held, before)


def bad_gradients_are_named_before_anything_is_written():
    good, weight = dtensors(line(), [((8, 3), S0), ((8, 3), S0)])
    before = whole(good.grad)
    for grad, error, match in [
        (distribute_tensor(torch.ones(8, 3), line(), (R,)), ValueError, r"parameters\[1\].*redistribute"),
        (DTensor.from_local(torch.ones(8, 3), line(), (Partial(),)), ValueError, "Partial where it is replicated"),
        (distribute_tensor(torch.ones(8, 3), grid(), (S0, R)), ValueError, r"parameters\[1\].grad must be on the mesh"),
    ]:
        weight.grad = None
        weight.grad = grad
        with pytest.raises(error, match=match):
            clip([good, weight])
    for placements in [(Partial("max"),), (Partial("min"),)]:
        grad = DTensor.from_local(torch.ones(8, 3), line(), placements)
        with pytest.raises(ValueError, match="must be sharded or replicated"):
            clip([good, parameter(distribute_tensor(torch.ones(8, 3), line(), (R,)), grad)])
    with pytest.raises(ValueError, match="clip_factor"):
        clip_sharded_([good], -1.0, 1e-3, 2.0, rule="timm", backend="auto")
    assert torch.equal(whole(good.grad), before)


def a_rank_that_dies_raises_the_collective_s_own_error():
    parameters = dtensors(line(), [((8, 3), S0), ((8,), S0)])
    before = [local(p.grad).clone() for p in parameters]
    distributed.barrier()
    if distributed.get_rank() == 1:
        os._exit(0)
    with pytest.raises(RuntimeError, match=r"(?i)connection|peer|timed out|gloo"):
        clip(parameters)
    assert all(torch.equal(local(p.grad), grad) for p, grad in zip(parameters, before, strict=True))


FUNCTIONS = [
    every_placement_on_a_line_takes_one_all_reduce,
    every_placement_on_a_grid_takes_an_all_reduce_per_dim,
    units_whole_on_a_rank_take_no_communication,
    every_dtype_and_a_mixture,
    values_whose_squares_overflow_float32,
    nan_stays_in_its_unit_on_all_its_ranks,
    gradients_that_are_pending_sums,
    a_nan_in_one_term_of_a_pending_sum,
    gradients_that_a_collective_still_writes,
    a_rank_without_gradient_takes_part,
    gradients_are_written_where_they_lie,
    bad_gradients_are_named_before_anything_is_written,
    hybrid_sharded_gradients_are_clipped_as_whole_ones,
    fully_sharded_tensor_parallel_training_is_that_of_one_process,
    a_rank_that_dies_raises_the_collective_s_own_error,
]


@pytest.fixture(scope="module")
def raised(tmp_path_factory):
    return run(4, FUNCTIONS, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_on_four_processes(raised, function):
    expected = "rank 1: not finished" if function is FUNCTIONS[-1] else ""
    assert raised[function.__name__] == expected, raised[function.__name__]


def test_plain_tensors_are_clipped_as_ever_and_cost_no_import():
    p = parameter(*random_pair((5, 3)))
    expected = copy.deepcopy(p)
    expected.grad = p.grad.clone()
    nfk.agc_(expected)
    clip_sharded_([p], 0.01, 1e-3, 2.0, rule="timm", backend="auto")
    assert torch.equal(p.grad, expected.grad) and not is_sharded(p) and local(p) is p
    assert split([p, parameter(torch.ones(2), None)], "timm") == ([p], [])
