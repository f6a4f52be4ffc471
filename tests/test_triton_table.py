"""The pointer table of Triton's multi-tensor launches: what is kept, what is refreshed, and what a CUDA graph gets."""

import pytest
import torch

import nfnets_kernels as nfk
from nfnets_kernels.functional import weight_standardize
from nfnets_kernels.triton_kernels import launch, table

from .agc_cases import assert_clipped, float64_clipped, parameter, random_pair
from .helpers import assert_same

SHAPES = ((6, 5, 3, 3), (7,), (5, 1, 1, 1), (3, 70))


@pytest.fixture
def copies(monkeypatch) -> list[int]:
    """Words of every copy to the device, of tables made by this test."""
    table._cached.cache_clear()
    sizes, page_locked = [], table.page_locked

    def counted(values, device):
        sizes.append(len(values))
        return page_locked(values, device)

    monkeypatch.setattr(table, "page_locked", counted)
    return sizes


def clip(pairs):
    expected = [float64_clipped(*pair) for pair in pairs]
    nfk.agc_([parameter(*pair) for pair in pairs], backend="triton")
    for (_, grad), clipped in zip(pairs, expected, strict=True):
        assert_clipped(grad, clipped, grad.numel())


def test_a_table_is_copied_once_and_its_pointers_only_when_one_has_changed(copies):
    pairs = [random_pair(shape) for shape in SHAPES]
    clip(pairs)
    assert len(copies) == 1
    clip(pairs)
    assert len(copies) == 1
    pairs[2] = (pairs[2][0], pairs[2][1].clone())
    clip(pairs)
    assert copies[1:] == [2 * len(SHAPES)] < copies[:1]


def test_another_structure_has_a_table_of_its_own(copies):
    pairs = [random_pair(shape) for shape in SHAPES]
    clip(pairs)
    clip(pairs[:-1])
    clip([(weight.bfloat16(), grad.bfloat16()) for weight, grad in pairs])
    whole = [size for size in copies if size > 2 * len(SHAPES)]
    assert whole == copies and len(whole) == 3
    clip(pairs)
    assert len(copies) == 3


def test_a_cuda_graph_keeps_a_table_that_no_other_call_writes(copies, monkeypatch):
    pairs = [random_pair(shape) for shape in SHAPES]
    clip(pairs)
    kept = len(table._captured)
    with monkeypatch.context() as patch:
        patch.setattr(table, "capturing", lambda device: True)
        clip(pairs)
        clip(pairs)
    assert len(table._captured) == kept + 2
    assert copies == copies[:1] * 3
    clip(pairs)
    assert len(copies) == 3


def test_a_table_made_in_inference_mode_serves_training(copies):
    weight = torch.randn(4, 6, 3, 3)
    with torch.inference_mode():
        weight_standardize(weight, backend="triton")
    again = weight.clone()
    assert_same(weight_standardize(again, backend="triton"), weight_standardize(weight.clone(), backend="triton"))
    assert len(copies) > 1


def test_rows_keep_every_bit(copies):
    scale = 0.1 + 2.0**-40
    weight = torch.randn(4, 18, dtype=torch.float64)
    exact = weight_standardize(weight, scale=scale, backend="reference")
    torch.testing.assert_close(weight_standardize(weight, scale=scale, backend="triton"), exact, rtol=1e-14, atol=0)


def test_units_of_convolutions_fit_tiles_without_waste():
    for channels in (16, 64, 256, 512):
        variant = table.variant_of(9 * channels, 8, torch.float32, torch.float32, aligned=True)
        assert variant.block * 9 // 8 == 9 * channels
    assert table.variant_of(4608, 8, torch.float32, torch.float32, aligned=True).block == 4096
    assert table.variant_of(4609, 8, torch.float32, torch.float32, aligned=True).block == 0
    assert table.variant_of(1, 8, torch.float32, torch.float32, aligned=True).block == 1


@pytest.mark.parametrize("first, second, multiple", [(torch.float32, torch.float32, 4),
                                                     (torch.float32, torch.bfloat16, 8),
                                                     (torch.float64, torch.float64, 2)])  # fmt: skip
def test_alignment_is_that_of_the_narrowest_dtype(first, second, multiple):
    assert table.variant_of(8 * multiple, 4, first, second, aligned=True).aligned == multiple
    assert table.variant_of(8 * multiple + 1, 4, first, second, aligned=True).aligned == 0
    assert table.variant_of(8 * multiple, 4, first, second, aligned=False).aligned == 0
    assert table.variant_of(1, 8 * multiple, first, second, aligned=True).aligned == multiple


def test_one_launch_clips_whatever_mix_of_dtypes(monkeypatch):
    launched = []

    def counted(kernel, grid, *arguments, **options):
        launched.append(grid)
        return launch.launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(table, "launch", counted)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    clip([random_pair(shape, dtype) for shape in SHAPES for dtype in dtypes])
    assert len(launched) == 1
    clip([random_pair((2, 5000))])  # no tile holds a unit of it: sums, then clips
    assert len(launched) == 3
