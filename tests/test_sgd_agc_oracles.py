"""Several steps of `sgd_agc_` against other people's code: timm's clipping with torch's SGD and averages, and optax."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
import optax
import pytest
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .sgd_agc_cases import KERNELS, OPTIONS, Parameter, random_parameter, step, using
from .tolerances import assert_accurate

STEPS = 4
SHAPES = [(), (17,), (7, 1, 1, 1), (1, 64, 1, 1), (10, 48), (4, 6, 3, 3)]


@pytest.fixture(params=KERNELS)
def backend(request) -> Iterator[str]:
    with using(request.param) as name:
        yield name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"nesterov": False, "dampening": 0.5, "maximize": True}], ids=str)
def test_steps_are_those_of_timms_clipping_and_torchs_sgd(backend, dtype, options):
    parameters = [random_parameter(shape, dtype) for shape in ((17,), (6, 35), (4, 3, 3, 3), (3, 1, 1, 1))]
    for p in parameters:
        p.momentum_buffer.zero_()
        p.average.copy_(p.weight)
    theirs = [nn.Parameter(p.weight.to(torch.float64, copy=True)) for p in parameters]
    averages = [p.detach().clone() for p in theirs]
    all_options = {**OPTIONS, **options}
    names = "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"
    sgd = torch.optim.SGD(theirs, **{name: all_options[name] for name in names})
    for i in range(STEPS):
        for p, q in zip(parameters, theirs, strict=True):
            p.grad = random_parameter(p.weight.shape, dtype).grad
            q.grad = p.grad.to(torch.float64, copy=True)
        adaptive_clip_grad(theirs, all_options["clip_factor"], all_options["eps"])
        sgd.step()
        get_ema_multi_avg_fn(OPTIONS["ema_decay"])(averages, [q.detach() for q in theirs], None)
        step(parameters, backend, **{**options, "dampening": 0.0 if i == 0 else all_options["dampening"]})
    for p, q, average in zip(parameters, theirs, averages, strict=True):
        assert_accurate(p.weight, q.detach(), unit_length=35, ulps=2.0 * STEPS)
        assert_accurate(p.momentum_buffer, sgd.state[q]["momentum_buffer"], unit_length=35, ulps=2.0 * STEPS)
        assert_accurate(p.average, average, unit_length=35, ulps=2.0 * STEPS)


@functools.cache
def optax_steps(nesterov: bool) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Weights before the first of STEPS steps, the gradients of each, and the weights after the last."""

    def theirs(tensors: list[Tensor]) -> list[np.ndarray]:
        """(O, I, ...) is its (..., I, O): its units are in the last axis."""
        return [(x.movedim((0, 1), (-1, -2)) if x.ndim >= 2 else x).numpy() for x in tensors]

    first, *grads = ([random_parameter(shape, torch.float64).grad for shape in SHAPES] for _ in range(STEPS + 1))
    decay = optax.add_decayed_weights(OPTIONS["weight_decay"])
    sgd = optax.sgd(OPTIONS["lr"], OPTIONS["momentum"], nesterov)
    with jax.enable_x64(True):
        rule = optax.chain(optax.adaptive_grad_clip(OPTIONS["clip_factor"], OPTIONS["eps"]), decay, sgd)
        weights = theirs(first)
        state = rule.init(weights)
        for of_step in grads:
            updates, state = rule.update(theirs(of_step), state, weights)
            weights = optax.apply_updates(weights, updates)
        last = [torch.tensor(np.asarray(x)) for x in weights]
    return [first, *grads], [x.movedim((-1, -2), (0, 1)) if x.ndim >= 2 else x for x in last]


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_are_those_of_optax(backend, nesterov):
    (first, *grads), last = optax_steps(nesterov)
    parameters = [Parameter(w.clone(), torch.zeros_like(w), torch.zeros_like(w)) for w in first]
    for of_step in grads:
        for p, grad in zip(parameters, of_step, strict=True):
            p.grad = grad.clone()
        step(parameters, backend, rule="deepmind", nesterov=nesterov)
    for p, expected in zip(parameters, last, strict=True):
        assert_accurate(p.weight, expected, unit_length=64, ulps=2.0 * STEPS)
