"""Weight standardization of all convolutions of NF-ResNet-50, on a GPU of NFNet-F0 too, forward and backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.directions import BACKWARD, BOTH, DIRECTIONS, FORWARD, check_against, timed
from benchmarks.harness import Comparison, Contestant, Session, passed_over

BENCH = "weight_standardize"
MODELS = {"NF-ResNet-50": "nf_resnet50", "NFNet-F0": "dm_nfnet_f0"}
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

    def together(self, dtype: torch.dtype, backend: str = "auto") -> Sequence[torch.Tensor]:
        """All in one launch."""
        return nfk.functional.weight_standardize_many(
            self.weights, self.gains, scales=self.scales, eps=self.eps, eps_form="add", dtype=dtype, backend=backend
        )

    def one_by_one(self, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """A launch for each."""
        return [
            nfk.functional.weight_standardize(weight, gain, scale=scale, eps=self.eps, eps_form="add", dtype=dtype)
            for weight, gain, scale in zip(self.weights, self.gains, self.scales, strict=True)
        ]

    def by_timm(self, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """As timm does it."""
        return [
            # The scale of timm's module holds the 1 / sqrt(fan-in) that is part of our op.
            peers.timm_weight(weight, gain, scale * weight[0].numel() ** -0.5, self.eps).to(dtype)
            for weight, gain, scale in zip(self.weights, self.gains, self.scales, strict=True)
        ]


def run(session: Session) -> None:
    """Every output format in every direction; quickly, on a CPU, not channels_last, which differs little."""
    on_gpu = session.settings.on_gpu
    titles, directions = (list(MODELS), DIRECTIONS) if on_gpu else (["NF-ResNet-50"], (FORWARD, BOTH))
    formats = [name for name in FORMATS if on_gpu or not session.settings.quick or "channels_last" not in name]
    for title, name, direction in session.track(list(product(titles, formats, directions)), BENCH):
        session.compare(comparison(session, title, name, direction))


def comparison(session: Session, title: str, name: str, direction: str) -> Comparison:
    """All ways to standardize a model's weights into one output format."""
    torch.manual_seed(session.settings.seed)
    dtype, memory_format = FORMATS[name]
    convs = make_convolutions(MODELS[title], session.settings.device, memory_format)

    grad_outputs = [torch.randn_like(weight, dtype=dtype) for weight in convs.weights]

    def directed(standardize: Standardize) -> Standardize:
        return timed(direction, standardize, convs.inputs, grad_outputs)

    together, timm_path = partial(convs.together, dtype), partial(convs.by_timm, dtype)
    ops = [BENCH]
    contestants = [
        Contestant("weight_standardize_many", directed(together), "ours", ops),
        *(
            Contestant(
                f"weight_standardize_many, {backend}",
                directed(partial(together, backend)),
                "ours",
                ops,
                backend=backend,
            )
            for backend in passed_over(BENCH, session.settings)
        ),
        Contestant("weight_standardize, one by one", directed(partial(convs.one_by_one, dtype)), "ours", ops),
        Contestant("timm weight path", directed(timm_path)),
    ]
    if direction != BACKWARD and not session.settings.quick:
        compiled = peers.compiled(timm_path, session.settings.compile_mode)
        contestants.append(Contestant("torch.compile of timm", directed(compiled), optional=True))
    return Comparison(
        bench=BENCH,
        case=f"{title}, {name}, {direction}",
        contestants=contestants,
        check=check_against(directed(timm_path)(), tolerance(dtype)),
        traffic=traffic(convs, dtype, direction),
    )


def make_convolutions(model: str, device: str, memory_format: torch.memory_format) -> Convolutions:
    """Random weights in the shapes of a model's convolutions."""
    with torch.device("meta"):
        convs = peers.create_model(model).modules()
        modules = [m for m in convs if isinstance(m, (peers.ScaledStdConv2d, peers.ScaledStdConv2dSame))]
    weights = [torch.randn(m.weight.shape, device=device).contiguous(memory_format=memory_format) for m in modules]
    gains = [torch.rand(m.gain.shape, device=device).add_(0.5) for m in modules]
    return Convolutions(
        weights=[weight.requires_grad_() for weight in weights],
        gains=[gain.requires_grad_() for gain in gains],
        scales=[m.scale * m.weight[0].numel() ** 0.5 for m in modules],
        eps=modules[0].eps,
    )


def tolerance(dtype: torch.dtype) -> float:
    """Half a unit in the last place of the output type, generously, and float32 sums over up to 4,608 weights."""
    return 1e-5 if dtype == torch.float32 else 1e-2


def traffic(convs: Convolutions, dtype: torch.dtype, direction: str) -> dict[str, int]:
    """Forward turns w into the output; backward turns w into its gradient while it reads the output's gradient."""
    count = sum(weight.numel() for weight in convs.weights)
    forward, backward = (4 + dtype.itemsize) * count, 8 * count
    if direction == FORWARD:
        return {"copy": forward}
    return {"copy": backward + (forward if direction == BOTH else 0), "read": dtype.itemsize * count}
