"""Weight standardization of all convolutions of NF-ResNet-50, forward and backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.harness import BenchmarkError, Comparison, Contestant, Session, assert_all_close

BENCH = "weight_standardize"
FORMATS = {
    "float32": (torch.float32, torch.contiguous_format),
    "float32 channels_last": (torch.float32, torch.channels_last),
    "float32 to bfloat16": (torch.bfloat16, torch.contiguous_format),
}
Standardize = Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Convolutions:
    """Weights and gains of a model's convolutions, with the constants timm uses for them."""

    weights: list[torch.Tensor]
    gains: list[torch.Tensor]
    scales: list[float]
    eps: float

    @property
    def inputs(self) -> list[torch.Tensor]:
        """Everything with a gradient."""
        return self.weights + self.gains


def run(session: Session) -> None:
    """Every output format, forward alone and with backward."""
    for name, backward in session.track(list(product(FORMATS, (False, True))), BENCH):
        session.compare(comparison(session, name, backward))


def comparison(session: Session, name: str, backward: bool) -> Comparison:
    """All ways to standardize the weights into one output format."""
    torch.manual_seed(session.settings.seed)
    dtype, memory_format = FORMATS[name]
    convs = make_convolutions(session.settings.device, memory_format)

    def together() -> Sequence[torch.Tensor]:
        return nfk.functional.weight_standardize_many(
            convs.weights, convs.gains, scales=convs.scales, eps=convs.eps, eps_form="add", dtype=dtype
        )

    def one_by_one() -> Sequence[torch.Tensor]:
        return [
            nfk.functional.weight_standardize(weight, gain, scale=scale, eps=convs.eps, eps_form="add", dtype=dtype)
            for weight, gain, scale in zip(convs.weights, convs.gains, convs.scales, strict=True)
        ]

    def timm_path() -> Sequence[torch.Tensor]:
        return [
            # The scale of timm's module holds the 1 / sqrt(fan-in) that is part of our op.
            peers.timm_weight(weight, gain, scale * weight[0].numel() ** -0.5, convs.eps).to(dtype)
            for weight, gain, scale in zip(convs.weights, convs.gains, convs.scales, strict=True)
        ]

    expected = timm_path()
    grad_outputs = [torch.randn_like(out) for out in expected]
    timed = forward_backward(convs, grad_outputs) if backward else without_grad
    reference = timed(timm_path)()
    # Half a unit in the last place of the output type, generously, and float32 sums over up to 4,608 weights.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2

    def check(contestant: str, value: object) -> None:
        if not isinstance(value, (list, tuple)):
            raise BenchmarkError(f"{contestant}: returned {type(value).__name__} instead of tensors")
        assert_all_close(contestant, value, reference, tolerance)

    ops = [BENCH]
    contestants = [
        Contestant("weight_standardize_many", timed(together), "ours", ops),
        Contestant("weight_standardize, one by one", timed(one_by_one), "ours", ops),
        Contestant("timm weight path", timed(timm_path)),
    ]
    if not session.settings.quick:
        contestants.append(Contestant("torch.compile of timm", timed(peers.compiled(timm_path)), optional=True))
    return Comparison(
        bench=BENCH,
        case=f"{name}, forward{' + backward' if backward else ''}",
        contestants=contestants,
        check=check,
        traffic=traffic(convs, dtype, backward),
    )


def make_convolutions(device: str, memory_format: torch.memory_format) -> Convolutions:
    """Random weights in the shapes of the 53 convolutions."""
    with torch.device("meta"):
        modules = [m for m in peers.create_model("nf_resnet50").modules() if isinstance(m, peers.ScaledStdConv2d)]
    weights = [torch.randn(m.weight.shape, device=device).contiguous(memory_format=memory_format) for m in modules]
    gains = [torch.rand(m.gain.shape, device=device).add_(0.5) for m in modules]
    return Convolutions(
        weights=[weight.requires_grad_() for weight in weights],
        gains=[gain.requires_grad_() for gain in gains],
        scales=[m.scale * m.weight[0].numel() ** 0.5 for m in modules],
        eps=modules[0].eps,
    )


def without_grad(standardize: Standardize) -> Standardize:
    """The forward pass alone."""
    return torch.no_grad()(standardize)


def forward_backward(convs: Convolutions, grad_outputs: Sequence[torch.Tensor]) -> Callable[[Standardize], Standardize]:
    """The forward pass, then the gradients of weights and gains.

    The output's gradient lies in memory as the output does, which is how a convolution returns it.
    """

    def timed(standardize: Standardize) -> Standardize:
        pairs = zip(without_grad(standardize)(), grad_outputs, strict=True)
        grads = [torch.empty_like(out).copy_(grad) for out, grad in pairs]
        return lambda: torch.autograd.grad(standardize(), convs.inputs, grads)

    return timed


def traffic(convs: Convolutions, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Forward turns w into the output; backward turns w into its gradient while it reads the output's gradient."""
    count = sum(weight.numel() for weight in convs.weights)
    forward = {"copy": (4 + dtype.itemsize) * count}
    return {"copy": forward["copy"] + 8 * count, "read": dtype.itemsize * count} if backward else forward
