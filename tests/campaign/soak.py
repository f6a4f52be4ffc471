"""10,000 training steps under changing conditions: what must not grow does not, and steps stay what they should be."""

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

import nfnets_kernels as nfk
from nfnets_kernels import backend, ops
from nfnets_kernels.models import NFResNet
from nfnets_kernels.optim import AGC, SGD_AGC, param_groups

from ..tolerances import assert_accurate

STEPS = 10_000
CHECKS = 10
# Of the process from the second check on; until then caches fill, above all oneDNN's of 1,024 compiled primitives. A
# network's gradients, kept at one step in a hundred, would be 200 MB.
RESIDENT_GROWTH = 32e6
SGD = {"momentum": 0.9, "nesterov": True}


class AGCBefore(torch.optim.SGD):
    """`agc_` before torch's step, as a training loop calls it."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if group["clip_factor"] is not None:
                nfk.agc_(group["params"], group["clip_factor"])
        super().step()


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD_AGC": lambda groups: SGD_AGC(groups, 0.02, ema_decay=0.999, statistics=True, **SGD),
    "AGC(SGD)": lambda groups: AGC(torch.optim.SGD(groups, 0.02, **SGD), statistics=True),
    "agc_": lambda groups: AGCBefore(groups, 0.02, **SGD),
}


class Trainee(NamedTuple):
    """A network of every kind of layer, and what trains it."""

    model: NFResNet
    optimizer: Optimizer

    @classmethod
    def with_optimizer(cls, name: str) -> "Trainee":
        torch.manual_seed(0)
        model = NFResNet(
            (1, 1, 1, 1), 1, num_classes=10, in_chans=1, shortcut="avg_pool", use_se=True, activation="gelu",
            stochdepth_rate=0.1,
        )  # fmt: skip
        return cls(model, OPTIMIZERS[name](param_groups(model, 5e-4)))

    def backward(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        """A pass under the conditions of this step: batch size, precision, layouts, and who has a gradient."""
        chance = random.Random(step)
        start, size = chance.randrange(len(images) - 16), chance.choice((1, 2, 3, 5, 8, 16))
        x, y = images[start : start + size], labels[start : start + size]
        if chance.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        if step % 500 < len(OPTIMIZERS):
            self.model.to(memory_format=chance.choice((torch.channels_last, torch.contiguous_format)))
        self.optimizer.zero_grad(set_to_none=chance.random() < 0.9)
        with torch.autocast("cpu", torch.bfloat16, enabled=chance.random() < 0.25):
            loss = F.cross_entropy(self.model(x).float(), y)
        loss.backward()
        if chance.random() < 0.1:
            chance.choice(list(self.model.parameters())).grad = None
        return loss.detach()


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8x8 images at 24x24.

    At 16x16 the last stage would see one pixel, and torch 2.13 leaves garbage in the bfloat16 weight gradient of a
    3x3 convolution with stride 2 there, on CPUs with AVX-512.
    """
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16 - 0.3
    return F.interpolate(images, scale_factor=3.0), torch.tensor(found.target)


def plain_step(trainee: Trainee) -> list[tuple[Tensor, Tensor]]:
    """(weight, sizes of what was added up in it) after timm's clipping and torch's SGD in float64, on copies."""
    after = []
    for group in trainee.optimizer.param_groups:
        for p in group["params"]:
            copied = nn.Parameter(p.detach().double())
            plain = torch.optim.SGD([copied], group["lr"], weight_decay=group["weight_decay"], **SGD)
            moving = trainee.optimizer.state[p].get("momentum_buffer")
            size = copied.detach().abs()
            if p.grad is not None:
                copied.grad = p.grad.double()
                if moving is not None:
                    plain.state[copied]["momentum_buffer"] = moving.double()
                if group["clip_factor"] is not None:
                    adaptive_clip_grad([copied], group["clip_factor"])
                terms = copied.grad.abs() if moving is None else copied.grad.abs() + moving.double().abs()
                size = size + 3 * group["lr"] * terms
                plain.step()
            after.append((copied.detach(), size))
    return after


def assert_steps(trainee: Trainee, expected: list[tuple[Tensor, Tensor]]) -> None:
    """A step gives the expected, up to roundings: of the gradient, and of the six terms of torch's step."""
    trainee.optimizer.step()
    parameters = [p for group in trainee.optimizer.param_groups for p in group["params"]]
    for p, (weight, size) in zip(parameters, expected, strict=True):
        assert_accurate(p, weight, unit_length=p.numel(), ulps=7.0, magnitude=size)


def assert_finite(trainee: Trainee) -> None:
    states = [x for state in trainee.optimizer.state.values() for x in state.values()]
    for x in [*trainee.model.parameters(), *states]:
        assert not isinstance(x, Tensor) or x.isfinite().all(), "a parameter or a state is not finite"


def resident_bytes() -> int:
    """Memory of this process, as Linux counts it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def held() -> dict[str, int]:
    """What is alive: must be the same whenever training is at rest."""
    gc.collect()
    objects = gc.get_objects()
    return {
        "tensors": sum(issubclass(type(x), Tensor) for x in objects),
        "modules": sum(issubclass(type(x), nn.Module) for x in objects),
        "recent agc_ calls": len(ops.agc._recent),
        "recordings": len(backend._recorders),
        "backends chosen": backend.serving.cache_info().currsize,
    }


class Check(NamedTuple):
    """After so many steps."""

    step: int
    loss: float
    """mean since the last check"""
    resident: int
    """bytes"""
    held: dict[str, int]


def soak(steps: int = STEPS, seed: int = 0) -> Iterator[Check | None]:
    """Trains, one step of one network at a time, and yields a `Check` after every tenth of the steps, else None."""
    images, labels = digits()
    trainees = [Trainee.with_optimizer(name) for name in OPTIMIZERS]
    losses = []
    for step in range(steps):
        trainee = trainees[step % len(trainees)]
        loss = trainee.backward(step + seed, images, labels)
        losses.append(float(loss))
        trainee.optimizer.step()
        if (step + 1) % (steps // CHECKS):
            yield None
            continue
        for of_check in trainees:
            of_check.backward(step + seed, images, labels)
            assert_steps(of_check, plain_step(of_check))
            assert_finite(of_check)
            of_check.optimizer.zero_grad()
        yield Check(step + 1, round(sum(losses) / len(losses), 4), resident_bytes(), held())
        losses = []


def assert_flat(checks: list[Check]) -> None:
    """Nothing has grown since the first check, memory not since the second, and the networks have learned."""
    first, second, *_, last = checks
    for check in checks:
        assert check.held == first.held, f"after {check.step} steps {check.held}, after {first.step} {first.held}"
    growth = last.resident - second.resident
    assert growth < RESIDENT_GROWTH, f"{growth / 1e6:.1f} MB more after {last.step} than after {second.step} steps"
    assert last.loss < first.loss, f"the loss went from {first.loss} to {last.loss}"
