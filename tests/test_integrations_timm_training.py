"""`use_agc`: training with timm's pieces and our clipping is timm's training, and timm becomes timm again."""

import contextlib
from collections.abc import Callable
from unittest import mock

import pytest
import timm
import timm.utils
import timm.utils.agc
import torch
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import nn

import nfnets_kernels as nfk
from nfnets_kernels import backend
from nfnets_kernels.integrations.timm import use_agc

from .agc_cases import assert_clipped, float64_clipped, random_pair
from .module_helpers import on_one_thread

one_thread = pytest.fixture(on_one_thread, autouse=True)

STEPS = 5
TIMMS = timm.utils.agc.adaptive_clip_grad


@pytest.fixture(autouse=True)
def timm_is_timms_afterwards():
    yield
    assert timm.utils.adaptive_clip_grad is timm.utils.agc.adaptive_clip_grad is TIMMS
    assert timm.utils.clip_grad.adaptive_clip_grad is TIMMS


def dispatch(loss: torch.Tensor, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """As timm's train.py without a scaler."""
    loss.backward()
    dispatch_clip_grad(model_parameters(model, exclude_head=True), value=0.01, mode="agc")
    optimizer.step()


class Scaled:
    """As timm's train.py with `--amp`, its parameters from a generator."""

    def __init__(self) -> None:
        self.scaler = NativeScaler("cpu")

    def __call__(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.scaler(loss, optimizer, clip_grad=0.01, clip_mode="agc", parameters=iter(model_parameters(model, True)))


def train(step: Callable, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = timm.create_model("test_nfnet", num_classes=4).to(dtype)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9, weight_decay=2e-5)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(4, 3, 32, 32, dtype=dtype)
        loss = 10 * nn.functional.cross_entropy(model(images), torch.arange(4))
        step(loss, optimizer, model)
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("make_step", [lambda: dispatch, Scaled], ids=["dispatch_clip_grad", "NativeScaler"])
def test_training_with_timm_goes_the_same_way(make_step):
    """In float64, where the two ways to round a clipped gradient do not drift apart."""
    expected, losses = train(make_step())
    with backend.recording() as before:
        train(make_step())
    with use_agc(), backend.recording() as record:
        model, our_losses = train(make_step())
    assert not [op for op, _ in before if op == "agc"]
    assert [op for op, _ in record if op == "agc"]
    torch.testing.assert_close(our_losses, losses, rtol=1e-9, atol=0)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_clipping_changes_that_training():
    """Else the test above could not fail."""
    _, losses = train(dispatch)
    with mock.patch.object(timm.utils.clip_grad, "adaptive_clip_grad"):
        _, unclipped = train(dispatch)
    assert abs(unclipped[-1] - losses[-1]) > 1e-3 * losses[-1]


@pytest.mark.parametrize("options", [{}, {"clip_factor": 0.05, "eps": 0.1, "norm_type": 1.0}], ids=str)
def test_the_function_takes_timms_arguments(options):
    weight, grad = random_pair((5, 3, 3, 3))
    expected = float64_clipped(weight, grad, **options)
    p = nn.Parameter(weight)
    p.grad = grad
    with use_agc():
        timm.utils.adaptive_clip_grad(p, *options.values())
    assert_clipped(p.grad, expected, 27)
    with use_agc():
        timm.utils.agc.adaptive_clip_grad((q for q in [p]), **options)


def test_other_modes_are_timms():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 4.0)
    with use_agc():
        dispatch_clip_grad([p], 0.5, mode="value")
    assert torch.equal(p.grad, torch.full((3,), 0.5))


def is_ours() -> bool:
    return timm.utils.clip_grad.adaptive_clip_grad is not TIMMS


def test_it_can_be_undone():
    undo = use_agc()
    assert is_ours()
    undo.close()
    assert not is_ours()
    undo.close()
    assert not is_ours()
    with contextlib.suppress(KeyError), use_agc():
        assert is_ours()
        raise KeyError
    assert not is_ours()


def test_a_second_call_changes_nothing():
    with use_agc():
        first = timm.utils.clip_grad.adaptive_clip_grad
        with use_agc():
            assert timm.utils.clip_grad.adaptive_clip_grad is first
        assert is_ours()
    assert not is_ours()


def test_what_was_there_comes_back():
    def somebodys(parameters, clip_factor=0.01, eps=1e-3, norm_type=2.0):
        raise NotImplementedError

    with mock.patch.object(timm.utils.clip_grad, "adaptive_clip_grad", somebodys):
        with use_agc():
            dispatch_clip_grad([nn.Parameter(torch.ones(1))], 0.01, mode="agc")
        assert timm.utils.clip_grad.adaptive_clip_grad is somebodys


def test_it_is_reached_through_the_package():
    assert nfk.integrations.timm.use_agc is use_agc
