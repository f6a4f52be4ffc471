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
LEAN = "lean eager (foreach)"


def run(session: Session) -> None:
    """Every model with none and with all of its gradients clipped; then what takes minutes to compile."""
    for title, clipped in session.track(list(product(chosen(session.settings), (False, True))), BENCH):
        session.compare(comparison(session, title, clipped))
    for title in compiled_titles(session.settings):
        session.compare(with_compiled(session, title))


def chosen(settings: Settings) -> list[str]:
    """The models: quickly, on a CPU, the first alone."""
    if settings.on_gpu:
        return list(MODELS)
    return [title for title in MODELS if title not in ON_GPU_ONLY][: 1 if settings.quick else None]


def comparison(session: Session, title: str, clipped: bool) -> Comparison:
    """All ways to clip the gradients of one model, which are restored before every call."""
    torch.manual_seed(session.settings.seed)
    params = make_params(MODELS[title], session.settings.device, clipped)
    grads = [param.grad for param in params if param.grad is not None]
    originals = [grad.clone() for grad in grads]
    count = sum(param.numel() for param in params)

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
        case=f"{title}, {'all' if clipped else 'none'} clipped",
        contestants=contestants + ceilings(weights, grads),
        check=check,
        setup=restore,
        # The gradients are read with the weights and, where clipped, written back in place.
        traffic={"read": 4 * count, "update": 8 * count} if clipped else {"read": 8 * count},
    )


def make_params(model: str, device: str, clipped: bool) -> list[torch.nn.Parameter]:
    """Random parameters of a model's shapes, with gradients all of whose units are far above or below the threshold."""
    with torch.device("meta"):
        shapes = [param.shape for param in peers.create_model(model).parameters()]
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, device=device))
        param.grad = torch.rand(shape, device=device).add_(1.0).mul_(1.0 if clipped else 1e-9)
        params.append(param)
    return params


def compiled_titles(settings: Settings) -> list[str]:
    """The models whose hundreds of tensors torch.compile is given, in a comparison of its own that may be cut short."""
    if settings.quick:
        return ["NF-ResNet-50"] if settings.on_gpu else []
    return [title for title in MODELS if title not in ON_GPU_ONLY]


def with_compiled(session: Session, title: str) -> Comparison:
    """The lean version under torch.compile, beside ours and itself.

    It multiplies every gradient, clipped or not, so that the case of none tells its time.
    """
    base = comparison(session, title, clipped=False)
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
