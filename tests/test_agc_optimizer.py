"""`AGC(optimizer)`: any optimizer with clipping before its step, an optimizer itself."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

import nfnets_kernels as nfk
from nfnets_kernels.optim import AGC, SGD_AGC, param_groups
from nfnets_kernels.optim.agc_optimizer import AGCOptimizer

from .agc_cases import bits, gradients, loss, parameter, random_pair
from .module_helpers import on_one_thread
from .optimizer_cases import (
    LR,
    TOLERANCE,
    assert_a_copy_goes_on_alone,
    assert_same_parameters,
    backward,
    net,
    train,
    values,
)

one_thread = pytest.fixture(on_one_thread, autouse=True)


class Lion(Optimizer):
    """Chen et al. 2023, algorithm 2, with what such optimizers add: modes, as schedule-free ones have."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})
        self.mode = "train"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        value = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(torch.sign(torch.lerp(p.grad, m, group["betas"][0])), alpha=group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])
        return value


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, LR, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "SGD fused": lambda params: torch.optim.SGD(params, LR, momentum=0.9, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, 1e-2),
    "RMSprop": lambda params: torch.optim.RMSprop(params, 1e-3),
    "Lion": Lion,
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def clipped(params: Any, name: str = "SGD", **options: Any) -> AGCOptimizer:
    optimizer = AGC(OPTIMIZERS[name](params), **options)
    assert isinstance(optimizer, AGCOptimizer)
    return optimizer


def train_by_hand(
    model: nn.Module, optimizer: Optimizer, steps: int = 3, scheduler: Any = None, **options: Any
) -> None:
    """agc_, then a step."""
    for _ in range(steps):
        backward(model, optimizer)
        nfk.agc_(model.parameters(), **options)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@every_optimizer
@pytest.mark.parametrize("options", [{}, {"clip_factor": 0.1, "eps": 1e-2, "norm_type": 1.0, "rule": "deepmind"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_that_of_agc_before_the_optimizer(name, options, dtype):
    model = net(dtype)
    twin, unclipped = copy.deepcopy(model), copy.deepcopy(model)
    train(model, clipped(model.parameters(), name, **options), 5)
    train_by_hand(twin, OPTIMIZERS[name](twin.parameters()), 5, **options)
    assert_same_parameters(model, twin)
    train(unclipped, OPTIMIZERS[name](unclipped.parameters()), 5)
    # A Lion that clips is known by its momentum: its steps are signs.
    assert name == "Lion" or not any(map(torch.equal, model.parameters(), unclipped.parameters()))


def test_lbfgs_gets_clipped_gradients_from_every_evaluation():
    model = net()
    twin = copy.deepcopy(model)
    options = {"lr": 1e-2, "max_iter": 4, "line_search_fn": "strong_wolfe"}
    optimizer = AGC(torch.optim.LBFGS(model.parameters(), **options))
    plain = torch.optim.LBFGS(twin.parameters(), **options)
    evaluations = []

    def evaluate() -> Tensor:
        value = backward(twin, plain)
        nfk.agc_(twin.parameters())
        return value

    def count() -> Tensor:
        evaluations.append(torch.is_grad_enabled())
        return backward(model, optimizer)

    for _ in range(2):
        assert torch.equal(optimizer.step(count), plain.step(evaluate))
    assert_same_parameters(model, twin)
    assert len(evaluations) > 4
    assert all(evaluations)


def test_a_closures_loss_is_returned():
    model = net()
    twin = copy.deepcopy(model)
    optimizer = clipped(model.parameters(), "AdamW")
    assert torch.equal(optimizer.step(lambda: backward(model, optimizer)), loss(twin))
    train(twin, clipped(twin.parameters(), "AdamW"), 1)
    assert_same_parameters(model, twin)


def test_it_is_an_optimizer_and_an_agc():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), LR)
    optimizer = AGC(sgd)
    assert isinstance(optimizer, (Optimizer, AGC))
    assert isinstance(optimizer, Optimizer)
    assert optimizer.optimizer is sgd
    assert optimizer.param_groups is sgd.param_groups
    assert optimizer.state is sgd.state
    assert optimizer.defaults is sgd.defaults
    assert not isinstance(AGC(model), Optimizer)
    assert "clip_factor=0.01" in repr(optimizer)
    assert "SGD" in repr(optimizer)


def test_what_it_does_not_have_is_the_optimizers():
    optimizer = clipped(net().parameters(), "Lion")
    assert optimizer.mode == "train"
    optimizer.eval()
    assert optimizer.optimizer.mode == "eval"
    optimizer.train()
    assert optimizer.mode == "train"
    with pytest.raises(AttributeError, match="'Lion' object has no attribute 'nothing'"):
        _ = optimizer.nothing


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], milestones=[3]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.filterwarnings("error:Detected call of")
def test_schedulers_work_on_it(scheduler, name):
    model = net()
    twin = copy.deepcopy(model)
    optimizer, plain = clipped(model.parameters(), name), OPTIMIZERS[name](twin.parameters())
    train(model, optimizer, 8, SCHEDULERS[scheduler](optimizer))
    train_by_hand(twin, plain, 8, SCHEDULERS[scheduler](plain))
    assert_same_parameters(model, twin)


@every_optimizer
def test_state_dicts_are_interchangeable_with_the_optimizers(name):
    model = net()
    twin = copy.deepcopy(model)
    optimizer, plain = clipped(model.parameters(), name), OPTIMIZERS[name](twin.parameters())
    train(model, optimizer)
    train_by_hand(twin, plain)
    resumed, resumed_plain = clipped(model.parameters(), name), OPTIMIZERS[name](twin.parameters())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_plain.load_state_dict(torch.load(file, weights_only=True))
    resumed.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(model, resumed)
    train_by_hand(twin, resumed_plain)
    assert_same_parameters(model, twin)


@every_optimizer
def test_groups_have_their_own_clip_factor(name):
    """The head of param_groups has None; a group without one has the optimizer's."""
    model = net()
    groups = param_groups(model, clip_factor=0.02)
    del groups[1]["clip_factor"]
    twin = copy.deepcopy(model)
    optimizer = clipped(groups, name, clip_factor=0.05)
    plain = OPTIMIZERS[name](param_groups(twin, clip_factor=None))
    train(model, optimizer)
    names = dict(twin.named_parameters())
    for _ in range(3):
        backward(twin, plain)
        nfk.agc_([names[key] for key in ("stem.weight", "body.0.weight", "body.1.0.weight")], 0.02)
        nfk.agc_([names[key] for key in ("stem.bias", "body.0.bias")], 0.05)
        plain.step()
    assert_same_parameters(model, twin)


def test_groups_may_be_added_and_their_clip_factors_changed():
    model = net()
    optimizer = clipped(model.stem.parameters())
    backward(model, optimizer)
    optimizer.step()
    optimizer.add_param_group({"params": list(model.fc.parameters()), "clip_factor": None})
    assert len(optimizer.optimizer.param_groups) == 2
    for clip_factor in (None, 0.03, 0.2, None):
        optimizer.param_groups[1]["clip_factor"] = clip_factor
        optimizer.zero_grad()
        backward(model, optimizer)
        before = gradients(model)
        expected = parameter(model.fc.weight.detach().clone(), before["fc.weight"].clone())
        if clip_factor is not None:
            nfk.agc_(expected, clip_factor)
        optimizer.clip_()
        assert torch.equal(model.fc.weight.grad, expected.grad)
        assert not torch.equal(model.stem.weight.grad, before["stem.weight"])
        assert torch.equal(model.body[0].weight.grad, before["body.0.weight"])  # in no group


def test_zero_grad_is_the_optimizers():
    p = parameter(*random_pair((3, 4)))
    optimizer = clipped([p])
    optimizer.zero_grad(set_to_none=False)
    assert not p.grad.any()
    optimizer.zero_grad()
    assert p.grad is None
    optimizer.step()


def test_hooks_reach_the_optimizer_once():
    """Step hooks run around its own step: gradients are clipped by then."""
    model = net()
    optimizer, calls = clipped(model.parameters()), []

    def note(name: str) -> Callable[..., None]:
        return lambda hooked, *args: calls.append((name, hooked is optimizer.optimizer))

    clipped_to = []
    optimizer.register_step_pre_hook(lambda *args: clipped_to.append(model.fc.weight.grad.norm().item()))
    before = optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    optimizer.register_state_dict_post_hook(note("state_dict"))
    optimizer.register_load_state_dict_pre_hook(note("load_state_dict"))
    train(model, optimizer, 2)
    before.remove()
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    names = ["pre", "post", "pre", "post", "post", "state_dict", "load_state_dict"]
    assert calls == [(name, True) for name in names]
    assert max(clipped_to) < 0.02 * model.fc.weight.norm()


def test_global_hooks_run_once_each_step():
    calls = []
    hook = register_optimizer_step_pre_hook(lambda *args: calls.append(1))
    try:
        model = net()
        train(model, clipped(model.parameters()), 2)
    finally:
        hook.remove()
    assert calls == [1, 1]


def through_torch_save(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_torch_save])
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
def test_a_copy_goes_on_alone_and_clips(duplicate, scheduled):
    """A scheduler replaces the step of the optimizer that it is given."""
    model = net()
    optimizer = clipped(param_groups(model), "AdamW", clip_factor=0.03, rule="deepmind", statistics=True)
    train(model, optimizer, 3, lr_scheduler.StepLR(optimizer, 2) if scheduled else None)
    other = assert_a_copy_goes_on_alone(duplicate, model, optimizer)
    assert repr(other.stats()) == repr(optimizer.stats())


def test_an_optimizer_that_is_an_agc_may_be_saved_whole_and_scheduled_anew():
    model = net()
    optimizer = clipped(model.parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, 2, scheduler)
    twin, other = copy.deepcopy((model, optimizer))
    resumed = lr_scheduler.StepLR(other, 1, 0.5)
    resumed.load_state_dict(scheduler.state_dict())
    train(model, optimizer, 2, scheduler)
    train(twin, other, 2, resumed)
    assert_same_parameters(twin, model)


def test_statistics_tell_of_clipped_groups_by_name():
    model = net()
    optimizer = clipped(param_groups(model), statistics=True)
    train(model, optimizer, 3)
    statistics = {row.name: row for row in optimizer.stats()}
    assert statistics.keys() == {"stem.weight", "stem.bias", "body.0.weight", "body.0.bias", "body.1.0.weight"}
    assert statistics["stem.weight"].steps == 3
    assert statistics["stem.weight"].units == 6
    optimizer.reset_stats()
    assert optimizer.stats().fraction == 0.0
    with pytest.raises(RuntimeError, match="nothing was counted: AGCOptimizer"):
        clipped(model.parameters()).stats()


def test_frozen_parameters_and_missing_gradients_are_passed_over():
    model = net()
    twin = copy.deepcopy(model)
    optimizer, plain = clipped(model.parameters(), "AdamW"), OPTIMIZERS["AdamW"](twin.parameters())
    for frozen in (False, True, False):
        for each in (model, twin):
            each.stem.requires_grad_(not frozen)
        train(model, optimizer)
        train_by_hand(twin, plain)
    optimizer.zero_grad()
    optimizer.step()
    assert_same_parameters(model, twin, **TOLERANCE)


def test_nan_in_one_unit_touches_that_unit_alone():
    p = parameter(*random_pair((6, 35)))
    twin = parameter(p.detach().clone(), p.grad.clone())
    p.grad[2, 7] = float("nan")
    clipped([p]).step()
    clipped([twin]).step()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(bits(p.detach())[others], bits(twin.detach())[others])
    assert p[2].isnan().all()


@pytest.mark.parametrize("name, value", [("clip_factor", -1.0), ("eps", float("nan")), ("norm_type", 0.0),
                                         ("rule", "lamb"), ("backend", "tpu")])  # fmt: skip
def test_bad_options_are_named(name, value):
    optimizer = OPTIMIZERS["SGD"](net().parameters())
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        AGC(optimizer, **{name: value})


def test_a_bad_clip_factor_of_a_group_is_refused_before_anything_is_written():
    model = net()
    optimizer = clipped(model.parameters())
    backward(model, optimizer)
    optimizer.param_groups[0]["clip_factor"] = -1.0
    before, grads = values(model), gradients(model)
    with pytest.raises(ValueError, match=r"clip_factor must be finite and not negative, got -1.0"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert all(torch.equal(grads[name], grad) for name, grad in gradients(model).items())


def test_what_is_left_unclipped_is_said_by_groups():
    """Modules are known to `AGC(model, exclude=...)` and `param_groups(model, head=...)` alone."""
    model = net()
    with pytest.raises(TypeError, match="exclude"):
        AGC(torch.optim.SGD(model.parameters(), LR), exclude=("fc",))
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got Net"):
        AGCOptimizer(model)


def test_it_takes_the_packages_own_optimizer_and_itself():
    """Clipping what is clipped changes nothing but rounding."""
    model = net()
    twin = copy.deepcopy(model)
    train(model, AGC(AGC(SGD_AGC(model.parameters(), LR))))
    train(twin, SGD_AGC(twin.parameters(), LR))
    assert_same_parameters(model, twin, rtol=1e-9, atol=1e-9)
