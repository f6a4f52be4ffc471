"""Tensors that torch negates when they are read, such as the imaginary part of a conjugate, are what they show.

Kernels read memory, where they are not negated. Found by the robustness campaign: docs/robustness.md.
"""

import pytest
import torch
from torch import Tensor, nn

from nfnets_kernels.functional import residual, scaled_activation
from nfnets_kernels.optim import SGD_AGC

from .helpers import assert_same, available, randn


def negated(x: Tensor) -> Tensor:
    """The same values, negated when they are read."""
    view = torch._neg_view(-x)
    assert view.is_neg() and torch.equal(view, x)
    return view


def trained(gradients: list[Tensor], backend: str) -> Tensor:
    weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
    optimizer = SGD_AGC([weight], 0.1, backend=backend)
    for grad in gradients:
        weight.grad = grad
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("backend", available("sgd_agc"))
def test_gradients_of_steps(backend):
    gradients = list(randn((6, 4, 3)))
    expected = trained(gradients, backend)
    assert_same(trained(list(map(negated, gradients)), backend), expected)
    # The second step would reuse what the first has collected.
    assert_same(trained([gradients[0], *map(negated, gradients[1:])], backend), expected)


@pytest.mark.parametrize("backend", available("sgd_agc"))
def test_gradient_that_autograd_has_negated(backend):
    weight = nn.Parameter(torch.ones(()))
    optimizer = SGD_AGC([weight], 0.1, 0.0, nesterov=False, weight_decay=0.0, clip_factor=None, backend=backend)
    for steps in (1, 2):
        optimizer.zero_grad()
        torch.view_as_real(torch.complex(torch.ones(()), weight).conj() * 2j).sum().backward()
        assert weight.grad.is_neg()
        optimizer.step()
        assert weight.item() == pytest.approx(1.0 - 0.2 * steps)


@pytest.mark.parametrize("backend", available("scaled_activation", "relu"))
def test_activation_in_place(backend):
    x = randn((2, 3, 4))
    expected = scaled_activation(x, "relu", backend=backend)
    view = negated(x)
    assert scaled_activation(view, "relu", inplace=True, backend=backend) is view
    assert_same(view.clone(), expected)


@pytest.mark.parametrize("which", ["f", "shortcut", "bias"])
@pytest.mark.parametrize("backend", available("residual", "relu"))
@torch.no_grad()  # with a graph, torch lets no function overwrite a view
def test_residual_in_place(backend, which):
    inputs = {"f": randn((2, 3, 4)), "shortcut": randn((2, 3, 4)), "bias": randn(3)}
    expected = residual(**inputs, backend=backend)
    results = residual(**inputs | {which: negated(inputs[which])}, inplace=True, backend=backend)
    assert_same([x.clone() for x in results], list(expected))
