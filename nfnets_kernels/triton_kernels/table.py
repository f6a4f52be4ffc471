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

from .launch import ACCESS_BYTES, TRITON_DTYPES

# Elements of a tile: with 4 warps a thread holds 32 of each tensor, and the tail's 4. With addresses and masks some 128
# registers, so that 4 blocks share a multiprocessor and have up to 140 KB in flight; 25 KB hide an H200's latency.
TILE = tl.constexpr(4096)
_SHORTEST_BLOCK = 16

# The columns of a row of the table; an op's own follow.
VARIANT, COUNT, LENGTH, FIRST_PROGRAM = (tl.constexpr(i) for i in range(4))

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
    permuted: bool = False
    """whether the two tensors order the elements of a unit differently"""

    @property
    def tile(self) -> int:
        """Elements of a tile: half of them where a value, or the address of every value, takes registers twice."""
        wide = tl.float64 in (self.first, self.second)
        return TILE.value // 2 if wide or not self.aligned else TILE.value


def variant_of(
    length: int, count: int, first: torch.dtype, second: torch.dtype, aligned: bool, permuted: bool = False
) -> Variant:
    """The variant of `count` units of a length; aligned: whether the tensors start at multiples of 16 bytes."""
    run = count if length == 1 else length
    elements = ACCESS_BYTES // min(first.itemsize, second.itemsize)
    multiple = elements if aligned and run % elements == 0 else 0
    variant = Variant(1, TRITON_DTYPES[first], TRITON_DTYPES[second], multiple, permuted)
    if length == 1:
        return variant
    block = max(_SHORTEST_BLOCK, triton.next_power_of_2(triton.cdiv(8 * length, 9)))
    return variant._replace(block=block if block <= variant.tile else 0)


class Table:
    """`pointers` (tensors, pointers each), `rows` (tensors, columns) and `owners` (programs), int64 on the device.

    Args:
        rows: a row per tensor, `FIRST_PROGRAM` still missing.
        programs: programs of each tensor.
        pointer_count: pointers of each tensor.
        variants: what the VARIANT column counts.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        programs: Sequence[int],
        pointer_count: int,
        variants: tuple[Variant, ...],
        device: torch.device,
    ) -> None:
        self.variants = variants
        self.programs = sum(programs)
        firsts = np.cumsum(programs) - programs
        table = np.insert(np.array(rows, dtype=np.int64), FIRST_PROGRAM.value, firsts, axis=1)
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
def pointer(pointers, i, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The i-th pointer of a table; where ALIGNED, known to be a multiple of 16 bytes, as vector accesses need."""
    address = tl.load(pointers + i).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def columns_of_tile(length, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Length, and the indices of block and tail in a unit, (1, BLOCK) and (1, BLOCK / 8)."""
    n = length.to(tl.int32)
    n = tl.multiple_of(n, ALIGNED) if ALIGNED else n
    return n, tl.arange(0, BLOCK)[None, :], BLOCK + tl.arange(0, BLOCK // 8)[None, :]
