"""What the tests of optimizers share: `agc_` before torch's SGD as the oracle, and training of twins."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import nfnets_kernels as nfk

from .agc_cases import Net, loss

# Losses are large in agc_cases, so that gradients are clipped: steps are as small as those of a real training.
LR = 0.05
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}  # of trajectories in float64


class ClippedSGD(torch.optim.SGD):
    """`agc_` with each group's clip_factor, then torch's step."""

    def __init__(
        self, params: Any, *, clip_factor: float | None = 0.01, eps: float = 1e-3, rule: str = "timm", **options: Any
    ) -> None:
        self.clip_factor, self.eps, self.rule = clip_factor, eps, rule
        defaults = {"momentum": 0.9, "weight_decay": 2e-5, "nesterov": True}
        super().__init__(params, **defaults | options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            clip_factor = group.get("clip_factor", self.clip_factor)
            if clip_factor is not None:
                nfk.agc_(group["params"], clip_factor, group.get("eps", self.eps), rule=self.rule)
        super().step()
        return value


def net(dtype: torch.dtype = torch.float64) -> Net:
    return Net().to(dtype)


def twins(
    make: Callable[[nn.Module], Optimizer], make_other: Callable[[nn.Module], Optimizer], dtype: Any = torch.float64
) -> list[tuple[nn.Module, Optimizer]]:
    """Two equal models, each with an optimizer."""
    model = net(dtype)
    other = copy.deepcopy(model)
    return [(model, make(model)), (other, make_other(other))]


def backward(model: nn.Module, optimizer: Optimizer) -> Tensor:
    optimizer.zero_grad()
    value = loss(model)
    value.backward()
    return value


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3, scheduler: Any = None) -> None:
    for _ in range(steps):
        backward(model, optimizer)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same_parameters(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    """Bit for bit without a tolerance."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    pairs = zip(model.named_parameters(), expected.parameters(), strict=True)
    for (name, p), q in pairs:
        torch.testing.assert_close(p, q, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_a_copy_goes_on_alone(duplicate: Callable[[Any], Any], model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Training the copy leaves the original, which then takes the same steps; returns the copied optimizer."""
    twin, other = duplicate((model, optimizer))
    before = values(model)
    train(twin, other)
    assert all(map(torch.equal, model.parameters(), before))
    train(model, optimizer)
    assert_same_parameters(twin, model)
    assert repr(other) == repr(optimizer)
    return other


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
