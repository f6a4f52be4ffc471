"""`nfk.agc_` called again and again: from the second call on it reuses what it collected, and nobody can tell."""

import gc
import weakref

import pytest
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nfnets_kernels as nfk
from nfnets_kernels.ops import agc

from .agc_cases import (
    KERNELS,
    Net,
    assert_clipped,
    loss,
    parameter,
    random_pair,
    unit_length,
    using,
    without_exchange_api,
)

SHAPES = ((6, 35), (17,), (5, 1, 1, 1), (4, 3, 3, 3), ())


@pytest.fixture(autouse=True)
def nothing_remembered():
    agc._recent.clear()
    yield
    agc._recent.clear()


def parameters() -> list[nn.Parameter]:
    return [parameter(*random_pair(shape)) for shape in SHAPES]


def renew(chosen: list[nn.Parameter]) -> None:
    for p in chosen:
        p.grad = 10 * random_pair(p.shape, p.dtype)[1]


def assert_clips_as_timm(chosen: list[nn.Parameter], clip_factor: float = 0.01, **options: str) -> None:
    twins = [parameter(p.detach().double(), p.grad.double()) for p in chosen if p.grad is not None]
    adaptive_clip_grad(twins, clip_factor)
    nfk.agc_(chosen, clip_factor, **options)
    clipped = [p for p in chosen if p.grad is not None]
    for p, twin in zip(clipped, twins, strict=True):
        assert_clipped(p.grad, twin.grad, unit_length(p.shape, "timm"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_call_clips_as_timm(kernel):
    chosen = parameters()
    with using(kernel) as backend:
        for clip_factor in (0.01, 0.01, 0.03):
            renew(chosen)
            assert_clips_as_timm(chosen, clip_factor, backend=backend)


def test_from_the_second_call_on_nothing_is_checked_again(monkeypatch):
    model = Net()
    loss(model).backward()
    nfk.agc_(model.parameters())
    monkeypatch.setattr(agc, "with_gradients", None)
    for _ in range(2):
        model.zero_grad()
        loss(model).backward()
        assert_clips_as_timm(list(model.parameters()))


def change_dtype(p: nn.Parameter) -> None:
    p.grad = None
    p.data = p.data.double()


CHANGES = {
    "no gradient": lambda chosen: setattr(chosen[1], "grad", None),
    "other dtype": lambda chosen: change_dtype(chosen[0]),
    "other memory": lambda chosen: setattr(chosen[0], "data", 3 * chosen[0].data),
    "other order": lambda chosen: chosen.reverse(),
    "one more": lambda chosen: chosen.append(parameter(*random_pair((3, 4)))),
    "one less": lambda chosen: chosen.pop(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_what_changes_between_calls(change):
    chosen = parameters()
    nfk.agc_(chosen)
    CHANGES[change](chosen)
    for _ in range(2):
        renew([p for p in chosen if p.grad is not None or change != "no gradient"])
        assert_clips_as_timm(chosen)


def test_one_that_comes_twice_is_clipped_once_in_every_call():
    """A second clip would multiply by bound / 1e-6: the bound, 2^-24, is exactly what the first leaves."""
    p = nn.Parameter(torch.full((2, 1), 2.0**-20))
    for _ in range(3):
        p.grad = torch.ones(2, 1)
        nfk.agc_([p, p], 2.0**-4, 0.0)
        assert torch.equal(p.grad, torch.full((2, 1), 2.0**-24))


@pytest.mark.parametrize("exchange_api", [True, False])
def test_no_parameter_is_kept_alive(exchange_api, monkeypatch):
    if not exchange_api:
        without_exchange_api(monkeypatch)
    chosen = parameters()
    for _ in range(2):
        renew(chosen)
        nfk.agc_(chosen)
    held = [weakref.ref(x) for p in chosen for x in (p, p.grad)]
    del chosen
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_what_is_remembered_is_bounded():
    models = [parameters() for _ in range(40)]
    for chosen in models:
        nfk.agc_(chosen)
    assert len(agc._recent) == 16
    for chosen in models:
        renew(chosen)
        assert_clips_as_timm(chosen)


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
        self.ops.append(str(function))
        return function(*args, **(kwargs or {}))


def test_modes_see_every_call():
    chosen = parameters()
    for _ in range(2):
        renew(chosen)
        with Watch() as watch:
            nfk.agc_(chosen)
        assert watch.ops.count("nfnets_kernels.agc_.default") == 1


def test_bad_options_are_refused_in_every_call():
    p = parameter(torch.ones(3, 4), torch.ones(3, 4))
    nfk.agc_(p)
    grad: Tensor = p.grad.clone()
    for options, message in (({"clip_factor": -1.0}, "clip_factor"), ({"rule": "lamb"}, "rule")):
        with pytest.raises(ValueError, match=message):
            nfk.agc_(p, **options)
    assert torch.equal(p.grad, grad)
