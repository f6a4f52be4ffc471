"""`nfk.agc_` against other people's code: the authors' golden vectors, optax and timm."""

import math
from collections.abc import Iterator

import jax
import numpy as np
import optax
import pytest
import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

import nfnets_kernels as nfk

from .agc_cases import KERNELS, NORMS, assert_clipped, assert_clips, parameter, random_pair, unit_length, using

GOLDEN_CASES = ["conv", "conv1x1", "linear", "bias", "scalar", "zero_weight", "gain", "wide"]
OPTAX_SHAPES = [
    *[(), (17,), (17, 1, 1, 1), (1, 1, 1, 1), (1, 64, 1, 1), (10, 48), (1, 48), (12, 8, 3, 3), (12, 8, 1, 1)],
    *[(3, 4608, 1, 1), (4, 3, 2, 3, 2)],
]
TIMM_SHAPES = [(), (1,), (17,), (17, 1, 1, 1), (10, 48), (5, 6, 7), (12, 8, 3, 3), (3, 4608), (4, 3, 2, 3, 2)]


@pytest.fixture(params=KERNELS)
def backend(request) -> Iterator[str]:
    with using(request.param) as name:
        yield name


def timm_clipped(weight: Tensor, grad: Tensor, **options: float) -> Tensor:
    p = parameter(weight.detach().double(), grad.detach().to(torch.float64, copy=True))
    adaptive_clip_grad(p, **options)
    return p.grad


def optax_clipped(weight: Tensor, grad: Tensor, clip_factor: float, eps: float) -> Tensor:
    """Transposes (O, I, ...) to optax's (..., I, O) and back."""
    matrix = weight.ndim >= 2
    w, g = (t.movedim((0, 1), (-1, -2)).numpy() if matrix else t.numpy() for t in (weight, grad))
    with jax.enable_x64(True):
        rule = optax.adaptive_grad_clip(clip_factor, eps)
        (clipped,), _ = rule.update([g], rule.init([w]), [w])
        out = torch.tensor(np.asarray(clipped))
    return out.movedim((-1, -2), (0, 1)) if matrix else out


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_deepmind_rule_gives_the_authors_numbers(backend, golden, case):
    weight, grad, clipped = (torch.tensor(golden[f"agc/{case}/{name}"]) for name in ("param", "grad", "clipped"))
    assert not torch.equal(grad, clipped)
    nfk.agc_(parameter(weight, grad), 0.01, 1e-3, rule="deepmind", backend=backend)
    # Theirs are rounded to float32 too.
    assert_clipped(grad, clipped.double(), unit_length(grad.shape, "deepmind"), roundings=2)


def test_every_golden_case_is_used(golden):
    assert {key.split("/")[1] for key in golden if key.startswith("agc/")} == set(GOLDEN_CASES)


@pytest.mark.parametrize("shape", OPTAX_SHAPES, ids=str)
@pytest.mark.parametrize("clip_factor, eps", [(0.01, 1e-3), (0.08, 30.0)])
def test_deepmind_rule_is_optax(backend, shape, clip_factor, eps):
    weight, grad = random_pair(shape, torch.float64)
    expected = optax_clipped(weight, grad, clip_factor, eps)
    assert_clips(backend, weight, grad, "deepmind", expected, clip_factor=clip_factor, eps=eps)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("shape", TIMM_SHAPES, ids=str)
@pytest.mark.parametrize("clip_factor, eps", [(0.01, 1e-3), (0.08, 30.0)])
def test_timm_rule_is_timm(backend, shape, norm_type, clip_factor, eps):
    weight, grad = random_pair(shape)
    options = {"clip_factor": clip_factor, "eps": eps, "norm_type": norm_type}
    assert_clips(backend, weight, grad, expected=timm_clipped(weight, grad, **options), **options)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("weight_value", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("grad_value", [1.0, math.nan, math.inf, -math.inf])
def test_what_is_not_finite_ends_as_in_timm(backend, weight_value, grad_value, norm_type):
    weight, grad = random_pair((4, 35))
    weight[1, 3], grad[1, 3] = weight_value, grad_value
    expected = timm_clipped(weight, grad, norm_type=norm_type)
    grad = assert_clips(backend, weight, grad, expected=expected, norm_type=norm_type)
    assert grad[1].isfinite().all() == (math.isfinite(grad_value) and not math.isnan(weight_value))
    assert grad[[0, 2, 3]].isfinite().all()


def test_a_timm_model_with_real_gradients_is_clipped_as_by_timm(backend):
    model = timm.create_model("test_nfnet", num_classes=10)
    nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 3])).backward()
    parameters = list(model.parameters())
    before = [p.grad.clone() for p in parameters]
    expected = [timm_clipped(p, p.grad) for p in parameters]
    nfk.agc_(model.parameters(), backend=backend)
    for p, clipped in zip(parameters, expected, strict=True):
        assert_clipped(p.grad, clipped, unit_length(p.shape, "timm"))
    changed = [not torch.equal(p.grad, grad) for p, grad in zip(parameters, before, strict=True)]
    assert any(changed)
    assert not all(changed)
