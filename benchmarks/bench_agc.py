"""Adaptive gradient clipping of all parameters of NF-ResNet-50 and NFNet-F0, on a GPU of NFNet-F6 too."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.checks import assert_all_close
from benchmarks.harness import Comparison, Contestant, Session, Settings, passed_over

BENCH = "agc"
MODELS = {"NF-ResNet-50": "nf_resnet50", "NFNet-F0": "dm_nfnet_f0", "NFNet-F6": "dm_nfnet_f6"}
ON_GPU_ONLY = {"NFNet-F6"}  # 440 million parameters: a second for every call of every peer on a CPU
CLIP_FACTOR, EPS = 0.01, 1e-3
BELOW = 1e-9  # the factor of gradients that stay below the threshold
LEAN = "lean eager (foreach)"
# Of how many units one is clipped; the first of every so many is.
SHARES = {"none": None, "10 %": 10, "all": 1}


def run(session: Session) -> None:
    """Every model with none, a tenth and all of its gradients clipped; then what takes minutes to compile."""
    for title, share in session.track(list(product(chosen(session.settings), SHARES)), BENCH):
        session.compare(comparison(session, title, share))
    for title in compiled_titles(session.settings):
        session.compare(with_compiled(session, title))


def chosen(settings: Settings) -> list[str]:
    """The models: quickly, on a CPU, the first alone."""
    if settings.on_gpu:
        return list(MODELS)
    return [title for title in MODELS if title not in ON_GPU_ONLY][: 1 if settings.quick else None]


def comparison(session: Session, title: str, share: str) -> Comparison:
    """All ways to clip the gradients of one model, which are restored before every call."""
    torch.manual_seed(session.settings.seed)
    params = make_params(MODELS[title], session.settings.device, SHARES[share])
    grads = [param.grad for param in params if param.grad is not None]
    originals = [grad.clone() for grad in grads]
    count = sum(param.numel() for param in params)
    clipped = sum(int(over_the_limit(grad).sum()) for grad in grads)

    peers.adaptive_clip_grad(params, CLIP_FACTOR, EPS)
    expected = [grad.clone() for grad in grads]

    def restore() -> None:
        torch._foreach_copy_(grads, originals)

    def check(name: str, value: object) -> None:
        assert_all_close(f"{name}: gradients", grads, expected, tolerance=1e-5)

    weights = [param.detach() for param in params]
    lean: Callable[[], None] = partial(peers.lean_agc_, weights, grads, CLIP_FACTOR, EPS)
    contestants = [
        Contestant("agc_", partial(nfk.agc_, params, CLIP_FACTOR, EPS), "ours", ["agc"]),
        Contestant("AGC.clip_", nfk.AGC(params, CLIP_FACTOR, EPS).clip_, "ours", ["agc"]),
        Contestant("AGC.clip_, statistics", nfk.AGC(params, CLIP_FACTOR, EPS, statistics=True).clip_, "ours", ["agc"]),
        *(
            Contestant(
                f"AGC.clip_, {backend}",
                nfk.AGC(params, CLIP_FACTOR, EPS, backend=backend).clip_,
                "ours",
                ["agc"],
                backend=backend,
            )
            for backend in passed_over("agc", session.settings)
        ),
        Contestant("timm adaptive_clip_grad", partial(peers.adaptive_clip_grad, params, CLIP_FACTOR, EPS)),
        Contestant(LEAN, lean),
    ]
    return Comparison(
        bench=BENCH,
        case=f"{title}, {share} clipped",
        contestants=contestants + ceilings(weights, grads),
        check=check,
        setup=restore,
        # The gradients are read with the weights and, where clipped, written back in place.
        traffic={"read": 4 * (2 * count - clipped), "update": 8 * clipped},
    )


def make_params(model: str, device: str, one_in: int | None = 1) -> list[torch.nn.Parameter]:
    """Random parameters of a model's shapes, with gradients all of whose units are far above or below the threshold.

    One in so many units is above it, counted through all parameters; with None none is.
    """
    with torch.device("meta"):
        shapes = [param.shape for param in peers.create_model(model).parameters()]
    params, units = [], 0
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, device=device))
        param.grad = torch.rand(shape, device=device).add_(1.0)
        count = shape[0] if len(shape) > 1 else 1  # timm takes a vector as a single unit
        numbers = torch.arange(units, units + count, device=device)
        below = torch.ones_like(numbers, dtype=torch.bool) if one_in is None else numbers % one_in > 0
        param.grad.view(count, -1)[below] *= BELOW
        params.append(param)
        units += count
    return params


def over_the_limit(grad: torch.Tensor) -> torch.Tensor:
    """Which elements of a gradient of ``make_params`` belong to units that are clipped."""
    return grad >= 1.0


def compiled_titles(settings: Settings) -> list[str]:
    """The models whose hundreds of tensors torch.compile is given, in a comparison of its own that may be cut short."""
    if settings.quick:
        return ["NF-ResNet-50"] if settings.on_gpu else []
    return [title for title in MODELS if title not in ON_GPU_ONLY]


def with_compiled(session: Session, title: str) -> Comparison:
    """The lean version under torch.compile, beside ours and itself.

    It multiplies every gradient, clipped or not, so that the case of none tells its time.
    """
    base = comparison(session, title, "none")
    ours = [contestant for contestant in base.contestants if contestant.role == "ours"]
    lean = next(contestant for contestant in base.contestants if contestant.name == LEAN)
    run = peers.compiled(lean.run, session.settings.compile_mode)
    compiled = Contestant("torch.compile of lean eager", run, optional=True)
    return replace(base, case=f"{base.case}, with torch.compile", contestants=[*ours, lean, compiled])


def ceilings(weights: list[torch.Tensor], grads: list[torch.Tensor]) -> list[Contestant]:
    """The time to merely read weights and gradients once: tensor by tensor, and as if each were one long tensor."""
    flat = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (weights, grads)]
    return [
        Contestant("read W and G once", partial(read, weights + grads), "ceiling"),
        Contestant("read W and G once, two sums", partial(read, flat), "ceiling"),
    ]


def read(tensors: list[torch.Tensor]) -> None:
    """Read every element."""
    for tensor in tensors:
        tensor.sum()
