"""What the tests of `sgd_agc_` share: kernels, parameters with their states, and a float64 formula of the step.

The formula is written from torch.optim.SGD's documentation and from `adaptive_clip_grad` of timm ("timm") and optax
("deepmind"), not from the package's reference.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfnets_kernels import backend as backends
from nfnets_kernels.ops.sgd_agc import Call, Hyperparameters, Tensors, step_

from .agc_cases import bits
from .helpers import assert_rounded_once, serving, targets

KERNELS = targets("sgd_agc")
RULES = ("timm", "deepmind")
OPTIONS = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.02,
    "nesterov": True,
    "maximize": False,
    "clip_factor": 0.01,
    "eps": 1e-3,
    "ema_decay": 0.75,
}
op = torch.ops.nfnets_kernels.sgd_agc_


@contextlib.contextmanager
def using(kernel: str) -> Iterator[str]:
    """Selects what a name such as "cpu:avx2" says and gives the backend to ask for: no other may serve inside."""
    with serving(kernel) as name, backends.recording() as record:
        yield name
    assert set(record) <= {("sgd_agc", name)}, record


@dataclasses.dataclass
class Parameter:
    """A weight, its gradient and the states that there are."""

    weight: Tensor
    grad: Tensor
    momentum_buffer: Tensor | None = None
    average: Tensor | None = None
    statistics: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [x for x in vars(self).values() if x is not None]

    def clone(self) -> "Parameter":
        return Parameter(*[x if x is None else x.clone() for x in vars(self).values()])


def random_parameter(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    states: bool = True,
) -> Parameter:
    """The gradient's units are three times the weight (the first) to a thousandth of it: at 0.01 most are clipped."""
    weight, grad, momentum, average = torch.randn(4, *shape, dtype=torch.float64)
    if len(shape) > 1 and shape[0]:
        grad = grad * torch.logspace(0.5, -3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    grad = grad.to(grad_dtype or dtype)
    if not states:
        return Parameter(weight.to(dtype), grad)
    return Parameter(weight.to(dtype), grad, momentum.to(dtype), average.to(average_dtype(dtype)))


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def columns_of(parameters: Sequence[Parameter]) -> list[list[Any]]:
    return [[vars(p)[field.name] for p in parameters] for field in dataclasses.fields(Parameter)]


def step(
    parameters: Sequence[Parameter],
    backend: str,
    *,
    rule: str = "timm",
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **options: Any,
) -> None:
    """Through the op: the parameters must have the same states."""
    columns = [[x for x in column if x is not None] for column in columns_of(parameters)]
    op(*columns, lr_tensor, grad_scale, found_inf, **{**OPTIONS, **options}, rule=rule, backend=backend)


def step_groups(
    parameters: Sequence[Parameter],
    groups: Sequence[int],
    options: Sequence[dict[str, Any]],
    backend: str,
    *,
    rule: str = "timm",
    lrs: Sequence[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Several parameter groups in one call; each parameter has the states that it has."""
    hypers = [Hyperparameters(*{**OPTIONS, **of_group}.values()) for of_group in options]
    lrs = [None] * len(hypers) if lrs is None else list(lrs)
    step_(Tensors(*columns_of(parameters), list(groups)), Call(hypers, lrs, grad_scale, found_inf), rule, backend)


class Expected(NamedTuple):
    """In float64, each with the size of the terms that are added up in it."""

    weight: tuple[Tensor, Tensor]
    momentum_buffer: tuple[Tensor, Tensor]
    unit_length: int


def unit_norm(x: Tensor, rule: str) -> Tensor:
    """Of each index of dim 0, vectors being one unit; the authors squeeze before they look. Broadcasts over x."""
    if (x.squeeze() if rule == "deepmind" else x).ndim <= 1:
        return x.norm()
    return x.square().flatten(1).sum(dim=1).sqrt().view(-1, *[1] * (x.ndim - 1))


def clipped(weight: Tensor, grad: Tensor, clip_factor: float, eps: float, rule: str) -> Tensor:
    max_norm = clip_factor * unit_norm(weight, rule).clamp(min=eps)
    norm = unit_norm(grad, rule)
    return torch.where(norm < max_norm, grad, grad * (max_norm / norm.clamp(min=1e-6)))


def expected_step(
    p: Parameter,
    *,
    rule: str = "timm",
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    **options: Any,
) -> Expected:
    o = {**OPTIONS, **options}
    w, g = p.weight.detach().double(), p.grad.detach().double()
    g = g * (-1 if o["maximize"] else 1) / (1.0 if grad_scale is None else float(grad_scale))
    if o["clip_factor"] is not None:
        g = clipped(w, g, o["clip_factor"], o["eps"], rule)
    d, size = g + o["weight_decay"] * w, g.abs() + o["weight_decay"] * w.abs()
    m, m_size = d, size
    direction, direction_size = d, size
    if p.momentum_buffer is not None:
        before = o["momentum"] * p.momentum_buffer.double()
        m, m_size = before + (1 - o["dampening"]) * d, before.abs() + (1 - o["dampening"]) * size
        direction, direction_size = m, m_size
        if o["nesterov"]:
            direction, direction_size = d + o["momentum"] * m, size + o["momentum"] * m_size
    lr = o["lr"] * (1.0 if lr_tensor is None else float(lr_tensor))
    length = w.numel() // max(unit_norm(w, rule).numel(), 1) if w.numel() else 0
    return Expected((w - lr * direction, w.abs() + lr * direction_size), (m, m_size), length)


def assert_stepped(p: Parameter, before: Parameter, expected: Expected, ema_decay: float) -> None:
    """Weight and states are as expected, the gradient is what it was."""
    length = expected.unit_length
    assert torch.equal(bits(p.grad), bits(before.grad)), "a gradient was written"
    assert_rounded_once(p.weight, *expected.weight, unit_length=length)
    if p.momentum_buffer is not None:
        assert_rounded_once(p.momentum_buffer, *expected.momentum_buffer, unit_length=length)
    if p.average is not None:
        old, stored = before.average.double(), p.weight.detach().double()
        assert_rounded_once(p.average, ema_decay * old + (1 - ema_decay) * stored, old.abs() + stored.abs())


def assert_steps(backend: str, parameters: Sequence[Parameter], **options: Any) -> None:
    """One step of the op, in place, as the formula has it."""
    before = [p.clone() for p in parameters]
    scalars = {key: value for key, value in options.items() if key != "found_inf"}
    expected = [expected_step(p, **scalars) for p in parameters]
    step(parameters, backend, **options)
    for p, old, of_p in zip(parameters, before, expected, strict=True):
        assert_stepped(p, old, of_p, {**OPTIONS, **options}["ema_decay"])
