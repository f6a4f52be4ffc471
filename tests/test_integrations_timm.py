"""accelerate: timm's NF networks with this package's kernels are timm's networks, and become them again."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import EcaModule, GELUTanh, SEModule
from timm.layers.cbam import LightCbamModule
from timm.models.nfnet import GammaAct, NormFreeBlock, NormFreeNet
from torch import nn

import nfnets_kernels as nfk
from nfnets_kernels.integrations.timm import accelerate, restore
from nfnets_kernels.modules.batched import GROUPS
from nfnets_kernels.modules.standardized import Standardized

from .helpers import assert_same, channels_last
from .module_helpers import assert_results, on_one_thread, results, standardizations

one_thread = pytest.fixture(on_one_thread, autouse=True)

# Every family at a size for float64, and what its members differ in: stem, act, gamma, attention, padding, skip gain.
SMALL = {"depths": (1, 2, 1, 1), "width_factor": 0.25, "num_classes": 7}
FAMILIES = {
    "nf_resnet26": {},
    "nf_seresnet26": {},
    "nf_ecaresnet26": {},
    "nf_regnet_b0": {"width_factor": 0.5},
    "nfnet_l0": {"group_size": 8},
    "eca_nfnet_l0": {"group_size": 8},
    "dm_nfnet_f0": {"group_size": 8},
    "test_nfnet": {"width_factor": 1.0},
}
LAUNCHES = {"stage": {"nf_resnet26": 5, "nf_seresnet26": 5, "nf_ecaresnet26": 5}, "model": {}}


def make(name="test_nfnet", **options):
    """A network whose every parameter is off its initial value, by less than what makes a residual stream explode."""
    small = SMALL | FAMILIES[name] | {"drop_path_rate": 0.0} if name in FAMILIES else {}
    model = timm.create_model(name, **(small | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def accelerated(model, group="stage"):
    return accelerate(copy.deepcopy(model), group)


def image(height=64, width=47, batch=2, **options):
    return torch.randn(batch, 3, height, width, **options)


def relative_error(actual, expected):
    tiny = torch.finfo(torch.float64).tiny  # of two zeros the error is 0
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=tiny)).item()


def seeded(model):
    def run(x):
        torch.manual_seed(1)
        return model(x)

    return run


def assert_like_timm(model, theirs, x, bound=1e-12):
    """Output and every gradient, parameter by parameter, with the same random numbers."""
    actual, expected = results(seeded(model), model, x), results(seeded(theirs), theirs, x)
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in actual}
    assert not {name: error for name, error in errors.items() if not error < bound}
    return actual


@pytest.mark.parametrize("size", [(64, 64), (47, 33)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_timms_in_float64(name, size):
    theirs, x = make(name).double(), image(*size, dtype=torch.float64)
    model = accelerated(theirs)
    assert isinstance(model, NormFreeNet) and isinstance(model.stages[0][0], NormFreeBlock)
    actual = assert_like_timm(model, theirs, x)
    expected = results(theirs, theirs, x)
    assert_results(actual, expected, layers=10 * len(expected))
    assert standardizations(model, x) == LAUNCHES["stage"].get(name, 6)
    model.eval(), theirs.eval()
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(model(x), theirs(x)) < 1e-12
        assert standardizations(model, x) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_timms_in_float32(name):
    theirs, x = make(name), image()
    double = copy.deepcopy(theirs).double()
    exact, model = gains_together(results(double, double, x.double())), accelerated(theirs)
    assert relative_error(model(x), theirs(x)) < 1e-5
    for part, value in gains_together(results(model, model, x)).items():
        assert relative_error(value, exact[part]) < 1e-5, part


def gains_together(values):
    """The gradients of all skip gains as one vector: one of them, a sum over millions, may all but cancel."""
    gains = [value for part, value in values.items() if part.endswith("skipinit_gain")]
    others = {part: value for part, value in values.items() if not part.endswith("skipinit_gain")}
    return others | ({"skip gains": torch.stack(gains)} if gains else {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf_resnet50", "dm_nfnet_f0"])
def test_whole_networks_are_timms_in_float32(name):
    theirs, x = make(name, depths=timm.models.nfnet.model_cfgs[name].depths, width_factor=1.0), image()
    with torch.no_grad():
        expected = theirs.eval()(x)
        assert relative_error(accelerate(theirs)(x), expected) < 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("group", GROUPS)
def test_random_numbers_are_timms(group, layout):
    theirs = make(drop_path_rate=0.5, drop_rate=0.3).double()
    x = image(batch=5, dtype=torch.float64)
    if layout == "channels_last":
        theirs, x = theirs.to(memory_format=torch.channels_last), channels_last(x)
    model = accelerated(theirs, group)
    actual = assert_like_timm(model, theirs, x)
    assert not torch.equal(actual["output"], model(x))
    assert standardizations(model, x) == (6 if group == "stage" else 1)
    for block in [block for m in (model, theirs) for stage in m.stages for block in stage]:
        if hasattr(block.drop_path, "drop_prob"):
            block.drop_path.scale_by_keep, block.drop_path.drop_prob = False, 1.0
    assert_like_timm(model, theirs, x)


@pytest.mark.parametrize("options", [
    {"attn_gain": 1.5}, {"attn_gain": 1.5, "reg": True}, {"attn_layer": None}, {"skipinit": False, "attn_layer": None},
    {"gamma_in_act": False, "same_padding": False}, {"act_layer": "silu", "reg": True},
    {"act_layer": "relu", "gamma_in_act": False}, {"act_layer": "leaky_relu", "gamma_in_act": False},
    {"act_layer": "tanh", "gamma_in_act": False}, {"output_stride": 8},
    {"attn_layer": "eca", "attn_kwargs": {"use_mlp": True}}, {"std_conv_eps": 1e-3, "alpha": 0.7},
    {"stem_type": "deep_pool", "num_features": 0, "gamma_in_act": False},
], ids=str)  # fmt: skip
def test_options_of_the_configuration(options):
    theirs = make("dm_nfnet_f0", **options).double()
    assert_like_timm(accelerated(theirs), theirs, image(dtype=torch.float64))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu"])
def test_trains_where_timm_overwrites_what_its_gradient_needs(activation):
    theirs, x = make("dm_nfnet_f0", act_layer=activation), image()
    with pytest.raises(RuntimeError, match="inplace operation"):
        theirs(x).sum().backward()
    with torch.no_grad():
        expected = theirs(x)
    out = accelerate(theirs)(x)
    out.sum().backward()
    assert relative_error(out, expected) < 1e-5
    assert all(torch.isfinite(parameter.grad).all() for parameter in theirs.parameters())


def test_activations_are_known_by_their_values():
    theirs = make("nfnet_l0").double()
    for stage in theirs.stages:
        for block in stage:
            for name in ("act1", "act2", "act2b", "act3"):
                setattr(block, name, GELUTanh())
    model = accelerated(theirs)
    assert (model.stages[0][0].activation, model.stages[0][0].approximate) == ("gelu", "tanh")
    assert_like_timm(model, theirs, image(dtype=torch.float64))


def test_blocks_of_different_activations():
    theirs = make("nfnet_l0").double()
    for name in ("act1", "act2", "act2b", "act3"):
        setattr(theirs.stages[1][1], name, nn.Tanh())
    assert_like_timm(accelerated(theirs), theirs, image(dtype=torch.float64))


@pytest.mark.parametrize("group", GROUPS)
def test_features(group):
    theirs, x = make().double().eval(), image(dtype=torch.float64)
    model = accelerated(theirs, group)
    for indices in (None, 2, [0, 3]):
        actual, expected = (m.forward_intermediates(x, indices) for m in (model, theirs))
        for ours, timms in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
            assert relative_error(ours, timms) < 1e-12
    taps, handles = [], []
    handles = [m.stages[1].register_forward_hook(lambda _, __, out: taps.append(out)) for m in (model, theirs)]
    model(x), theirs(x)
    assert len(handles) == 2 and relative_error(*taps) < 1e-12
    pruned = [copy.deepcopy(m) for m in (model, theirs)]
    for m in pruned:
        m.prune_intermediate_layers(2)
    assert relative_error(pruned[0](x), pruned[1](x)) < 1e-12
    theirs = make("dm_nfnet_f0", features_only=True).double()
    model = accelerated(theirs, group)
    for ours, timms in zip(model(x), theirs(x), strict=True):
        assert relative_error(ours, timms) < 1e-12


def test_single_blocks_and_parts_of_stages():
    theirs, x = make().double(), torch.randn(2, 64, 9, 9, dtype=torch.float64)
    model = accelerated(theirs)
    x = model.stem(image(dtype=torch.float64))
    for m in (model, theirs):
        m.stages[0] = m.stages[0][:1]
    assert relative_error(model.stages[0](x), theirs.stages[0](x)) < 1e-12
    assert relative_error(model.stages[0][0](x), theirs.stages[0][0](x)) < 1e-12


def test_another_classifier_and_state_dicts_both_ways():
    theirs, x = make(), image()
    model, other = accelerated(theirs), accelerate(make())
    expected = model(x)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert_same(model.state_dict(), theirs.state_dict())
    other.load_state_dict(theirs.state_dict())
    assert_same(other(x), expected)
    plain = make()
    plain.load_state_dict(other.state_dict())
    assert_same(plain(x), theirs(x))
    for m in (model, theirs):
        torch.manual_seed(0)
        m.reset_classifier(3, "max")
    assert_like_timm(model, theirs, x, 2e-5)


@pytest.mark.parametrize("group", GROUPS)
def test_copies_compute_the_same(group):
    model, x = accelerate(make(), group), image()
    expected = results(model, model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(results(other, other, x), expected)
        assert standardizations(other, x) == (6 if group == "stage" else 1)
        assert type(restore(other)) is NormFreeNet


@pytest.mark.parametrize("group", GROUPS)
def test_gradient_checkpointing(group):
    model, x = accelerate(make(drop_path_rate=0.5), group), image()
    expected = results(seeded(model), model, x)
    model.set_grad_checkpointing()
    assert_same(results(seeded(model), model, x), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_compiles(group, checkpointing):
    torch.compiler.reset()
    theirs, x = make("dm_nfnet_f0", depths=(1, 1, 1, 1)).double(), image(dtype=torch.float64)
    model = accelerated(theirs, group)
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual, expected = results(compiled, model, x), results(theirs, theirs, x)
    assert all(relative_error(actual[name], expected[name]) < 1e-12 for name in expected)


def test_exports():
    model, x = accelerate(make()).eval(), image()
    assert_same(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("name", ["test_nfnet", "nf_seresnet26"])
def test_autocast_is_as_close_as_timms(name):
    theirs, x = make(name), image()
    expected = copy.deepcopy(theirs).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, timms = accelerated(theirs)(x), theirs(x)
    assert ours.dtype == timms.dtype == torch.bfloat16
    assert 1e-5 < relative_error(ours, expected) < 2 * relative_error(timms, expected)


def test_trains_with_agc():
    theirs, x = make(drop_path_rate=0.2, drop_rate=0.1), channels_last(image(batch=4))
    model = accelerated(theirs)
    for m in (model, theirs):
        agc, optimizer = nfk.AGC(m, clip_factor=0.01, exclude=("head.fc",)), torch.optim.SGD(m.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(m(x), torch.arange(4)).backward()
            agc.clip_()
            optimizer.step()
    for (name, ours), timms in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(ours.detach(), timms.detach()) < 1e-4, name


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", FAMILIES)
def test_restoring_leaves_nothing(name, group):
    theirs, x = make(name), image()
    model = accelerate(copy.deepcopy(theirs), group)
    with torch.no_grad():
        model.eval()(x)  # keeps weights
    model.train()(x)
    assert any(isinstance(module, Standardized) for module in model.modules())
    assert restore(model) is model
    for ours, timms in zip(model.modules(), theirs.modules(), strict=True):
        assert type(ours) is type(timms)
        assert vars(ours).keys() == vars(timms).keys()
        for key in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"):
            assert not vars(ours)[key]
    assert_same(results(model, model, x), results(theirs, theirs, x))
    assert restore(accelerate(model)) is model


def test_in_place_and_returned():
    theirs = make()
    parameters = list(theirs.parameters())
    assert accelerate(theirs) is theirs
    assert all(a is b for a, b in zip(parameters, theirs.parameters(), strict=True))


def change_block(**changes):
    def change(model):
        for name, value in changes.items():
            setattr(model.stages[1][0], name, value)
        return model

    return change


def change_attention(**changes):
    def change(model):
        for name, value in changes.items():
            setattr(model.stages[1][0].attn_last, name, value)
        return model

    return change


BAD = {
    "no module": (lambda _: object(), TypeError, "model must be a module, got object"),
    "nothing": (lambda _: nn.Linear(2, 2), ValueError, "model must hold parts of timm's NormFreeNet; Linear has none"),
    "twice": (accelerate, ValueError, "model must not be accelerated already"),
    "owned": (lambda model: owned(model), ValueError, "owned already: extra.0 is"),
    "activation": (change_block(act3=nn.Hardswish()), ValueError, r"stages.1.0.act3, Hardswish.*is another"),
    "slope": (change_block(act2=nn.LeakyReLU(0.2)), ValueError, r"stages.1.0.act2, LeakyReLU.*is another"),
    "PReLU": (change_block(act1=nn.PReLU()), ValueError, "activations without parameters"),
    "GammaAct": (change_block(act1=GammaAct("mish")), ValueError, "stages.1.0.act1, GammaAct.*is another"),
    "several": (change_block(act1=nn.Tanh()), ValueError, "one activation in a block; stages.1.0 has several"),
    "attention": (change_block(attn_last=LightCbamModule(64)), ValueError, "stages.1.0.attn_last has not"),
    "add_maxpool": (change_attention(add_maxpool=True), ValueError, "without add_maxpool"),
    "gate": (change_attention(gate=nn.Hardsigmoid()), ValueError, "sigmoid gates"),
    "drop_path": (change_block(drop_path=nn.Dropout(0.1)), ValueError, "must have DropPath"),
    "conv": (change_block(conv2=nn.Conv2d(8, 8, 3)), ValueError, "stages.1.0 has Conv2d"),
}


def owned(model):
    model.extra = nn.Sequential(nfk.WSLinear(2, 2))
    nfk.modules.BatchedWeightStandardization(model.extra)
    return model


@pytest.mark.parametrize("case", BAD)
def test_bad_models_are_left_alone(case):
    change, error, match = BAD[case]
    model = change(make())
    types = [type(module) for module in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=match):
        accelerate(model)
    assert not types or types == [type(module) for module in model.modules()]


def test_bad_groups_and_restoring_what_is_not_accelerated():
    with pytest.raises(ValueError, match="group must be one of"):
        accelerate(make(), "block")
    with pytest.raises(ValueError, match="model must be accelerated"):
        restore(make())
    with pytest.raises(TypeError, match="model must be a module"):
        restore(None)


@pytest.mark.parametrize("attention", [SEModule, EcaModule])
def test_logits_are_those_of_the_gate(attention):
    from nfnets_kernels.integrations.timm_modules import attention_logits

    module, x = attention(32).double(), image(dtype=torch.float64)[:, :1].expand(-1, 32, -1, -1).clone()
    torch.testing.assert_close(torch.sigmoid(attention_logits(module, x))[:, :, None, None] * x, module(x))


def test_timm_is_imported_only_when_asked_for():
    program = (
        "import sys, nfnets_kernels as n; assert 'timm' not in sys.modules; assert 'timm' in dir(n.integrations);"
        "from benchmarks.torchvision_compat import prepare; prepare(); n.integrations.timm.accelerate;"
        "assert 'timm' in sys.modules and not hasattr(n.integrations, 'other')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
