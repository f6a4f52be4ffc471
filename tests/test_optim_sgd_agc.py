"""`optim.SGD_AGC`: trajectories against agc_ before torch's SGD, the authors' code and optax; and torch's protocol."""

import copy
import math
import pickle

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from timm.utils import ModelEmaV2
from torch import Tensor, nn
from torch.optim import lr_scheduler

import nfnets_kernels as nfk
from nfnets_kernels.optim import AGC, SGD_AGC, param_groups

from .agc_cases import loss, parameter, random_pair
from .module_helpers import on_one_thread
from .optimizer_cases import (
    LR,
    TOLERANCE,
    ClippedSGD,
    assert_a_copy_goes_on_alone,
    assert_same_parameters,
    backward,
    net,
    train,
    twins,
    values,
)
from .sgd_agc_cases import unit_norm
from .tolerances import assert_accurate

one_thread = pytest.fixture(on_one_thread, autouse=True)

STEPS = 100
SHAPES = [(6, 5, 3, 3), (7, 40), (9,), (), (5, 1, 1, 1)]
OPTIONS = [
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "nesterov": False, "dampening": 0.3},
    {"weight_decay": 0.1, "nesterov": False, "momentum": 0.0},
    {"weight_decay": 0.0, "maximize": True, "momentum": 0.5},
    {"weight_decay": 0.1, "clip_factor": None},
    {"weight_decay": 0.1, "clip_factor": 0.2, "eps": 10.0, "rule": "deepmind"},
]


def given_gradients(shape: tuple[int, ...]) -> list[Tensor]:
    return [random_pair(shape, torch.float64)[1] for _ in range(STEPS)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hundred_steps_are_those_of_agc_and_sgd(options, dtype):
    """Of given gradients, so that errors only add up: in each step a weight is rounded some twice."""
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in SHAPES]
    expected = [nn.Parameter(p.detach().double()) for p in parameters]
    optimizer, oracle = SGD_AGC(parameters, LR, **options), ClippedSGD(expected, lr=LR, **options)
    gradients = [given_gradients(shape) for shape in SHAPES]
    for step in range(STEPS):
        for p, q, of_p in zip(parameters, expected, gradients, strict=True):
            p.grad = of_p[step].to(dtype)
            q.grad = p.grad.to(torch.float64, copy=True)
        optimizer.step()
        oracle.step()
    for p, q in zip(parameters, expected, strict=True):
        assert_accurate(p, q.detach(), unit_length=p.numel(), ulps=2.0 * STEPS)
        assert not torch.equal(p.double(), q.round())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_an_nf_resnet_trains_as_with_agc_and_sgd(dtype, bound):
    """Errors of 100 float32 steps, each 6e-8 of a weight; what each step does to the next ones is part of it."""
    model = nfk.models.NFResNet((1, 1, 1, 1), 1, num_classes=10).to(dtype)
    twin = copy.deepcopy(model)
    x, y = torch.randn(2, 3, 32, 32, dtype=dtype), torch.tensor([1, 7])
    optimizer = SGD_AGC(param_groups(model, weight_decay=1e-2), lr=0.1)
    oracle = ClippedSGD(param_groups(twin, weight_decay=1e-2), lr=0.1)
    for _ in range(STEPS if dtype == torch.float32 else 20):
        for each, its in ((model, optimizer), (twin, oracle)):
            its.zero_grad()
            nn.functional.cross_entropy(each(x), y).backward()
            its.step()
    assert_same_parameters(model, twin, rtol=bound, atol=bound)
    assert nn.functional.cross_entropy(model(x), y) < 1.0


def authors_step(w: Tensor, g: Tensor, buffer: Tensor, momentum: float, decay: float) -> tuple[Tensor, Tensor]:
    """deepmind-research, nfnets/optim.py, SGD_AGC.update_param with nesterov, clipping=0.01 and eps=1e-3."""
    max_norm = unit_norm(w, "deepmind").clamp(min=1e-3) * 0.01
    norm = unit_norm(g, "deepmind")
    g = torch.where(norm > max_norm, g * (max_norm / norm.clamp(min=1e-6)), g)
    g = g + decay * w
    buffer = momentum * buffer + g
    return w - LR * (g + momentum * buffer), buffer


def test_a_hundred_steps_are_the_authors():
    for shape in SHAPES:
        w = torch.randn(shape, dtype=torch.float64)
        p, buffer = nn.Parameter(w.clone()), torch.zeros_like(w)
        optimizer = SGD_AGC([p], LR, weight_decay=0.1, rule="deepmind")
        for grad in given_gradients(shape):
            p.grad = grad
            optimizer.step()
            w, buffer = authors_step(w, grad, buffer, 0.9, 0.1)
        torch.testing.assert_close(p.detach(), w, **TOLERANCE)


def test_a_hundred_steps_are_optaxs():
    """Whose layouts are (..., I, O)."""

    def to_optax(x: Tensor) -> jax.Array:
        return jnp.asarray((x.movedim((0, 1), (-1, -2)) if x.ndim > 1 else x).numpy())

    weights = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = SGD_AGC(parameters, LR, weight_decay=0.1, rule="deepmind")
    with jax.enable_x64(True):
        rule = optax.chain(
            optax.adaptive_grad_clip(0.01, 1e-3),
            optax.add_decayed_weights(0.1),
            optax.trace(0.9, nesterov=True),
            optax.scale(-LR),
        )
        expected = list(map(to_optax, weights))
        state, update = rule.init(expected), jax.jit(rule.update)
        gradients = [given_gradients(shape) for shape in SHAPES]
        for step in range(STEPS):
            for p, of_p in zip(parameters, gradients, strict=True):
                p.grad = of_p[step]
            optimizer.step()
            updates, state = update([to_optax(of_p[step]) for of_p in gradients], state, expected)
            expected = optax.apply_updates(expected, updates)
        for p, w in zip(parameters, expected, strict=True):
            torch.testing.assert_close(to_optax(p.detach()).tolist(), w.tolist(), **TOLERANCE)


def test_groups_have_their_own_hyperparameters_which_may_change():
    def grouped(model: nn.Module, make: type) -> torch.optim.Optimizer:
        options = {"nesterov": False, "weight_decay": 0.1}
        groups = [
            {"params": list(model.stem.parameters()), "lr": 0.3, "clip_factor": 0.1},
            {"params": list(model.body.parameters()), "momentum": 0.5, "weight_decay": 0.0, "eps": 3.0},
            {"params": list(model.fc.parameters()), "clip_factor": None, "lr": 1e-4, "nesterov": True},
        ]
        return make(groups, lr=LR, **options)

    pairs = twins(lambda model: grouped(model, SGD_AGC), lambda model: grouped(model, ClippedSGD))
    for name, value in [("lr", 0.01), ("momentum", 0.2), ("weight_decay", 0.3), ("eps", 1.0), ("maximize", True),
                        ("dampening", 0.1), ("clip_factor", 0.2), ("momentum", 0.0), ("momentum", 0.7)]:  # fmt: skip
        for model, optimizer in pairs:
            train(model, optimizer, 2)
            optimizer.param_groups[1][name] = value
            train(model, optimizer, 2)
    assert_same_parameters(pairs[0][0], pairs[1][0], **TOLERANCE)


def test_groups_may_be_added():
    pairs = twins(lambda m: SGD_AGC(m.stem.parameters(), LR), lambda m: ClippedSGD(m.stem.parameters(), lr=LR))
    for model, optimizer in pairs:
        train(model, optimizer)
        optimizer.add_param_group({"params": list(model.body.parameters()), "lr": 0.3, "clip_factor": None})
        train(model, optimizer)
    assert_same_parameters(pairs[0][0], pairs[1][0], **TOLERANCE)
    model, optimizer = pairs[0]
    with pytest.raises(ValueError, match="clip_factor must be finite and not negative, got -1"):
        optimizer.add_param_group({"params": list(model.fc.parameters()), "clip_factor": -1.0})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": []})
    train(model, optimizer)


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=20),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)], milestones=[4]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["number", "tensor", "capturable"])
def test_schedulers_set_lr_and_momentum(scheduler, kind):
    """A tensor lr is rounded to float32, by 6e-8 of it, the oracle's is not."""
    lr = torch.tensor(LR) if kind == "tensor" else LR
    (model, optimizer), (twin, oracle) = twins(
        lambda m: SGD_AGC(param_groups(m, head=()), lr, capturable=kind == "capturable"),
        lambda m: ClippedSGD(param_groups(m, head=()), lr=LR),
    )
    moved = values(model)
    train(model, optimizer, 12, SCHEDULERS[scheduler](optimizer))
    train(twin, oracle, 12, SCHEDULERS[scheduler](oracle))
    tolerance = TOLERANCE if kind == "number" else {"rtol": 1e-6, "atol": 1e-6}
    assert_same_parameters(model, twin, **tolerance)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == (kind != "number")
    assert all((p - old).abs().max() > 1e-4 for p, old in zip(model.parameters(), moved, strict=True))


def test_capturable_keeps_the_lr_in_one_tensor_that_may_be_filled():
    model = net(torch.float32)
    optimizer = SGD_AGC(model.parameters(), LR, capturable=True)
    lr = optimizer.param_groups[0]["lr"]
    train(model, optimizer, 5, lr_scheduler.StepLR(optimizer, 2, 0.1))
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(LR / 100)
    before = values(model)
    lr.zero_()
    train(model, optimizer, 2)
    assert all(map(torch.equal, model.parameters(), before))


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    (model, optimizer), (twin, oracle) = twins(
        lambda m: SGD_AGC(m.parameters(), LR), lambda m: ClippedSGD(m.parameters(), lr=LR)
    )
    for _ in range(3):
        actual = optimizer.step(lambda: backward(model, optimizer))
        expected = oracle.step(lambda: backward(twin, oracle))
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert_same_parameters(model, twin, **TOLERANCE)


def test_the_gradient_is_left_as_it_is():
    p = parameter(*random_pair((6, 35)))
    grad = p.grad.clone()
    optimizer = SGD_AGC([p], LR)
    for _ in range(2):
        optimizer.step()
        assert torch.equal(p.grad, grad)
    optimizer.zero_grad(set_to_none=False)
    assert not p.grad.any()
    optimizer.zero_grad()
    assert p.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_are_in_the_dtypes_that_keep_them_exact_enough(dtype):
    """ModelEmaV2 averages the parameters as they are stored, in float32."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(6 * 36, 5)).to(dtype)
    optimizer = SGD_AGC(model.parameters(), LR, ema_decay=0.99)
    ema = ModelEmaV2(copy.deepcopy(model).float(), decay=0.99)
    for _ in range(10):
        train(model, optimizer, 1)
        ema.update(copy.deepcopy(model).float())
    for p, q in zip(model.parameters(), ema.module.parameters(), strict=True):
        state = optimizer.state[p]
        assert state["momentum_buffer"].dtype == dtype
        assert state["ema"].dtype == torch.float32
        torch.testing.assert_close(state["ema"], q, rtol=1e-5, atol=1e-6)
        assert not torch.equal(p.float(), q)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = SGD_AGC(model.parameters(), LR, ema_decay=0.99)
    resumed.load_state_dict(saved)
    for p in model.parameters():
        assert torch.equal(resumed.state[p]["ema"], optimizer.state[p]["ema"])


def test_averages_are_swapped_in_for_evaluation():
    """WSConv2d keeps its standardized weight in eval mode: it has to notice, both times."""
    model = nn.Sequential(nfk.WSConv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    optimizer, ema = SGD_AGC(model.parameters(), 0.5, ema_decay=0.5), ModelEmaV2(model, decay=0.5)
    for _ in range(3):
        train(model, optimizer, 1)
        ema.update(model)
    model.eval()
    ema.module.eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
        with optimizer.averaged_parameters():
            assert_same_parameters(model, ema.module, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(model(x), ema.module(x), rtol=1e-4, atol=1e-5)
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)
        with pytest.raises(ZeroDivisionError), optimizer.averaged_parameters():
            raise ZeroDivisionError
        assert torch.equal(model(x), before)
    with (
        pytest.raises(ValueError, match="ema_decay must be given"),
        SGD_AGC([*model.parameters()], LR).averaged_parameters(),
    ):
        pass


BAD = [("lr", -1.0), ("lr", math.nan), ("momentum", -0.1), ("momentum", math.inf), ("dampening", math.nan),
       ("weight_decay", -1e-5), ("clip_factor", -0.01), ("clip_factor", math.inf), ("eps", -1.0), ("ema_decay", 1.5),
       ("ema_decay", -0.1), ("rule", "lamb"), ("backend", "tpu"), ("momentum", 0.0), ("dampening", 0.1),
       ("differentiable", True)]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD, ids=str)
def test_bad_options_are_named_at_construction(name, value):
    message = f"{name}.*{value}" if name != "differentiable" else "differentiable must be False"
    with pytest.raises(ValueError, match=message):
        SGD_AGC(net().parameters(), **{"lr": LR, name: value})


@pytest.mark.parametrize("name, value", [("lr", "fast"), ("lr", None), ("momentum", "0.9"), ("clip_factor", "0.01"),
                                         ("eps", None), ("weight_decay", torch.ones(3))], ids=str)  # fmt: skip
def test_options_of_another_type_are_named_at_construction(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number.*{type(value).__name__}"):
        SGD_AGC(net().parameters(), **{"lr": LR, name: value})


def test_an_lr_tensor_has_one_element():
    with pytest.raises(ValueError, match=r"lr must have one element, got a tensor of shape \(2,\)"):
        SGD_AGC(net().parameters(), torch.ones(2))


@pytest.mark.parametrize(
    "name, value", [("lr", -1.0), ("momentum", math.nan), ("clip_factor", -1.0), ("momentum", 0.0)]
)
def test_bad_options_set_between_steps_are_refused_and_nothing_is_written(name, value):
    model = net()
    optimizer = SGD_AGC(model.parameters(), LR)
    train(model, optimizer, 2)
    before = values(model)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"ema_decay": 0.9, "statistics": True}], ids=str)
def test_a_copy_goes_on_alone(duplicate, options):
    model = net()
    optimizer = SGD_AGC(param_groups(model), LR, **options)
    train(model, optimizer, 3, lr_scheduler.StepLR(optimizer, 2))
    assert_a_copy_goes_on_alone(duplicate, model, optimizer)
    assert "clip_factor: 0.01" in repr(optimizer)


def test_named_parameters_keep_their_names_in_statistics_and_state_dict():
    model = net()
    optimizer = SGD_AGC(model.named_parameters(), LR, statistics=True)
    train(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    assert [row.name for row in optimizer.stats()] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


def test_hooks_run_once_each_step():
    model, calls = net(), []
    optimizer = SGD_AGC(model.parameters(), LR)
    before = optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    train(model, optimizer, 2)
    before.remove()
    train(model, optimizer, 1)
    assert calls == ["pre", "post", "pre", "post", "post"]


def test_it_learns_where_sgd_without_clipping_explodes():
    def final_loss(clip_factor: float | None) -> float:
        torch.manual_seed(0)
        model = net(torch.float32)
        groups = param_groups(model, clip_factor=clip_factor, head=() if clip_factor is None else None)
        optimizer = SGD_AGC(groups, lr=0.5)
        for _ in range(25):
            backward(model, optimizer)
            nn.utils.clip_grad_value_(model.fc.parameters(), 0.1)
            optimizer.step()
        return loss(model).item() / 100

    assert not final_loss(None) < math.log(5)
    assert final_loss(0.05) < 0.5 * math.log(5)
    assert not isinstance(SGD_AGC([nn.Parameter(torch.ones(1))], LR), AGC)
