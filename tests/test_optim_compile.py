"""Whole training steps under torch.compile: `SGD_AGC`, `AGC.clip_` before SGD, and `AGC(optimizer)`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfnets_kernels.optim import AGC, SGD_AGC, param_groups

from .agc_cases import loss
from .module_helpers import on_one_thread
from .optimizer_cases import LR, ClippedSGD, assert_same_parameters, backward, net, train
from .tolerances import relative_bound

one_thread = pytest.fixture(on_one_thread, autouse=True)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def assert_compiled_steps_are_eager(
    make: Callable[[nn.Module], Optimizer],
    compiler: str,
    *,
    fullgraph: bool = True,
    statistics: bool = False,
    bound: float = 0.0,
) -> None:
    """Bit for bit or within a relative bound, states and statistics too; lr changes."""
    model = net(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, eager = make(model), make(twin)
    compiled = torch.compile(optimizer.step, backend=compiler, fullgraph=fullgraph)
    for lr in (LR, LR, LR / 4):
        set_lr(optimizer, lr)
        set_lr(eager, lr)
        backward(model, optimizer)
        compiled()
        train(twin, eager, 1)
    assert_same_parameters(model, twin, rtol=bound, atol=bound)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[p].keys() == eager.state[q].keys()
        for key, state in optimizer.state[p].items():
            expected = torch.as_tensor(eager.state[q][key])
            torch.testing.assert_close(torch.as_tensor(state), expected, rtol=bound, atol=bound, msg=key)
    if statistics:
        assert repr(optimizer.stats()) == repr(eager.stats())
        assert optimizer.stats()[0].steps == 3


OPTIONS = [
    {},
    {"lr": torch.tensor(LR)},
    {"capturable": True},
    {"ema_decay": 0.9, "statistics": True},
    {"nesterov": False, "momentum": 0.0, "maximize": True, "clip_factor": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "default")
def test_a_compiled_step_is_the_eager_one(options):
    def make(model: nn.Module) -> SGD_AGC:
        return SGD_AGC(param_groups(model), **{"lr": LR, **copy.deepcopy(options)})

    assert_compiled_steps_are_eager(make, "aot_eager", statistics="statistics" in options)


def test_inductor_takes_the_step():
    assert_compiled_steps_are_eager(lambda model: SGD_AGC(param_groups(model), LR), "inductor")


def test_compiled_and_eager_steps_mix():
    model = net()
    twin = copy.deepcopy(model)
    optimizer, eager = SGD_AGC(model.parameters(), LR), SGD_AGC(twin.parameters(), LR)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in (optimizer.step, optimizer.step, compiled, compiled, optimizer.step, compiled):
        backward(model, optimizer)
        step()
        train(twin, eager, 1)
    assert_same_parameters(model, twin)


def test_dampening_is_not_compiled_away():
    """A first step ignores it: where the graph may break, the step is eager."""
    model = net()
    twin = copy.deepcopy(model)
    optimizer, eager = (SGD_AGC(each.parameters(), LR, nesterov=False, dampening=0.1) for each in (model, twin))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        backward(model, optimizer)
        step()
        train(twin, eager, 1)
    assert_same_parameters(model, twin)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"dampening must be 0 under torch.compile, got 0.1"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def clipping_then_sgd(model: nn.Module) -> tuple[Optimizer, Callable[[], Any]]:
    agc = AGC(model)
    sgd = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=2e-5, nesterov=True)

    def step() -> None:
        agc.clip_()
        sgd.step()

    return sgd, step


def one_optimizer(make: Callable[[nn.Module], Optimizer]) -> Callable[[nn.Module], tuple[Optimizer, Callable[[], Any]]]:
    def made(model: nn.Module) -> tuple[Optimizer, Callable[[], Any]]:
        optimizer = make(model)
        return optimizer, optimizer.step

    return made


LOOPS = {
    "SGD_AGC": one_optimizer(lambda model: SGD_AGC(model.parameters(), LR)),
    "AGC.clip_": clipping_then_sgd,
    "AGC(optimizer)": one_optimizer(
        lambda model: AGC(torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=2e-5, nesterov=True))
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_whole_step_is_compiled(loop):
    """Forward, backward (where torch breaks the graph), clipping and step in one function."""
    model = net(torch.float64)
    twin = copy.deepcopy(model)
    optimizer, step = LOOPS[loop](model)
    oracle = ClippedSGD(twin.parameters(), lr=LR)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = 100 * nn.functional.cross_entropy(model(x), y)
        value.backward()
        step()
        return value.detach()

    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    compiled = torch.compile(train_step, backend="eager")
    for lr in (LR, LR, LR / 4):
        set_lr(optimizer, lr)
        set_lr(oracle, lr)
        expected = loss(twin)
        torch.testing.assert_close(compiled(x, torch.arange(4)).float(), expected.detach(), rtol=1e-5, atol=1e-5)
        train(twin, oracle, 1)
    assert_same_parameters(model, twin, rtol=1e-9, atol=1e-9)


def test_an_agc_around_an_optimizer_is_compiled():
    """Torch's optimizers break the graph before their own step when others call it."""

    def make(model: nn.Module) -> Optimizer:
        return AGC(torch.optim.SGD(param_groups(model), LR, momentum=0.9), statistics=True)

    # Compiled beside torch 2.11, torch's own SGD rounds its products in another place, once in each of the three steps.
    bound = relative_bound(torch.float32, ulps=3.0)
    assert_compiled_steps_are_eager(make, "aot_eager", fullgraph=False, statistics=True, bound=bound)
