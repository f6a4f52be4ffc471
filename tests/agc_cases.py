"""What the tests of adaptive gradient clipping share: kernels, parameters with gradients, and the float64 results."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nfnets_kernels as nfk
from nfnets_kernels import AGC
from nfnets_kernels import backend as backends
from nfnets_kernels.reference import agc as reference

from .helpers import serving, targets
from .tolerances import assert_accurate

RULES = ("timm", "deepmind")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NORMS = (2.0, 1.0, math.inf, 3.0, 0.5)


KERNELS = targets("agc")


@contextlib.contextmanager
def using(kernel: str) -> Iterator[str]:
    """Selects what a name such as "cpu:avx2" says and gives the backend to ask for: no other may serve inside."""
    with serving(kernel) as name, backends.recording() as record:
        yield name
    assert set(record) <= {("agc", name)}, record


def without_exchange_api(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch look like one that does not describe its tensors to C++: older than 2.11, say."""
    monkeypatch.delattr(Tensor, "__dlpack_c_exchange_api__", raising=False)


def parameter(weight: Tensor, grad: Tensor | None) -> nn.Parameter:
    p = nn.Parameter(weight)
    p.grad = grad
    return p


def random_pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A weight, and a gradient whose units are a third (the first) to a thousandth of it: at 0.01 most are clipped."""
    grad = torch.randn(shape)
    if len(shape) > 1:
        grad *= torch.logspace(-0.5, -3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return torch.randn(shape).to(dtype), grad.to(dtype)


def unit_length(shape: torch.Size, rule: str) -> int:
    return shape.numel() if reference.is_one_unit(shape, rule) else shape[1:].numel()


def float64_clipped(
    weight: Tensor,
    grad: Tensor,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float = 2.0,
    rule: str = "timm",
) -> Tensor:
    out = grad.detach().to(torch.float64, copy=True)
    reference.agc_(weight.detach().to(torch.float64), out, clip_factor, eps, norm_type, rule)
    return out


def assert_clips(
    backend: str, weight: Tensor, grad: Tensor, rule: str = "timm", expected: Tensor | None = None, **options: Any
) -> Tensor:
    """Clips `grad` in place, compares it with `expected` (default: the float64 reference), and returns it."""
    if expected is None:
        expected = float64_clipped(weight, grad, rule=rule, **options)
    nfk.agc_(parameter(weight, grad), rule=rule, backend=backend, **options)
    assert_clipped(grad, expected, unit_length(grad.shape, rule))
    return grad


def assert_clipped(grad: Tensor, expected: Tensor, length: int, roundings: int = 1) -> None:
    """Each element is within its own half ulp per rounding, and the errors of float32 norms over `length` elements."""
    assert_accurate(grad, expected, unit_length=length, ulps=0.5 * roundings, magnitude=0.0)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


class Net(nn.Module):
    """Convolution, nested modules, a linear layer and one tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.body = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.GELU()))
        self.fc = nn.Linear(6, 5)
        self.tied = nn.Linear(6, 5, bias=False)
        self.tied.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x)).mean(dim=(2, 3))
        return self.fc(x) + self.tied(x)


def loss(model: nn.Module) -> Tensor:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    dtype = next(model.parameters()).dtype
    return 100 * nn.functional.cross_entropy(model(x.to(dtype)).float(), torch.tensor([0, 1, 2, 3]))


def with_gradients() -> Net:
    model = Net()
    loss(model).backward()
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def changed(model: nn.Module, agc: AGC) -> set[str]:
    """Names of the parameters whose gradients `clip_` changes."""
    before = gradients(model)
    agc.clip_()
    return {name for name, grad in gradients(model).items() if not torch.equal(grad, before[name])}


def assert_clips_as_agc_does(agc: AGC, parameters: list[nn.Parameter], **options: Any) -> None:
    """One step: `clip_` leaves in the gradients, bit for bit, what `agc_` leaves, and changes them."""
    before = [p.grad for p in parameters]
    copies = [grad.clone() for grad in before]
    agc.clip_()
    for p, copied in zip(parameters, copies, strict=True):
        p.grad = copied.clone()
    nfk.agc_(parameters, **options)
    for p, grad, copied in zip(parameters, before, copies, strict=True):
        assert torch.equal(bits(p.grad), bits(grad)), f"clip_ gave another gradient of {tuple(p.shape)} than agc_"
        assert not torch.equal(grad, copied), f"the gradient of {tuple(p.shape)} was not clipped"


ALL = {"stem.weight", "stem.bias", "body.0.weight", "body.0.bias", "body.1.0.weight", "fc.weight", "fc.bias"}
