"""Scaled activations on 16M elements, forward and backward."""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.harness import BenchmarkError, Comparison, Contestant, Session, assert_all_close

BENCH = "scaled_activation"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPE = (16, 64, 128, 128)
Activation = Callable[[torch.Tensor], torch.Tensor]


def run(session: Session) -> None:
    """Every activation in every dtype."""
    names = ("gelu", "relu") if session.settings.quick else ("gelu", "relu", "silu")
    for name, dtype in session.track(list(product(names, DTYPES)), BENCH):
        session.compare(comparison(session, name, dtype))


def comparison(session: Session, name: str, dtype_name: str) -> Comparison:
    """All ways to compute one scaled activation and its gradient."""
    torch.manual_seed(session.settings.seed)
    dtype = DTYPES[dtype_name]
    x = torch.randn(SHAPE, device=session.settings.device).to(dtype).requires_grad_()
    grad_output = torch.randn(SHAPE, device=session.settings.device).to(dtype)
    gamma = nfk.functional.gamma(name)

    def timed(activation: Activation) -> Callable[[], tuple[torch.Tensor, ...]]:
        def forward_backward() -> tuple[torch.Tensor, ...]:
            out = activation(x)
            return (out.detach(), *torch.autograd.grad(out, x, grad_output))

        return forward_backward

    chain = peers.eager_chain(name, gamma)
    reference = timed(chain)()
    # The eager chain rounds to bfloat16 after each of its two steps.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2

    def check(contestant: str, value: object) -> None:
        if not isinstance(value, tuple):
            raise BenchmarkError(f"{contestant}: returned {type(value).__name__} instead of tensors")
        assert_all_close(contestant, value, reference, tolerance)

    ours = partial(nfk.functional.scaled_activation, name=name)
    contestants = [
        Contestant("scaled_activation", timed(ours), "ours", [BENCH]),
        Contestant("eager f(x) * gamma", timed(chain)),
    ]
    if name != "relu":
        contestants.append(Contestant("eager f(x).mul_(gamma)", timed(peers.eager_chain_in_place(name, gamma))))
    contestants.append(Contestant("torch.compile of eager", timed(peers.compiled(chain)), optional=True))
    return Comparison(
        bench=BENCH,
        case=f"{name} {dtype_name}, forward + backward",
        contestants=contestants,
        check=check,
        # Forward turns x into the output, backward x into its gradient while it reads the output's gradient.
        traffic={"copy": 4 * x.numel() * dtype.itemsize, "read": x.numel() * dtype.itemsize},
    )
