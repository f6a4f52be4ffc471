"""`optim.SGD_AGC` over many steps: what it remembers of one never makes a later one differ from agc_ before SGD."""

import copy
import functools
import gc
import io
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import nfnets_kernels as nfk
from nfnets_kernels.optim import AGC, SGD_AGC, param_groups

from .agc_cases import bits, parameter, random_pair, without_exchange_api
from .module_helpers import on_one_thread
from .optimizer_cases import LR, TOLERANCE, ClippedSGD, assert_same_parameters, backward, net, train, twins

one_thread = pytest.fixture(on_one_thread, autouse=True)


@pytest.fixture(params=[False, True], ids=["", "Python"])
def snapshots(request, monkeypatch) -> None:
    """Every step also as it is where torch is older than 2.11."""
    if request.param:
        without_exchange_api(monkeypatch)


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> list[tuple[nn.Module, Optimizer]]:
    options = {"nesterov": False, **options}
    return twins(
        lambda model: SGD_AGC(param_groups(model, 0.1), LR, **options),
        lambda model: ClippedSGD(param_groups(model, 0.1), lr=LR, **options),
        dtype,
    )


def is_quick(optimizer: SGD_AGC, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the next step is served by what the last one left."""
    with monkeypatch.context() as patch:
        patch.setattr(nfk.ops.sgd_agc, "step_", None)
        try:
            optimizer.step()
        except TypeError:
            return False
    return True


def test_from_the_second_step_on_nothing_is_checked_again(snapshots, monkeypatch):
    (model, optimizer), (twin, oracle) = pair()
    train(model, optimizer, 1)
    train(twin, oracle, 1)
    for _ in range(3):
        backward(model, optimizer)
        assert is_quick(optimizer, monkeypatch)
        train(twin, oracle, 1)
    assert_same_parameters(model, twin, **TOLERANCE)


def freeze(model: nn.Module, optimizer: Optimizer) -> None:
    model.stem.requires_grad_(False)


def unfreeze(model: nn.Module, optimizer: Optimizer) -> None:
    model.stem.requires_grad_(True)


def zero_gradients_in_place(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad = functools.partial(optimizer.zero_grad, set_to_none=False)


def channels_last(model: nn.Module, optimizer: Optimizer) -> None:
    model.to(memory_format=torch.channels_last)


def contiguous(model: nn.Module, optimizer: Optimizer) -> None:
    model.to(memory_format=torch.contiguous_format)


def other_memory(model: nn.Module, optimizer: Optimizer) -> None:
    for p in model.parameters():
        p.data = 1.5 * p.data


def load_weights(model: nn.Module, optimizer: Optimizer) -> None:
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()})


def load_state(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def clear_state(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.state.clear()


def forget_one_momentum(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.state[model.stem.weight].pop("momentum_buffer", None)


def replace_momentum(model: nn.Module, optimizer: Optimizer) -> None:
    state = optimizer.state[model.stem.weight]
    state["momentum_buffer"] = 2 * state["momentum_buffer"]


def scale_momentum_in_place(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.state[model.stem.weight]["momentum_buffer"].mul_(2)


def swap_momentum_memory(model: nn.Module, optimizer: Optimizer) -> None:
    buffer = optimizer.state[model.stem.weight]["momentum_buffer"]
    buffer.data = 2 * buffer.data


def move_to_another_group(model: nn.Module, optimizer: Optimizer) -> None:
    first, second = optimizer.param_groups[:2]
    for key in ("params", "param_names"):
        second[key].insert(0, first[key].pop())  # the order of all of them stays


def swap_groups(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups.reverse()


def add_parameter(model: nn.Module, optimizer: Optimizer) -> None:
    extra = parameter(torch.ones(3, 4).double(), torch.ones(3, 4).double())
    optimizer.add_param_group({"params": [("extra", extra)]})


def set_option(name: str, value: Any) -> Callable[[nn.Module, Optimizer], None]:
    def change(model: nn.Module, optimizer: Optimizer) -> None:
        optimizer.param_groups[0][name] = value

    return change


CHANGES = {
    "frozen and unfrozen": (freeze, unfreeze),
    "gradients kept in place": (zero_gradients_in_place, other_memory),
    "memory format": (channels_last, channels_last),
    "memory format and back": (channels_last, contiguous),
    "memory": (other_memory, other_memory),
    "load_state_dict of the model": (load_weights, load_weights),
    "load_state_dict": (load_state, load_state),
    "state cleared": (clear_state, clear_state),
    "one momentum removed": (forget_one_momentum, forget_one_momentum),
    "momentum replaced": (replace_momentum, replace_momentum),
    "momentum changed in place": (scale_momentum_in_place, scale_momentum_in_place),
    "momentum moved": (swap_momentum_memory, swap_momentum_memory),
    "another group": (move_to_another_group, swap_groups),
    "parameter added": (add_parameter, freeze),
    "momentum off and on": (set_option("momentum", 0.0), set_option("momentum", 0.8)),
    "clipping off and on": (set_option("clip_factor", None), set_option("clip_factor", 0.02)),
    "lr": (set_option("lr", 0.0), set_option("lr", 2 * LR)),
    "decay": (set_option("weight_decay", 0.0), set_option("weight_decay", 0.3)),
    "maximize": (set_option("maximize", True), set_option("maximize", False)),
    "nesterov": (set_option("nesterov", True), set_option("nesterov", False)),
    "dampening": (set_option("dampening", 0.5), clear_state),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_every_change(change, snapshots, monkeypatch):
    pairs = pair()
    for model, optimizer in pairs:
        train(model, optimizer)
        for make in CHANGES[change]:
            make(model, optimizer)
            train(model, optimizer)
    assert_same_parameters(pairs[0][0], pairs[1][0], **TOLERANCE)
    backward(*pairs[0])
    assert is_quick(pairs[0][1], monkeypatch)


def test_gradients_may_come_and_go(snapshots):
    pairs = pair()
    for model, optimizer in pairs:
        for step in range(12):
            backward(model, optimizer)
            for i, p in enumerate(model.parameters()):
                if (i + step) % 3 == 0 or step == 7:  # at which there is none
                    p.grad = None
            optimizer.step()
    assert_same_parameters(pairs[0][0], pairs[1][0], **TOLERANCE)


@pytest.mark.parametrize("first", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("second", [torch.float64, torch.float32, torch.float16])
def test_it_follows_a_model_that_changes_its_dtype(first, second, snapshots):
    """A fresh optimizer that is given the states in the new dtype goes on in the same way, bit for bit."""
    model = net(first)
    optimizer = SGD_AGC(model.parameters(), LR, ema_decay=0.9)
    train(model, optimizer)
    model.to(second)
    twin = copy.deepcopy(model)
    fresh = SGD_AGC(twin.parameters(), LR, ema_decay=0.9)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wide = torch.float64 if second == torch.float64 else torch.float32
    for state in fresh.state.values():
        state["ema"] = state["ema"].to(wide)
    for each, its in ((model, optimizer), (twin, fresh)):
        train(each, its)
    assert_same_parameters(model, twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[p]["momentum_buffer"].dtype == second
        assert optimizer.state[p]["ema"].dtype == wide
        assert torch.equal(optimizer.state[p]["ema"], fresh.state[q]["ema"])


SGD_KINDS = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "single": {"foreach": False},
    "before its first step": {},
    "without momentum": {"momentum": 0.0, "nesterov": False},
}


@pytest.mark.parametrize("kind", SGD_KINDS)
def test_a_run_of_torchs_sgd_is_taken_over(kind):
    """And given back; options that SGD does not save, such as clip_factor, stay."""
    (model, sgd), (twin, oracle) = twins(
        lambda m: torch.optim.SGD(m.parameters(), LR / 10, **{"momentum": 0.9, "nesterov": True} | SGD_KINDS[kind]),
        lambda m: ClippedSGD(m.parameters(), lr=LR / 10, clip_factor=None, weight_decay=0.0,
                             **{"momentum": 0.9, "nesterov": True} | SGD_KINDS[kind]),
    )  # fmt: skip
    steps = 0 if kind == "before its first step" else 3
    train(model, sgd, steps)
    train(twin, oracle, steps)
    optimizer = SGD_AGC(model.parameters(), lr=7.0, clip_factor=0.02)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    oracle.clip_factor = 0.02
    train(model, optimizer)
    train(twin, oracle)
    assert_same_parameters(model, twin, **TOLERANCE)
    assert optimizer.param_groups[0]["clip_factor"] == 0.02
    sgd.load_state_dict({**copy.deepcopy(optimizer.state_dict())})
    oracle.clip_factor = None
    train(model, sgd)
    train(twin, oracle)
    assert_same_parameters(model, twin, **TOLERANCE)


def test_a_state_of_sgd_without_momentum_buffers_is_loaded():
    """Older versions of torch saved None for them."""
    (model, optimizer), (twin, oracle) = pair()
    saved = optimizer.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for group in saved["param_groups"] for i in group["params"]}
    optimizer.load_state_dict(saved)
    train(model, optimizer)
    train(twin, oracle)
    assert_same_parameters(model, twin, **TOLERANCE)


def test_what_holds_for_all_groups_stays_as_it_was_given():
    """And a capturable optimizer's lr a tensor, whatever SGD has saved."""
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.25, momentum=0.9)
    optimizer = SGD_AGC(model.parameters(), LR, capturable=True, rule="deepmind", backend="reference")
    optimizer.load_state_dict(sgd.state_dict())
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    assert float(optimizer.param_groups[0]["lr"]) == 0.25
    optimizer.load_state_dict(SGD_AGC(model.parameters(), LR, rule="timm", statistics=True).state_dict())
    group = optimizer.param_groups[0]
    assert (group["rule"], group["backend"], group["statistics"]) == ("deepmind", "reference", False)
    with pytest.raises(ValueError, match="rule must be 'deepmind' as in all groups, got 'timm'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rule": "timm"})


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"capturable": True}, {"dampening": 0.2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_bit_for_bit(options, dtype, snapshots):
    def made(model: nn.Module) -> tuple[SGD_AGC, Any]:
        optimizer = SGD_AGC(param_groups(model), LR, **{"nesterov": "dampening" not in options} | options)
        return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 20)

    model = net(dtype)
    optimizer, scheduler = made(model)
    train(model, optimizer, 5, scheduler)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in (model, optimizer, scheduler)], file)
    train(model, optimizer, 5, scheduler)

    resumed = net(dtype)
    resumed_optimizer, resumed_scheduler = made(resumed)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for each, state in zip((resumed, resumed_optimizer, resumed_scheduler), saved, strict=True):
        each.load_state_dict(state)
    train(resumed, resumed_optimizer, 5, resumed_scheduler)
    assert_same_parameters(resumed, model)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        state, resumed_state = optimizer.state[p], resumed_optimizer.state[q]
        assert state.keys() == resumed_state.keys()
        assert all(torch.equal(state[key], resumed_state[key]) for key in state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_one_unit_touches_that_unit_alone(value, snapshots):
    parameters = [parameter(*random_pair((6, 35))) for _ in range(2)]
    expected = [parameter(p.detach().clone(), p.grad.clone()) for p in parameters]
    optimizer, oracle = (SGD_AGC(ps, LR, ema_decay=0.9) for ps in (parameters, expected))
    for step in range(3):
        for p, q in zip(parameters, expected, strict=True):
            p.grad = random_pair((6, 35))[1]
            q.grad = p.grad.clone()
        if step == 1:
            parameters[0].grad[2, 7] = value
        optimizer.step()
        oracle.step()
    others = [0, 1, 3, 4, 5]
    for key in (None, "momentum_buffer", "ema"):
        ours, theirs = (
            [bits(p.detach() if key is None else its.state[p][key]) for p in ps]
            for its, ps in ((optimizer, parameters), (oracle, expected))
        )
        assert torch.equal(ours[0][others], theirs[0][others])
        assert torch.equal(ours[1], theirs[1])
    assert parameters[0][2].isnan().any()


def test_parameters_and_states_get_new_versions_and_gradients_do_not(snapshots):
    model = net()
    optimizer = SGD_AGC(model.parameters(), LR, ema_decay=0.9)
    train(model, optimizer, 1)
    for _ in range(2):
        backward(model, optimizer)
        written: list[Tensor] = [
            *model.parameters(),
            *(x for state in optimizer.state.values() for x in state.values()),
        ]
        before, grads = [x._version for x in written], [p.grad._version for p in model.parameters()]
        optimizer.step()
        assert all(x._version > old for x, old in zip(written, before, strict=True))
        assert [p.grad._version for p in model.parameters()] == grads


@pytest.mark.parametrize("make", [
    lambda model: SGD_AGC(model.parameters(), LR, statistics=True),
    lambda model: AGC(torch.optim.SGD(model.parameters(), LR, momentum=0.9), statistics=True),
], ids=["SGD_AGC", "AGC"])  # fmt: skip
def test_two_threads_train_two_models(make):
    models = [net(), net()]
    expected = [copy.deepcopy(model) for model in models]
    for model in expected:
        train(model, make(model), 30)
    failures: list[BaseException] = []

    def run(model: nn.Module) -> None:
        try:
            train(model, make(model), 30)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for model, alone in zip(models, expected, strict=True):
        assert_same_parameters(model, alone)


def test_ten_thousand_steps_keep_nothing():
    """Gradients move in each step, and now and then there is none."""
    parameters = [parameter(*random_pair((3, 4))) for _ in range(2)]
    optimizer = SGD_AGC(parameters, 1e-3, ema_decay=0.9, statistics=True)

    def steps(count: int) -> tuple[int, int]:
        for step in range(count):
            parameters[step % 2].grad = None if step % 50 == 0 else torch.ones(3, 4)
            optimizer.step()
        gc.collect()
        return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        steps(200)
        objects, memory = steps(200)
        objects_after, memory_after = steps(10_000)
    finally:
        tracemalloc.stop()
    assert objects_after - objects < 100
    assert memory_after - memory < 20_000  # 2 bytes a step
