"""`param_groups`: what is decayed and what is clipped, against the authors' and timm's own rules."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import model_parameters
from torch import nn
from torch.nn.utils import parametrize, prune

import nfnets_kernels as nfk
from nfnets_kernels.integrations.timm import accelerate
from nfnets_kernels.models.weights import _haiku_name
from nfnets_kernels.optim.param_groups import ParamGroups, param_groups

from .agc_cases import Net, loss
from .module_helpers import on_one_thread

one_thread = pytest.fixture(on_one_thread, autouse=True)

DECAYED, HEAD = ("decay", "head_decay"), ("head_decay", "head_no_decay")
TINY: dict[str, Any] = {"depth": (1, 2, 1, 1), "num_classes": 10}


def tiny_nfnet() -> nn.Module:
    return nfk.models.NFNet((32, 48, 64, 64), group_width=8, **TINY)


def tiny_nf_resnet() -> nn.Module:
    return nfk.models.NFResNet(width=1, **TINY)


def tiny_nf_regnet() -> nn.Module:
    return nfk.models.NFRegNet((16, 16, 24, 32), group_width=8, **TINY)


def names_in(groups: ParamGroups, *which: str) -> set[str]:
    return {name for group in groups if group["name"] in which for name, _ in group["params"]}


def decayed(module: nn.Module) -> set[str]:
    return names_in(param_groups(module, head=()), *DECAYED)


def test_the_groups_hold_what_an_optimizer_needs():
    model = tiny_nf_resnet()
    groups = param_groups(model, weight_decay=5e-5, clip_factor=0.02)
    assert isinstance(groups, list)
    assert [(g["name"], g["weight_decay"], g["clip_factor"]) for g in groups] == [
        ("decay", 5e-5, 0.02), ("no_decay", 0.0, 0.02), ("head_decay", 5e-5, None), ("head_no_decay", 0.0, None),
    ]  # fmt: skip
    pairs = [pair for group in groups for pair in group["params"]]
    assert len(pairs) == len(dict(pairs))
    assert all(dict(pairs)[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "make, prefix", [(tiny_nfnet, "nfnet_tiny/params/"), (tiny_nf_resnet, "nf_resnet_tiny/params/")]
)
def test_decayed_is_what_the_authors_decay(golden: dict[str, np.ndarray], make, prefix):
    """By the names of their own parameters, as in `Experiment._make_opt` (nfnets/experiment.py)."""
    model = make()
    keys = [key.removeprefix(prefix) for key in golden if key.startswith(prefix)]
    leaves = {key: key.rpartition("/")[2] for key in keys}
    gains_biases = {
        k for k, leaf in leaves.items() if leaf in ("scale", "offset", "b") or "gain" in leaf or "bias" in leaf
    }
    groups = param_groups(model)
    assert {_haiku_name(name, model) for name in names_in(groups, "decay", "head_decay")} == set(keys) - gains_biases
    assert {_haiku_name(name, model) for name in names_in(groups, "no_decay", "head_no_decay")} == gains_biases
    head = {key for key in keys if key.rpartition("/")[0] == f"{model.haiku_names[0]}/~/linear"}
    assert {_haiku_name(name, model) for name in names_in(groups, *HEAD)} == head


@pytest.mark.parametrize("make", [tiny_nfnet, tiny_nf_resnet, tiny_nf_regnet])
def test_our_networks_have_no_decay_for_vectors_and_scalars(make):
    """Theirs have gains of shape (C,), for which the rule of shape that others use gives the same."""
    model = make()
    assert decayed(model) == {name for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("name", ["test_nfnet", "nf_seresnet26", "nf_ecaresnet26", "nf_regnet_b0", "dm_nfnet_f0"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_timms_networks(name, accelerated):
    """Their gains have shape (C, 1, 1, 1); the last two parameters are what timm's AGC leaves out."""
    model = timm.create_model(name, num_classes=7, depths=(1, 1, 1, 1))
    if accelerated:
        accelerate(model)
    expected = {name for name, _ in model.named_parameters() if not name.endswith(("gain", ".bias"))}
    assert decayed(model) == expected
    groups = param_groups(model)
    clipped = {id(p) for g in groups if g["clip_factor"] is not None for _, p in g["params"]}
    assert clipped == set(map(id, model_parameters(model, exclude_head=True)))


@pytest.mark.parametrize(
    "module, expected",
    [
        (nn.Conv1d(2, 2, 3), {"weight"}),
        (nn.ConvTranspose3d(2, 2, 3), {"weight"}),
        (nfk.WSConv2d(2, 2, 3), {"weight"}),
        (nfk.ScaledStdConv2d(2, 2, 3), {"weight"}),
        (nfk.WSConvTranspose2d(2, 2, 3), {"weight"}),
        (nfk.WSLinear(3, 2), {"weight"}),
        (nn.Linear(3, 1), {"weight"}),
        (nn.Bilinear(2, 3, 2), {"weight"}),
        (nn.Embedding(3, 2), {"weight"}),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), {"in_proj_weight", "out_proj.weight"}),
        (
            nn.MultiheadAttention(4, 2, kdim=2, vdim=2),
            {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
        ),
        (nn.LSTM(2, 3, proj_size=2), {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"}),
        (nn.GRUCell(2, 3), {"weight_ih", "weight_hh"}),
        (nn.Sequential(nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm((2, 2)), nn.PReLU(2)), set()),
        (nn.ParameterList([torch.ones(2, 3), torch.ones(2)]), set()),
        (prune.random_unstructured(nn.Conv2d(2, 2, 3), "weight", 0.5), {"weight_orig"}),
        (nn.utils.spectral_norm(nn.Linear(3, 2)), {"weight_orig"}),
        (
            parametrize.register_parametrization(nn.Linear(3, 3), "weight", nn.Tanh()),
            {"parametrizations.weight.original"},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_weights_are_told_by_the_kind_of_module(module, expected):
    assert decayed(module) == expected


def test_names_shapes_and_places_do_not_matter():
    class Gain(nn.Conv2d):
        """A convolution whose own parameter beside weight and bias is none of torch's."""

        def __init__(self) -> None:
            super().__init__(2, 2, 1)
            self.weight_scale = nn.Parameter(torch.ones(2, 2, 1, 1))

    model = nn.ModuleDict({"bias": Gain(), "norm_gain": nn.Linear(1, 1), "weight": nn.LayerNorm((3, 3))})
    assert decayed(model) == {"bias.weight", "norm_gain.weight"}


def test_converted_and_owned_networks():
    model = nfk.convert_conv2d(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))))
    nfk.BatchedWeightStandardization(model)
    assert decayed(model) == {"0.weight", "1.0.weight"}


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("head", ["fc", "body.1", ["fc", "stem"], ()], ids=str)
def test_the_head_as_given(head, as_object):
    model = Net()
    entries = [head] if isinstance(head, str) else head
    expected = {f"{e}.{name}" for e in entries for name, _ in model.get_submodule(e).named_parameters()}
    if as_object:
        head = model.get_submodule(head) if isinstance(head, str) else [model.get_submodule(entry) for entry in head]
    groups = param_groups(model, head=head)
    assert names_in(groups, *HEAD) == expected
    assert {group["clip_factor"] for group in groups if group["name"] not in HEAD} == {0.01}


def test_a_distilled_network_has_two_heads_and_one_without_classes_none():
    deit = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=6, num_classes=3)
    expected = {f"{head}.{name}" for head in ("head", "head_dist") for name in ("weight", "bias")}
    assert names_in(param_groups(deit), *HEAD) == expected
    for model in (timm.create_model("test_nfnet", num_classes=0), nfk.models.NFResNet((1, 1, 1, 1), num_classes=0)):
        assert [group["name"] for group in param_groups(model)] == ["decay", "no_decay"]


def test_a_head_that_cannot_be_told_is_asked_for():
    with pytest.raises(ValueError, match=r"head must be given: Sequential has neither.*head=\(\)"):
        param_groups(nn.Sequential(nn.Linear(2, 2)))


def test_a_shared_parameter_is_in_one_group_decayed_and_unclipped():
    model = nn.Module()
    model.norm = nn.LayerNorm(3)
    model.embedding = nn.Embedding(5, 3)
    model.fc = nn.Linear(3, 5)
    model.fc.weight = model.embedding.weight
    model.extra = nn.Parameter(torch.ones(3))
    model.linear = nn.Linear(3, 1, bias=False)
    model.linear.weight = nn.Parameter(torch.ones(1, 3))
    model.also = model.linear.weight
    groups = param_groups(model)
    assert names_in(groups, "head_decay") == {"embedding.weight"}
    assert names_in(groups, "decay") == {"also"}  # its first name
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_frozen_parameters_are_there_and_train_once_they_are_unfrozen():
    model = Net()
    model.stem.requires_grad_(False)
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    before = model.stem.weight.clone()
    loss(model).backward()
    optimizer.step()
    assert torch.equal(model.stem.weight, before)
    model.stem.requires_grad_(True)
    loss(model).backward()
    optimizer.step()
    assert not torch.equal(model.stem.weight, before)


def test_under_wrappers_the_names_are_the_models():
    model = tiny_nf_resnet()
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    for head in (None, "fc", model.fc):
        for plain, found in zip(param_groups(model, head=head), param_groups(wrapped, head=head), strict=True):
            assert plain["name"] == found["name"]
            assert [name for name, _ in plain["params"]] == [name for name, _ in found["params"]]


OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "fused Adam": lambda groups: torch.optim.Adam(groups, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_optimizers_decay_what_is_to_be_decayed(name):
    """With gradients of zero, only weight decay moves a parameter."""
    model = Net()
    optimizer = OPTIMIZERS[name](param_groups(model, weight_decay=0.5))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer.step()
    scheduler.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {"stem.weight", "body.0.weight", "body.1.0.weight", "fc.weight"}
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [group["clip_factor"] for group in other.param_groups] == [0.01, 0.01, None, None]
        assert [group["param_names"] for group in other.param_groups] == [
            g["param_names"] for g in optimizer.param_groups
        ]
        other.load_state_dict(optimizer.state_dict())


def test_prints_as_a_table_before_and_after_an_optimizer_has_taken_it():
    groups = param_groups(Net(), weight_decay=2e-5)
    table = """\
group          tensors  parameters  weight_decay  clip_factor  holds
decay                3         234         2e-05         0.01  stem.weight, body.0.weight, ...
no_decay             2          12           0.0         0.01  stem.bias, body.0.bias
head_decay           1          30         2e-05         None  fc.weight
head_no_decay        1           5           0.0         None  fc.bias"""
    assert str(groups) == repr(groups) == table
    torch.optim.SGD(groups, lr=0.1)
    assert str(groups) == table


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "model must be a module, got list", {"model": []}),
        (ValueError, "model must have parameters; ReLU has none", {"model": nn.ReLU(), "head": ()}),
        (ValueError, "model must have all its parameters; weight is lazy", {"model": nn.LazyLinear(2), "head": ()}),
        (TypeError, "weight_decay must be a number, got str", {"weight_decay": "0"}),
        (ValueError, "weight_decay must not be negative, got -1", {"weight_decay": -1}),
        (ValueError, "weight_decay must be finite, got nan", {"weight_decay": float("nan")}),
        (TypeError, "clip_factor must be a number, got str", {"clip_factor": "0"}),
        (ValueError, "clip_factor must be finite and not negative, got -1", {"clip_factor": -1}),
        (ValueError, "head='fcs' matches no module.*'fc'", {"head": "fcs"}),
        (ValueError, "head='fcs' matches no module", {"head": ["fc", "fcs"]}),
        (ValueError, "head holds a Linear that is not part of the model", {"head": nn.Linear(1, 1)}),
        (TypeError, "head must be a module, a name or a sequence of them, got int", {"head": 3}),
        (TypeError, "head must hold names or modules, got int", {"head": [3]}),
    ],
)
def test_bad_input_is_named(error, message, arguments):
    with pytest.raises(error, match=message):
        param_groups(**{"model": Net(), **arguments})
