"""`nfk.AGC`: which parameters it clips, what it refuses, and that it can be copied and saved with its model."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from nfnets_kernels import AGC

from .agc_cases import ALL, Net, changed, gradients, loss, with_gradients


@pytest.mark.parametrize(
    "exclude, unclipped",
    [
        ((), set()),
        (["stem"], {"stem.weight", "stem.bias"}),
        (["body.1"], {"body.1.0.weight"}),
        (("body",), {"body.0.weight", "body.0.bias", "body.1.0.weight"}),
        (["fc"], {"fc.weight", "fc.bias"}),
        (["tied"], {"fc.weight"}),  # its weight is fc's: excluded wins
        (["stem", "body.0", "stem"], {"stem.weight", "stem.bias", "body.0.weight", "body.0.bias"}),
        (["stem", "body", "fc"], ALL),
        ({"body.1.1"}, set()),  # has no parameters
    ],
    ids=lambda names: str(sorted(names)),
)
@pytest.mark.parametrize("as_objects", [False, True])
def test_excluded_modules_stay_unclipped_with_what_they_contain(exclude, unclipped, as_objects):
    model = with_gradients()
    exclude = [model.get_submodule(name) for name in exclude] if as_objects else exclude
    assert changed(model, AGC(model, exclude=exclude)) == ALL - unclipped


def test_names_and_objects_mix():
    model = with_gradients()
    agc = AGC(model, exclude=["stem", model.fc])
    assert changed(model, agc) == {"body.0.weight", "body.0.bias", "body.1.0.weight"}


@pytest.mark.parametrize(
    "name, close",
    [
        ("fcs", "'fc'"),
        ("Stem", "'stem'"),
        ("body.2", r"'body\.[01]'"),
        ("0", "'body.0'"),
        ("fc.weight", ""),
        ("head", ""),
    ],
)
def test_a_name_that_matches_nothing_is_named_with_close_ones(name, close):
    with pytest.raises(ValueError, match=f"exclude.*'{name}'.*{close}"):
        AGC(Net(), exclude=["stem", name])


def test_a_module_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"exclude.*Linear.*not part of the model"):
        AGC(Net(), exclude=[nn.Linear(2, 2)])


@pytest.mark.parametrize("exclude", ["fc", nn.Linear(2, 2)], ids=["name", "module"])
def test_exclude_is_a_sequence(exclude):
    with pytest.raises(TypeError, match="exclude must be a sequence"):
        AGC(Net(), exclude=exclude)


@pytest.mark.parametrize("entry", [3, None, nn.Parameter(torch.ones(2))], ids=["int", "None", "parameter"])
def test_exclude_holds_names_or_modules(entry):
    with pytest.raises(TypeError, match=f"exclude.*{type(entry).__name__}"):
        AGC(Net(), exclude=[entry])


def test_names_need_a_model():
    model = Net()
    with pytest.raises(ValueError, match=r"exclude.*'fc'"):
        AGC(model.parameters(), exclude=["fc"])


def test_parameters_instead_of_a_module():
    model = with_gradients()
    assert changed(model, AGC(model.body.parameters())) == {"body.0.weight", "body.0.bias", "body.1.0.weight"}
    model = with_gradients()
    assert changed(model, AGC([model.fc.bias, model.fc.bias])) == {"fc.bias"}
    assert changed(model, AGC(model.stem.bias)) == {"stem.bias"}
    model = with_gradients()
    assert changed(model, AGC(model.parameters(), exclude=[model.fc])) == ALL - {"fc.weight", "fc.bias"}


def test_a_generator_of_parameters_serves_every_step():
    model = Net()
    agc = AGC(p for p in model.parameters())
    for _ in range(3):
        model.zero_grad()
        loss(model).backward()
        assert changed(model, agc) == ALL


@pytest.mark.parametrize("value", ["model", 3, None], ids=str)
def test_what_is_no_module_and_no_parameters_is_named(value):
    with pytest.raises(TypeError, match=f"module_or_params .*{type(value).__name__}"):
        AGC(value)


@pytest.mark.parametrize("entry", ["weight", ("fc", nn.Parameter(torch.ones(2))), {"params": []}, None], ids=type)
def test_what_is_no_parameter_is_named(entry):
    with pytest.raises(TypeError, match=f"module_or_params .*{type(entry).__name__}"):
        AGC([nn.Parameter(torch.ones(2)), entry])


BAD_OPTIONS = [("clip_factor", -1.0), ("eps", math.nan), ("norm_type", 0.0), ("rule", "lamb"), ("backend", "tpu")]


@pytest.mark.parametrize("name, value", BAD_OPTIONS)
def test_bad_options_are_refused_at_construction(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        AGC(Net(), **{name: value})


def test_a_tied_parameter_is_clipped_once():
    """A second clip would multiply by bound / 1e-6: the bound, 2^-24, is exactly what the first leaves."""
    first, second = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    first.weight = second.weight = nn.Parameter(torch.full((2, 1), 2.0**-20))
    first.weight.grad = torch.ones(2, 1)
    AGC(nn.ModuleList([first, nn.Sequential(second, first)]), 2.0**-4, 0.0).clip_()
    assert torch.equal(first.weight.grad, torch.full((2, 1), 2.0**-24))


def through_pickle(pair: tuple[nn.Module, AGC]) -> tuple[nn.Module, AGC]:
    return pickle.loads(pickle.dumps(pair))


def through_torch_save(pair: tuple[nn.Module, AGC]) -> tuple[nn.Module, AGC]:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_clips_the_copied_model_and_not_the_first(duplicate):
    model = with_gradients()
    agc = AGC(model, 0.02, 1e-2, norm_type=1.0, rule="deepmind", exclude=["fc"])
    agc.clip_()
    model.zero_grad()
    twin, agc = duplicate((model, agc))
    loss(model).backward()
    loss(twin).backward()
    before = gradients(model)
    assert changed(twin, agc) == ALL - {"fc.weight", "fc.bias"}
    assert all(torch.equal(grad, before[name]) for name, grad in gradients(model).items())
    assert (agc.clip_factor, agc.eps, agc.norm_type, agc.rule, agc.backend) == (0.02, 1e-2, 1.0, "deepmind", "auto")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_without_its_model_is_complete(duplicate):
    model = with_gradients()
    agc = AGC(model)
    agc.clip_()
    model.zero_grad()
    agc = duplicate(agc)
    agc.clip_()
    assert repr(agc) == repr(AGC(model))
    loss(model).backward()
    assert changed(model, agc) == set()
