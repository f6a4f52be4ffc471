"""The end of an NFNet's residual block, gate, skip gain, sum and the next activation, forward and backward."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.directions import BACKWARD, BOTH, DIRECTIONS, FORWARD, Function, check_against, timed
from benchmarks.harness import Comparison, Contestant, Session

BENCH = "residual"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
# The second stage of images of 224 pixels; on a GPU every tensor is more than twice as large as the L2 cache.
SHAPE, GPU_SHAPE = (16, 512, 28, 28), (192, 512, 28, 28)
ALPHA = 0.2
# gamma times a next block's beta.
SCALE = nfk.functional.gamma("gelu") * 0.9


def run(session: Session) -> None:
    """Every layout, dtype and direction; on a CPU, quickly, the layout that convolutions are fastest in."""
    settings = session.settings
    layouts = ["NHWC"] if settings.quick and not settings.on_gpu else list(LAYOUTS)
    directions = DIRECTIONS if settings.on_gpu else (BOTH,)
    for layout, dtype, direction in session.track(list(product(layouts, DTYPES, directions)), BENCH):
        session.compare(comparison(session, layout, dtype, direction))


def comparison(session: Session, layout: str, dtype_name: str, direction: str) -> Comparison:
    """All ways to end a block."""
    settings = session.settings
    torch.manual_seed(settings.seed)
    dtype = DTYPES[dtype_name]

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=settings.device).to(dtype)

    shape = GPU_SHAPE if settings.on_gpu else SHAPE
    f, shortcut, grad_h, grad_a = (randn(*shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(4))
    inputs = [f, shortcut, torch.full((), 0.5, device=settings.device, dtype=dtype), randn(*shape[:2])]
    for tensor in inputs:
        tensor.requires_grad_()

    def directed(epilogue: Callable[..., Any]) -> Function:
        return timed(direction, lambda: epilogue(*inputs), inputs, [grad_h, grad_a])

    contestants = [
        Contestant("residual", directed(ours), "ours", [BENCH]),
        Contestant("eager", directed(eager)),
    ]
    if direction != BACKWARD and (settings.on_gpu or not settings.quick):
        compiled = peers.compiled(eager, settings.compile_mode)
        contestants.append(Contestant("torch.compile of eager", directed(compiled), optional=True))
    return Comparison(
        bench=BENCH,
        case=f"{layout} {dtype_name}, {direction}",
        contestants=contestants,
        # Eager bfloat16 rounds after each of its steps, and sums what it rounded.
        check=check_against(directed(eager)(), 1e-4 if dtype == torch.float32 else 3e-2),
        traffic=traffic(f, direction),
    )


def ours(f: Tensor, shortcut: Tensor, skip_gain: Tensor, se: Tensor) -> tuple[Tensor, Tensor]:
    """The op."""
    return nfk.functional.residual(f, shortcut, skip_gain=skip_gain, se=se, alpha=ALPHA, activation="gelu", scale=SCALE)


def eager(f: Tensor, shortcut: Tensor, skip_gain: Tensor, se: Tensor) -> tuple[Tensor, Tensor]:
    """The same as users write it."""
    gated = 2.0 * torch.sigmoid(se)[:, :, None, None] * f
    h = gated * skip_gain * ALPHA + shortcut
    return h, F.gelu(h) * SCALE


def traffic(f: Tensor, direction: str) -> dict[str, int]:
    """Forward turns f and shortcut into h and a, backward both gradients into two others while it reads f and h."""
    size = f.numel() * f.itemsize
    if direction == FORWARD:
        return {"copy": 4 * size}
    return {"copy": 8 * size if direction == BOTH else 4 * size, "read": 2 * size}
