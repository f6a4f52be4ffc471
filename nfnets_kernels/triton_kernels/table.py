"""The table of a launch over many tensors: where a program finds its tile of units, and how that reaches the device.

A tile holds whole units, one per row. Tensors of one `Variant` share the code that is compiled for it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ACCESS_BYTES, TRITON_DTYPES, ceil_div, launch

# Elements of a tile: with 4 warps a thread holds 32 of each tensor, and the tail's 4. With addresses and masks some 128
# registers, so that 4 blocks share a multiprocessor and have up to 140 KB in flight; 25 KB hide an H200's latency.
TILE = tl.constexpr(4096)
_SHORTEST_BLOCK = 16
# Single elements of a tile: 4 per thread, for computing in float64.
_SINGLES = 512
# Elements that a program of a unit longer than a tile reads at a time.
STEP = tl.constexpr(1024)

# The columns of a row of the table; an op's own follow.
VARIANT, FIRST_PROGRAM, COUNT, LENGTH = (tl.constexpr(i) for i in range(4))

# Host memory for copies recorded in CUDA graphs: page-locking memory during a capture is an error on older torch.
_RESERVE_WORDS = 1 << 17


class Variant(NamedTuple):
    """What the code for a tensor's units is compiled for."""

    block: int
    """units of up to 9/8 of it, as a 3x3 kernel over 2^k channels has; 1: single elements; 0: longer than a tile"""
    first: Any
    """dtype of the weight"""
    second: Any
    """dtype of the gradient or output"""
    aligned: int
    """elements in 16 bytes, which units are multiples of and all tensors start at; 0 where one does not"""
    units: int
    """units of a tile; 1 where no tile holds one"""
    permuted: bool
    """whether the two tensors order the elements of a unit differently"""


def variant_of(
    length: int, count: int, first: torch.dtype, second: torch.dtype, aligned: bool, permuted: bool = False
) -> Variant:
    """The variant of `count` units of a length; aligned: whether the tensors start at multiples of 16 bytes."""
    run = count if length == 1 else length
    elements = ACCESS_BYTES // min(first.itemsize, second.itemsize)
    multiple = elements if aligned and run % elements == 0 else 0
    block, units = _tiling(length, wide=torch.float64 in (first, second) or not multiple)
    return Variant(block, TRITON_DTYPES[first], TRITON_DTYPES[second], multiple, units, permuted)


def _tiling(length: int, wide: bool) -> tuple[int, int]:
    """Block and units of a tile; wide: a value, or the address of every value, takes registers twice."""
    if length == 1:
        return 1, _SINGLES
    tile = TILE.value // 2 if wide else TILE.value
    block = max(_SHORTEST_BLOCK, triton.next_power_of_2(ceil_div(8 * length, 9)))
    return (block, tile // block) if block <= tile else (0, 1)


def is_aligned(*addresses: int) -> bool:
    """Whether all are multiples of 16 bytes; 0, for no tensor, is one."""
    return not any(address % ACCESS_BYTES for address in addresses)


class Table:
    """`pointers` (tensors, pointers each), `rows` (tensors, columns) and `owners` (programs), int64 on the device.

    Args:
        of_tensor: the variant of each tensor.
        rows: the other columns of each tensor, COUNT, LENGTH and the op's own.
        programs: programs of each tensor.
        pointer_count: pointers of each tensor.
        device: where the tensors lie.
    """

    def __init__(
        self,
        of_tensor: Sequence[Variant],
        rows: Sequence[Sequence[int]],
        programs: Sequence[int],
        pointer_count: int,
        device: torch.device,
    ) -> None:
        self.variants = tuple(sorted(set(of_tensor), key=str))
        self.programs = sum(programs)
        indices = [self.variants.index(variant) for variant in of_tensor]
        table = np.column_stack([indices, np.cumsum(programs) - programs, np.array(rows, dtype=np.int64)])
        owners = np.repeat(np.arange(len(rows)), programs)
        sections = [np.zeros(len(rows) * pointer_count, np.int64), table.ravel(), owners]
        # Sections start at multiples of 16 bytes: a kernel is compiled once more for pointers that do not.
        padded = [np.pad(section, (0, len(section) % 2)) for section in sections]
        self._host = np.concatenate(padded)
        with torch.inference_mode(False):  # a table made in inference mode is also written outside of it
            memory = torch.empty(len(self._host), dtype=torch.int64, device=device)
            self.pointers, self.rows, self.owners = memory.split([len(section) for section in padded])
        self._memory = memory
        self._pointers: list[int] = []

    def update(self, pointers: list[int]) -> None:
        """Writes the tensors' pointers to the device in stream order, where one has changed since the last call."""
        if pointers == self._pointers:
            return
        changed = self._memory if not self._pointers else self.pointers
        self._host[: len(pointers)] = pointers
        changed.copy_(page_locked(self._host[: changed.numel()], changed.device), non_blocking=True)
        self._pointers = pointers

    def launch(self, kernel: Any, pointers: list[int], **arguments: Any) -> None:
        """Runs a kernel of tables on tensors at these addresses, a program for each of `owners`."""
        self.update(pointers)
        launch(
            kernel,
            self.programs,
            self.pointers.device,
            pointers=self.pointers,
            rows=self.rows,
            owners=self.owners,
            VARIANTS=self.variants,
            **arguments,
        )


_reserve: list[Tensor] = []
_captured: list[Any] = []


def capturing(device: torch.device) -> bool:
    """Whether the device's current stream records a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def page_locked(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy of values from which the device copies asynchronously: for ever, where a CUDA graph is being captured."""
    if device.type != "cuda":
        return torch.from_numpy(values)
    if not capturing(device):
        if not _reserve:
            _reserve.append(torch.empty(_RESERVE_WORDS, dtype=torch.int64, device="cpu", pin_memory=True))
        return torch.from_numpy(values).pin_memory()
    if _reserve and len(_reserve[0]) >= len(values):
        host, _reserve[0] = _reserve[0][: len(values)], _reserve[0][len(values) :]
    else:
        host = torch.empty(len(values), dtype=torch.int64, device="cpu", pin_memory=True)
    _captured.append(host)
    return host.copy_(torch.from_numpy(values))


@functools.lru_cache(maxsize=64)
def _cached(build: Callable[[Any, torch.device], Any], structure: Any, device: torch.device, stream: int) -> Any:
    return build(structure, device)


def table_for(build: Callable[[Any, torch.device], Any], structure: Any, device: torch.device) -> Any:
    """`build(structure, device)`, kept for later calls on the same stream, which runs copies and kernels in order.

    A CUDA graph gets a table of its own: replaying it must not depend on what other calls wrote since its capture.
    """
    if capturing(device):
        table = build(structure, device)
        _captured.append(table)
        return table
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _cached(build, structure, device, stream)


@triton.jit
def row_of_program(rows, owners, COLUMNS: tl.constexpr):
    """What a program works on: the tensor, its row of the table, its variant, and which of its programs this is."""
    program = tl.program_id(0)
    tensor = tl.load(owners + program)
    row = rows + tensor * COLUMNS
    return tensor, row, tl.load(row + VARIANT), program - tl.load(row + FIRST_PROGRAM)


@triton.jit
def pointer(pointers, i, at, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The i-th pointer of a table, plus `at`; ALIGNED tells the compiler that it is a multiple of 16 bytes."""
    address = tl.load(pointers + i).to(tl.pointer_type(DTYPE)) + at
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def columns_of_tile(length, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Length, and the indices of block and tail in a unit, (1, BLOCK) and (1, BLOCK / 8)."""
    n = length.to(tl.int32)
    n = tl.multiple_of(n, ALIGNED) if ALIGNED else n
    return n, tl.arange(0, BLOCK)[None, :], BLOCK + tl.arange(0, BLOCK // 8)[None, :]


@triton.jit
def elements_of_tile(length, units, BLOCK: tl.constexpr, UNITS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the blocks and the tails of up to UNITS units lie that follow each other, each with its mask."""
    n, columns, tail_columns = columns_of_tile(length, BLOCK, ALIGNED)
    rows = tl.arange(0, UNITS)[:, None]
    there = rows < units
    return rows * n + columns, there & (columns < n), rows * n + tail_columns, there & (tail_columns < n)
