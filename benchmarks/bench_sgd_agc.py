"""A step of SGD with adaptive gradient clipping of all parameters of NF-ResNet-50 and NFNet-F0, on a GPU of F6 too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

import nfnets_kernels as nfk
from benchmarks import bench_agc, peers
from benchmarks.bench_agc import CLIP_FACTOR, EPS, MODELS, chosen
from benchmarks.checks import assert_all_close
from benchmarks.goals import SEPARATE, TIMM_SEPARATE
from benchmarks.harness import Comparison, Contestant, Session, passed_over

BENCH = "sgd_agc"
LEARNING_RATE, WEIGHT_DECAY, EMA_DECAY = 0.1, 5e-5, 0.9999
SGD: dict[str, Any] = {"lr": LEARNING_RATE, "momentum": 0.9, "nesterov": True, "weight_decay": WEIGHT_DECAY}
Step = Callable[[], object]


def run(session: Session) -> None:
    """Every model with all of its gradients clipped; with a moving average of the parameters and without."""
    for title, averaged in session.track(list(product(chosen(session.settings), (False, True))), BENCH):
        session.compare(comparison(session, title, averaged))


class State:
    """What a step changes, shared by all contestants, and restored before each call."""

    def __init__(self, params: list[nn.Parameter], averaged: bool) -> None:
        self.params = params
        self.momentum_buffers = [torch.randn_like(param) * 1e-3 for param in params]
        self.averages = [param.detach().clone() for param in params] if averaged else []
        self.changed = [param.detach() for param in params] + self.momentum_buffers + self.averages
        self.changed += [param.grad for param in params if param.grad is not None]
        self.originals = [tensor.clone() for tensor in self.changed]

    def restore(self) -> None:
        """Puts everything back."""
        torch._foreach_copy_(self.changed, self.originals)

    def given_to(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer, which has momentum already, and averages."""
        for i, param in enumerate(self.params):
            optimizer.state[param]["momentum_buffer"] = self.momentum_buffers[i]
            if self.averages and isinstance(optimizer, nfk.optim.SGD_AGC):
                optimizer.state[param]["ema"] = self.averages[i]
        return optimizer

    @torch.no_grad()
    def average(self) -> None:
        """Moves the averages in a pass of its own, if there are any."""
        if self.averages:
            torch._foreach_lerp_(self.averages, [param.detach() for param in self.params], 1.0 - EMA_DECAY)

    def results(self) -> list[torch.Tensor]:
        """What a step must get right: all but the gradients."""
        return self.changed[: len(self.changed) - len(self.params)]


def comparison(session: Session, title: str, averaged: bool) -> Comparison:
    """Our step in one pass beside clipping and torch's optimizer in passes of their own."""
    torch.manual_seed(session.settings.seed)
    params = bench_agc.make_params(MODELS[title], session.settings.device)
    state = State(params, averaged)
    contestants = [*ours(session, state), *separate(state)]
    contestants[-1].run()
    expected = [tensor.clone() for tensor in state.results()]

    def check(name: str, value: object) -> None:
        assert_all_close(f"{name}: parameters and states", state.results(), expected, tolerance=1e-5)

    return Comparison(
        bench=BENCH,
        case=f"{title}, all clipped{', with average' if averaged else ''}",
        contestants=contestants,
        check=check,
        setup=state.restore,
        traffic=traffic(sum(param.numel() for param in params), averaged),
    )


def traffic(count: int, averaged: bool) -> dict[str, int]:
    """Of so many parameters gradients are read; parameters, momentum and averages are read and written in place."""
    return {"read": 4 * count, "update": (24 if averaged else 16) * count}


def ours(session: Session, state: State) -> list[Contestant]:
    """`SGD_AGC` on each backend, and counting what it clips."""

    def contestant(name: str, backend: str = "auto", statistics: bool = False) -> Contestant:
        decay = EMA_DECAY if state.averages else None
        optimizer = nfk.optim.SGD_AGC(
            state.params, **SGD, clip_factor=CLIP_FACTOR, eps=EPS, ema_decay=decay, backend=backend,
            statistics=statistics,
        )  # fmt: skip
        return Contestant(name, state.given_to(optimizer).step, "ours", [BENCH], backend=backend)

    others = [contestant(f"SGD_AGC, {backend}", backend) for backend in passed_over(BENCH, session.settings)]
    return [contestant("SGD_AGC"), contestant("SGD_AGC, statistics", statistics=True), *others]


def separate(state: State) -> list[Contestant]:
    """Clipping, torch's SGD and averaging one after the other; ours, and timm's with SGD as it comes."""
    fused, default = (state.given_to(torch.optim.SGD(state.params, **SGD, fused=fused)) for fused in (True, None))
    clip = nfk.AGC(state.params, CLIP_FACTOR, EPS).clip_
    timm = partial(peers.adaptive_clip_grad, state.params, CLIP_FACTOR, EPS)
    return [
        Contestant(SEPARATE, in_turn(clip, fused.step, state.average), "ours", ["agc"]),
        Contestant("timm AGC + SGD(fused)", in_turn(timm, fused.step, state.average)),
        Contestant(TIMM_SEPARATE, in_turn(timm, default.step, state.average)),
    ]


def in_turn(*steps: Step) -> Callable[[], None]:
    """One call for several."""

    def run() -> None:
        for step in steps:
            step()

    return run
