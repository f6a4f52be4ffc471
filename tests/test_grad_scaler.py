"""Loss scaling: gradients are unscaled before they are clipped, and steps with infinities are skipped on the device."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import nfnets_kernels as nfk
from nfnets_kernels.optim import AGC, SGD_AGC, param_groups

from .agc_cases import gradients, loss, parameter
from .module_helpers import on_one_thread
from .optimizer_cases import LR, ClippedSGD, assert_same_parameters, backward, net, train, twins, values

one_thread = pytest.fixture(on_one_thread, autouse=True)

SCALE = 2.0**16


def scaler(**options: Any) -> GradScaler:
    """Of a scale that grows with every step."""
    return GradScaler("cpu", **{"init_scale": SCALE, "growth_interval": 1, **options})


def scaled_backward(model: nn.Module, optimizer: Optimizer, amp: GradScaler) -> None:
    optimizer.zero_grad()
    amp.scale(loss(model)).backward()


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD_AGC": lambda params: SGD_AGC(params, LR),
    "AGC(SGD)": lambda params: AGC(torch.optim.SGD(params, LR, momentum=0.9)),
    "AGC(SGD foreach)": lambda params: AGC(torch.optim.SGD(params, LR, momentum=0.9, foreach=True)),
    "AGC(SGD fused)": lambda params: AGC(torch.optim.SGD(params, LR, momentum=0.9, fused=True)),
    "AGC(AdamW)": lambda params: AGC(torch.optim.AdamW(params, 1e-2)),
    "AGC(Adam fused)": lambda params: AGC(torch.optim.Adam(params, 1e-2, fused=True)),
    "AGC(SGD_AGC)": lambda params: AGC(SGD_AGC(params, LR, clip_factor=None)),
}
WITHOUT_SYNC = ["SGD_AGC", "AGC(SGD fused)", "AGC(Adam fused)", "AGC(SGD_AGC)"]
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@every_optimizer
@pytest.mark.parametrize("unscale", [False, True], ids=["forgotten", "unscale_"])
@pytest.mark.parametrize("enabled", [False, True], ids=["disabled", "enabled"])
def test_a_scaled_loss_trains_as_a_plain_one(name, unscale, enabled):
    """Bit for bit: scales are powers of 2."""
    model = net(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, plain = (OPTIMIZERS[name](param_groups(each)) for each in (model, twin))
    amp = scaler(enabled=enabled)
    for _ in range(4):
        scaled_backward(model, optimizer, amp)
        if unscale:
            amp.unscale_(optimizer)
        amp.step(optimizer)
        amp.update()
        train(twin, plain, 1)
    assert_same_parameters(model, twin)
    assert amp.get_scale() == (SCALE * 16 if enabled else 1.0)


def test_a_scale_that_is_no_power_of_two():
    """The loss is in float32, and so is what comes of the scale."""
    (model, optimizer), (twin, oracle) = twins(
        lambda m: SGD_AGC(param_groups(m), LR), lambda m: ClippedSGD(param_groups(m), lr=LR)
    )
    amp = scaler(init_scale=1000.0)
    for _ in range(3):
        scaled_backward(model, optimizer, amp)
        amp.step(optimizer)
        amp.update()
    train(twin, oracle)
    assert_same_parameters(model, twin, rtol=1e-6, atol=1e-7)


@every_optimizer
@pytest.mark.parametrize("unscale", [False, True], ids=["forgotten", "unscale_"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_with_infinities_is_skipped_and_training_goes_on(name, unscale, value):
    model = net(torch.float32)
    optimizer = OPTIMIZERS[name](param_groups(model))
    amp = scaler()

    def step(spoil: bool) -> None:
        scaled_backward(model, optimizer, amp)
        if spoil:
            model.stem.weight.grad[0, 1, 2, 1] = value
        if unscale:
            amp.unscale_(optimizer)
        amp.step(optimizer)
        amp.update()

    step(False)
    before, states = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    scale = amp.get_scale()
    step(True)
    assert all(map(torch.equal, model.parameters(), before))
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, states[i][key]) for key, tensor in state.items()), "a state was written"
    assert amp.get_scale() == scale / 2
    step(False)
    assert not any(map(torch.equal, model.parameters(), before))
    assert all(p.isfinite().all() for p in model.parameters())


class Watch(TorchDispatchMode):
    """The ops that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", WITHOUT_SYNC)
@pytest.mark.parametrize("spoil", [False, True])
def test_a_step_does_not_wait_for_the_device(name, spoil):
    """Reading a tensor is _local_scalar_dense; the loss scaler itself reads in update()."""
    model = net(torch.float32)
    optimizer = OPTIMIZERS[name](param_groups(model))
    amp = scaler()
    for _ in range(3):
        scaled_backward(model, optimizer, amp)
        if spoil:
            model.fc.bias.grad[0] = float("inf")
        with Watch() as watch:
            amp.step(optimizer)
        amp.update()
        assert "aten._amp_foreach_non_finite_check_and_unscale_.default" in watch.ops
        assert not [op for op in watch.ops if "_local_scalar_dense" in op or "nonzero" in op]


@pytest.mark.parametrize("make", [
    lambda model: SGD_AGC(model.parameters(), LR, statistics=True, ema_decay=0.9),
    lambda model: AGC(torch.optim.SGD(model.parameters(), LR, momentum=0.9), statistics=True),
    lambda model: AGC(torch.optim.SGD(model.parameters(), LR, momentum=0.9, fused=True), statistics=True),
], ids=["SGD_AGC", "AGC", "AGC of fused"])  # fmt: skip
def test_skipped_steps_are_not_counted(make):
    model = net(torch.float32)
    optimizer, amp = make(model), scaler()
    for step in range(4):
        scaled_backward(model, optimizer, amp)
        if step % 2:
            model.stem.weight.grad.fill_(float("nan"))
        amp.step(optimizer)
        amp.update()
    statistics = optimizer.stats()
    assert {row.steps for row in statistics} == {2}
    assert 0 < statistics.largest_ratio < 1e4


def test_autocast_training_of_an_nf_resnet_is_that_of_clipping_in_float32():
    """bfloat16 under autocast: both models compute the same gradients, and clip them unscaled."""
    model = nfk.models.NFResNet((1, 1, 1, 1), 1, num_classes=10)
    twin = copy.deepcopy(model)
    optimizer, oracle = SGD_AGC(param_groups(model), LR), ClippedSGD(param_groups(twin), lr=LR)
    amp = scaler()
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 7])
    for _ in range(3):
        for each, its, scale in ((model, optimizer, amp.scale), (twin, oracle, lambda value: value)):
            its.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                value = nn.functional.cross_entropy(each(x), y)
            scale(value).backward()
        amp.step(optimizer)
        amp.update()
        oracle.step()
    assert_same_parameters(model, twin, rtol=1e-5, atol=1e-5)


def test_clip_scaled_unscales_then_clips():
    model = net(torch.float32)
    twin = copy.deepcopy(model)
    agc, agc_of_twin = AGC(model), AGC(twin)
    sgd, plain = (torch.optim.SGD(each.parameters(), LR, momentum=0.9) for each in (model, twin))
    amp = scaler()
    for step in range(3):
        scaled_backward(model, sgd, amp)
        if step == 2:
            model.fc.bias.grad[0] = float("inf")
        agc.clip_scaled_(amp, sgd)
        amp.step(sgd)
        amp.update()
        if step < 2:
            backward(twin, plain)
            agc_of_twin.clip_()
            assert gradients(twin).keys() == gradients(model).keys()
            assert all(torch.equal(grad, gradients(model)[key]) for key, grad in gradients(twin).items())
            plain.step()
    assert_same_parameters(model, twin)


def test_clip_scaled_of_unscaled_gradients_is_refused():
    model = net(torch.float32)
    agc, sgd, amp = AGC(model), torch.optim.SGD(model.parameters(), LR), scaler()
    scaled_backward(model, sgd, amp)
    agc.clip_scaled_(amp, sgd)
    with pytest.raises(RuntimeError, match=r"unscale_.* has already been called"):
        agc.clip_scaled_(amp, sgd)


def test_clip_of_gradients_that_are_still_scaled_clips_them_all():
    """As its documentation warns: the step is then SCALE times too small."""
    weight = torch.full((2, 4), 1.0)

    def small_gradient() -> Tensor:
        return torch.full((2, 4), 1e-3)  # a tenth of the bound

    p = parameter(weight, small_gradient())
    AGC([p]).clip_()
    assert torch.equal(p.grad, small_gradient())
    p.grad = SCALE * small_gradient()
    AGC([p]).clip_()
    torch.testing.assert_close(p.grad, torch.full((2, 4), 0.01))
    assert "still scaled" in AGC.clip_scaled_.__doc__


def test_a_closure_is_refused_by_the_scaler():
    model = net(torch.float32)
    for make in (OPTIMIZERS["SGD_AGC"], OPTIMIZERS["AGC(SGD)"]):
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler().step(make(model.parameters()), closure=lambda: None)


def test_the_scale_is_gone_after_a_step():
    """A later step without scaler is a plain one."""
    model = net(torch.float32)
    for name in OPTIMIZERS:
        optimizer, amp = OPTIMIZERS[name](model.parameters()), scaler()
        scaled_backward(model, optimizer, amp)
        amp.step(optimizer)
        for each in (optimizer, getattr(optimizer, "optimizer", optimizer)):
            assert not hasattr(each, "grad_scale")
            assert not hasattr(each, "found_inf")
