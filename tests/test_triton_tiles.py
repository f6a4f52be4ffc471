"""How the Triton kernels of activations and residuals cut tensors into programs, and what meets at the seams."""

import pytest
import torch

from nfnets_kernels import functional
from nfnets_kernels.reference import scaled_activation as activations
from nfnets_kernels.triton_kernels import scaled_activation as tiles

from .helpers import DTYPES, offset, randn
from .test_residual import check, small_inputs
from .tolerances import assert_accurate


@pytest.mark.parametrize("length", [1, 3, 7 * 7, 14 * 14, 96, 56 * 56, 1536, 3072, 10**6])
@pytest.mark.parametrize("block", [256, 2048])
def test_tiles_are_full_and_wide(length, block):
    for most_columns in (64, block):
        rows, columns = tiles.tile_of(length, block, most_columns)
        assert rows * columns == block and columns <= most_columns
        padded = -(-length // columns) * columns
        assert padded - length < max(length, 64)  # no more than half of the lanes of long rows are idle
        assert columns >= min(64, length)


def test_access_is_the_widest_that_rows_allow():
    for dtype in DTYPES:
        assert tiles.unit_of(96, dtype) * dtype.itemsize == 16
        assert tiles.unit_of(49, dtype) == 1
        assert tiles.unit_of(2, dtype) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_elements_beside_the_last_full_block(dtype, backward):
    block = tiles.block_of(dtype, 1 + backward)
    for numel in (block - 1, block, block + 1, 3 * block + 5):
        x, grad = (offset(randn(numel, dtype)) if numel % 2 else randn(numel, dtype) for _ in range(2))
        out = functional.scaled_activation(x.requires_grad_(), "tanh", 1.0, backend="triton")
        expected = activations.scaled_activation(x.detach().double(), "tanh", 1.0)
        if backward:
            (out,) = torch.autograd.grad(out, x, grad)
            expected = activations.scaled_activation_backward(grad.double(), x.detach().double(), "tanh", 1.0)
        assert_accurate(out, expected)


@pytest.mark.parametrize("names", [("skip_gain",), ("keep",), ("skip_gain", "keep"), ("skip_gain", "se", "keep")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 130, 3, 3), (2, 64, 30, 40), (3, 3, 90, 70)])
def test_sums_over_many_programs(names, layout, shape):
    """Several programs per sample, more partial sums than a block of the last kernel holds, an odd row of tiles."""
    f, shortcut = (randn(shape, layout=layout) for _ in range(2))
    check(f, shortcut, small_inputs(f, names), "triton", key="silu")
