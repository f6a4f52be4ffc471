"""Scaled activations on 16M elements, on a GPU 64M, forward and backward; ReLU also with a convolution's bias."""

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.directions import BACKWARD, BOTH, DIRECTIONS, FORWARD, Function, check_against, timed
from benchmarks.harness import Comparison, Contestant, Session

BENCH = "scaled_activation"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# On a GPU every tensor is more than twice as large as the L2 cache.
SHAPE, GPU_SHAPE = (16, 64, 128, 128), (64, 64, 128, 128)
Activation = Callable[[torch.Tensor], torch.Tensor]


def run(session: Session) -> None:
    """Every activation in every dtype and direction."""
    settings = session.settings
    names = ["gelu", "relu", "silu"]
    if settings.quick:
        names = names[: 2 if settings.on_gpu else 1]
    directions = DIRECTIONS if settings.on_gpu else (BOTH,)
    for name, dtype, direction in session.track(list(product(names, DTYPES, directions)), BENCH):
        session.compare(comparison(session, name, dtype, direction))
    for dtype, direction in session.track(list(product(DTYPES, directions)), f"{BENCH}, with bias"):
        session.compare(with_bias(session, dtype, direction))


def comparison(session: Session, name: str, dtype_name: str, direction: str) -> Comparison:
    """All ways to compute one scaled activation or its gradient."""
    settings = session.settings
    torch.manual_seed(settings.seed)
    dtype = DTYPES[dtype_name]
    shape = GPU_SHAPE if settings.on_gpu else SHAPE
    x = torch.randn(shape, device=settings.device).to(dtype).requires_grad_()
    grad_output = torch.randn(shape, device=settings.device).to(dtype)
    gamma = nfk.functional.gamma(name)

    def directed(activation: Activation) -> Function:
        return timed(direction, lambda: [activation(x)], [x], [grad_output])

    def ours(x: torch.Tensor) -> torch.Tensor:
        return nfk.functional.scaled_activation(x, name)

    chain = peers.eager_chain(name, gamma)
    contestants = [
        Contestant("scaled_activation", directed(ours), "ours", [BENCH]),
        Contestant("eager f(x) * gamma", directed(chain)),
    ]
    if name != "relu":
        contestants.append(Contestant("eager f(x).mul_(gamma)", directed(peers.eager_chain_in_place(name, gamma))))
    if direction != BACKWARD:
        compiled = peers.compiled(chain, settings.compile_mode)
        contestants.append(Contestant("torch.compile of eager", directed(compiled), optional=True))
    return Comparison(
        bench=BENCH,
        case=f"{name} {dtype_name}, {direction}",
        contestants=contestants,
        # The eager chain rounds to bfloat16 after each of its two steps.
        check=check_against(directed(chain)(), 1e-5 if dtype == torch.float32 else 1e-2),
        traffic=traffic(x, direction),
    )


def with_bias(session: Session, dtype_name: str, direction: str) -> Comparison:
    """What follows a convolution inside a block, in the layout of these: its bias and ReLU, and their gradients."""
    settings = session.settings
    torch.manual_seed(settings.seed)
    dtype = DTYPES[dtype_name]
    shape = GPU_SHAPE if settings.on_gpu else SHAPE
    x, grad_output = (
        torch.randn(shape, device=settings.device).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    inputs = [x.requires_grad_(), torch.randn(shape[1], device=settings.device).to(dtype).requires_grad_()]

    def directed(epilogue: Callable[..., torch.Tensor]) -> Function:
        return timed(direction, lambda: [epilogue(*inputs)], inputs, [grad_output])

    def ours(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return nfk.functional.scaled_activation(x, "relu", gamma=1.0, bias=bias)

    def eager(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.relu_(x + bias[:, None, None])

    contestants = [
        Contestant("scaled_activation", directed(ours), "ours", ["residual"]),
        Contestant("eager relu_(x + bias)", directed(eager)),
    ]
    if direction != BACKWARD and (settings.on_gpu or not settings.quick):
        compiled = peers.compiled(eager, settings.compile_mode)
        contestants.append(Contestant("torch.compile of eager", directed(compiled), optional=True))
    return Comparison(
        bench=BENCH,
        case=f"relu with bias, NHWC {dtype_name}, {direction}",
        contestants=contestants,
        # Eager bfloat16 rounds before the activation too, and sums what it rounded.
        check=check_against(directed(eager)(), 1e-4 if dtype == torch.float32 else 3e-2),
        traffic=traffic(x, direction),
    )


def traffic(x: torch.Tensor, direction: str) -> dict[str, int]:
    """Forward turns x into the output, backward x into its gradient while it reads the output's gradient."""
    size = x.numel() * x.itemsize
    if direction == FORWARD:
        return {"copy": 2 * size}
    return {"copy": 4 * size if direction == BOTH else 2 * size, "read": size}
