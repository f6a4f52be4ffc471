"""`ScaledActivation` and its three shorthands: values, gradients, repr, pickling, compilation, bad options."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn

import nfnets_kernels as nfk
from nfnets_kernels.functional import gamma, scaled_activation
from nfnets_kernels.reference.scaled_activation import GAMMA

from .helpers import assert_compiled_is_eager, assert_same, outputs_and_gradients
from .tolerances import assert_accurate

SHORTHANDS = {
    "ScaledReLU": (nfk.ScaledReLU, nn.ReLU(), GAMMA["relu"]),
    "ScaledGELU": (nfk.ScaledGELU, nn.GELU(), GAMMA["gelu"]),
    "ScaledGELU(tanh)": (lambda **options: nfk.ScaledGELU("tanh", **options), nn.GELU("tanh"), GAMMA["gelu"]),
    "ScaledSiLU": (nfk.ScaledSiLU, nn.SiLU(), GAMMA["silu"]),
}
MODULES = {
    **{name: nfk.ScaledActivation(name, beta=0.5) for name in GAMMA},
    **{name: make(beta=0.5) for name, (make, _, _) in SHORTHANDS.items()},
}

each_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
each_shorthand = pytest.mark.parametrize(("make", "torchs", "gain"), SHORTHANDS.values(), ids=SHORTHANDS)


def inputs():
    return torch.randn(2, 6, 5, 3).requires_grad_()


@pytest.mark.parametrize("name", GAMMA)
def test_every_name_is_the_functional_one(name):
    x = inputs()
    cases = [
        (nfk.ScaledActivation(name), lambda x: scaled_activation(x, name)),
        (nfk.ScaledActivation(name, 0.7, 3.0), lambda x: scaled_activation(x, name, 0.7, 3.0)),
        (nfk.ScaledActivation(name, beta=3.0), lambda x: scaled_activation(x, name, gamma(name), 3.0)),
    ]
    for module, function in cases:
        assert_same(outputs_and_gradients(module, [x]), outputs_and_gradients(function, [x]))


@each_shorthand
def test_shorthand_is_torchs_module_times_gain_and_beta(make, torchs, gain):
    x = inputs()
    double = x.detach().double().requires_grad_()
    for options, scale in (({}, gain), ({"beta": 0.5}, 0.5 * gain), ({"gamma": 2.0, "beta": 0.5}, 1.0)):
        actual = outputs_and_gradients(make(**options), [x])
        expected = outputs_and_gradients(lambda x, scale=scale: scale * torchs(x), [double])
        for value, reference in zip(actual, expected, strict=True):
            assert_accurate(value, reference, ulps=4)


def test_gelu_takes_approximate_first_as_torch_does():
    assert next(iter(inspect.signature(nfk.ScaledGELU).parameters)) == "approximate"
    x = 2 * torch.randn(1000, dtype=torch.float64)
    assert_same(nfk.ScaledActivation("gelu", approximate="tanh")(x), nfk.ScaledGELU("tanh")(x))
    assert not torch.allclose(nfk.ScaledGELU("tanh")(x), nfk.ScaledGELU()(x), rtol=0, atol=1e-6)


@each_module
def test_pickle_and_deepcopy(module):
    x = inputs()
    expected = outputs_and_gradients(module, [x])
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert repr(other) == repr(module)
        assert_same(outputs_and_gradients(other, [x]), expected)
    assert not module.state_dict()


@each_module
def test_repr_makes_an_equal_module(module):
    arguments = repr(module).partition("(")[2].rpartition(")")[0]
    other = eval(f"ScaledActivation({arguments})", {"ScaledActivation": nfk.ScaledActivation})
    x = inputs()
    assert_same(outputs_and_gradients(other, [x]), outputs_and_gradients(module, [x]))


@each_module
def test_compiles_without_graph_breaks(module):
    assert_compiled_is_eager(module, [inputs()])


@each_module
def test_exports(module):
    x = inputs().detach()
    assert_same(torch.export.export(module, (x,)).module()(x), module(x))


@pytest.mark.parametrize("name", ["swish", "ReLU", "", None])
def test_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"name must be one of .*relu.*{name!r}"):
        nfk.ScaledActivation(name)


@pytest.mark.parametrize("approximate", ["tan", True, None])
def test_unknown_approximation_is_refused(approximate):
    with pytest.raises(ValueError, match=r"approximate must be one of .*tanh"):
        nfk.ScaledGELU(approximate)


@pytest.mark.parametrize("options", [{"gamma": math.nan}, {"gamma": math.inf}, {"beta": math.nan}, {"beta": -math.inf}])
@each_shorthand
def test_scales_that_are_not_finite_are_refused(make, torchs, gain, options):
    with pytest.raises(ValueError, match="gamma"):
        make(**options)


def test_bad_inputs_are_refused():
    with pytest.raises(TypeError, match="x must have one of the dtypes"):
        nfk.ScaledReLU()(torch.arange(3))
    with pytest.raises(ValueError, match="even number of channels"):
        nfk.ScaledActivation("glu")(torch.randn(2, 3))
