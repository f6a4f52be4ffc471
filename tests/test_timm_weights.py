"""`load_timm`, `timm_state_dict` and `like_timm`: names, shapes, outputs, gradients and features are timm's."""

import functools

import pytest
import timm
import torch
from timm.models import nfnet as timm_nfnet

from nfnets_kernels.models import NFNet, NFResNet, like_timm, load_timm, timm_state_dict
from nfnets_kernels.models.timm_zoo import CONFIGURATIONS

from .helpers import assert_same
from .module_helpers import on_one_thread

one_thread = pytest.fixture(on_one_thread, autouse=True)

NAMES = timm.list_models(module="nfnet")
# Name and image sizes: the large one gets small images.
NETWORKS = {
    "test_nfnet": (64, 65),
    "nf_resnet26": (64, 65),
    "nf_seresnet26": (64, 65),
    "nf_ecaresnet26": (64, 65),
    "nf_regnet_b0": (64, 65),
    "nfnet_l0": (32, 65),
    "eca_nfnet_l0": (64, 33),
    "dm_nfnet_f0": (32, 33),
}

SMALL = list(NETWORKS)[:5]  # the others are in train mode in float64, in eval mode in float32


def of_timm(name, **options):
    """timm's network with every parameter off its initial value, by some of its own size."""
    model = timm.create_model(name, num_classes=10, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 1.0
            parameter.add_(0.3 * scale * torch.randn_like(parameter))
    return model


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def gradients(model, x, names):
    """Output, and by timm's names the gradients for a fixed cotangent."""
    x = x.clone().requires_grad_()
    out = model(x)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad(out, [x, *model.parameters()], cotangent)
    return {"output": out.detach(), **dict(zip(["input", *names], (g.flatten() for g in grads), strict=True))}


def both(name, dtype, training, size):
    """What `gradients` gives for ours and for timm's network."""
    theirs = of_timm(name).to(dtype).train(training)
    ours = load_timm(like_timm(name, num_classes=10, dtype=dtype), theirs).train(training)
    x = torch.randn(2, 3, size, size, dtype=dtype)
    expected = gradients(theirs, x, [key for key, _ in theirs.named_parameters()])
    actual = gradients(ours, x, timm_state_dict(ours))
    assert actual.keys() == expected.keys()
    return actual, expected


def test_every_network_of_timm_has_ours_with_the_same_names_shapes_and_features():
    assert set(CONFIGURATIONS) == set(NAMES)
    assert len(NAMES) > 30
    for name in NAMES:
        with torch.device("meta"):
            ours, theirs = like_timm(name), timm.create_model(name)
        assert isinstance(theirs, timm_nfnet.NormFreeNet)
        shapes = [
            {key: value.shape for key, value in state.items()}
            for state in (timm_state_dict(ours), dict(theirs.state_dict()))
        ]
        assert shapes[0] == shapes[1], name
        features = [[(f["num_chs"], f["reduction"]) for f in model.feature_info] for model in (ours, theirs)]
        assert features[0] == features[1], name


@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in NETWORKS), *((name, False) for name in SMALL)]
)
def test_outputs_and_gradients_are_timms(name, training):
    actual, expected = both(name, torch.float64, training, NETWORKS[name][training])
    errors = {key: relative_error(actual[key], expected[key]) for key in actual}
    assert not {key: error for key, error in errors.items() if not error < 1e-10}


@pytest.mark.parametrize(("name", "training"), [(name, name in SMALL) for name in NETWORKS])
def test_in_float32_outputs_are_timms_too(name, training):
    """And gradients where the activation is smooth: ReLU's jumps where rounding changes a sign."""
    actual, expected = both(name, torch.float32, training, NETWORKS[name][not training])
    assert relative_error(actual["output"], expected["output"]) < 1e-5
    if "resnet" not in name:
        names = sorted(actual.keys() - {"output"})
        together = [torch.cat([parts[name] for name in names]) for parts in (actual, expected)]
        assert relative_error(*together) < 1e-5


@pytest.mark.parametrize("size", [64, 65])
@pytest.mark.parametrize("name", ["test_nfnet", "nf_resnet26"])
def test_features_are_timms(name, size):
    full = of_timm(name).double().eval()
    theirs = timm.create_model(name, features_only=True).double().eval()
    state = full.state_dict()
    theirs.load_state_dict(
        {key: state[key.replace("stem_", "stem.").replace("stages_", "stages.")] for key in theirs.state_dict()}
    )
    ours = load_timm(like_timm(name, features_only=True, dtype=torch.float64), full).eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = ours(x), theirs(x)
        with_head = load_timm(like_timm(name, num_classes=10, dtype=torch.float64), full).forward_intermediates(x)
    assert [f["num_chs"] for f in ours.feature_info] == theirs.feature_info.channels()
    assert [f["reduction"] for f in ours.feature_info] == theirs.feature_info.reduction()
    assert len(actual) == len(expected) == len(with_head) == 5
    for one, other, reference in zip(actual, with_head, expected, strict=True):
        assert one.shape == reference.shape
        assert relative_error(one, reference) < 1e-10 and relative_error(other, reference) < 1e-10


@pytest.mark.parametrize("name", ["test_nfnet", "nf_ecaresnet26", "nf_regnet_b0"])
def test_weights_go_both_ways(name):
    theirs = of_timm(name)
    ours = load_timm(like_timm(name, num_classes=10), theirs.state_dict())
    state = timm_state_dict(ours)
    assert_same({key: state[key] for key in theirs.state_dict()}, dict(theirs.state_dict()))
    fresh = timm.create_model(name, num_classes=10)
    fresh.load_state_dict(state, strict=True)
    again = load_timm(like_timm(name, num_classes=10), fresh)
    assert_same(dict(again.state_dict()), dict(ours.state_dict()))


def test_a_network_with_skip_gains_goes_both_ways():
    options = {"group_width": 8, "bottleneck": 0.25, "stem_width": 128, "numerics": "timm_dm"}
    ours = NFNet((32, 64, 96, 128), (1, 2, 1, 1), num_classes=10, **options)
    with torch.no_grad():
        ours.blocks[2].skip_gain.fill_(0.5)
    theirs = timm.create_model(
        "dm_nfnet_f0", num_classes=10, depths=(1, 2, 1, 1), channels=(32, 64, 96, 128), group_size=8, bottle_ratio=0.25,
        num_features=256,
    )  # fmt: skip
    theirs.load_state_dict(timm_state_dict(ours))
    assert theirs.stages[1][1].skipinit_gain == 0.5


@pytest.mark.parametrize("name", ["test_nfnet", "nf_resnet26", "nf_regnet_b0"])
def test_stochastic_depth_is_timms(name):
    ours, theirs = like_timm(name, drop_path_rate=0.2), timm.create_model(name, drop_path_rate=0.2)
    blocks = [block for stage in theirs.stages for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert [block.stochdepth_rate for block in ours.blocks] == pytest.approx(rates, abs=1e-7)
    assert max(rates) == pytest.approx(0.2)
    assert all(block.drop_path.scale_by_keep for block in blocks[1:]) and all(b.rescale_kept for b in ours.blocks)


def test_options_override_the_configuration():
    model = like_timm("test_nfnet", num_classes=7, in_chans=4, activation="gelu", stochdepth_rate=0.3, drop_rate=0.1)
    assert model(torch.randn(1, 4, 32, 32)).shape == (1, 7)
    assert (model.activation, model.approximate, model.stochdepth_rate, model.drop_rate) == ("gelu", "none", 0.3, 0.1)
    with pytest.raises(ValueError, match="drop_path_rate or stochdepth_rate"):
        like_timm("test_nfnet", drop_path_rate=0.1, stochdepth_rate=0.1)
    with pytest.raises(ValueError, match=r"nf_resnet50.*got 'resnet50'"):
        like_timm("resnet50")


@functools.cache
def small_state():
    return dict(timm.create_model("test_nfnet", num_classes=10).state_dict())


MISSING = ["stages.1.0.conv2b.gain", "head.fc.bias"]
UNEXPECTED = ["stages.0.0.skipinit_gain", "fc.weight"]
MISSHAPEN = ["stem.conv1.gain", "stages.2.0.attn_last.fc1.weight", "head.fc.weight"]


def test_everything_that_does_not_fit_is_named_and_nothing_is_written():
    state = {key: value for key, value in small_state().items() if key not in MISSING}
    state |= dict.fromkeys(UNEXPECTED, torch.zeros(()))
    state |= {key: state[key][1:] for key in MISSHAPEN}
    model = like_timm("test_nfnet", num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_timm(model, state)
    start, missing, unexpected, misshapen = str(error.value).split("; ")
    assert start == "timm's state_dict does not fit the model"
    assert "missing" in missing and "unexpected" in unexpected and "shape" in misshapen
    for part, keys in ((missing, MISSING), (unexpected, UNEXPECTED), (misshapen, MISSHAPEN)):
        assert all(key in part for key in keys) and part.count(", ") >= len(keys) - 1
    assert "stem.conv1.gain: (15,) where the model has (16,)" in misshapen
    assert_same(dict(model.state_dict()), before)


def test_weights_of_another_network_are_refused():
    for name in ("nf_resnet26", "nfnet_l0"):
        with pytest.raises(ValueError, match="does not fit the model"):
            load_timm(like_timm(name, num_classes=10), small_state())
    with pytest.raises(ValueError, match=r"unexpected: .*stages\.0\.0\.downsample\.conv\.gain"):
        load_timm(NFResNet((1, 1, 1, 1), 1), small_state())
    with pytest.raises(ValueError, match=r"head\.fc\.weight: \(10, 192\) where the model has \(1000, 192\)"):
        load_timm(like_timm("test_nfnet"), small_state())


def test_a_network_without_classifier_leaves_timms():
    for options in ({"num_classes": 0}, {"features_only": True}):
        model = load_timm(like_timm("test_nfnet", **options), small_state())
        assert_same(model.stem_conv0.weight, small_state()["stem.conv1.weight"])
        assert not any("fc." in name for name in timm_state_dict(model) if "attn" not in name)


def test_what_is_neither_a_network_nor_its_weights_is_refused():
    with pytest.raises(TypeError, match="model must be an NFResNet, an NFNet or an NFRegNet, got NormFreeNet"):
        load_timm(timm.create_model("test_nfnet"), small_state())
    with pytest.raises(TypeError, match=r"model must be .* got Linear"):
        timm_state_dict(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"source must be .* got str"):
        load_timm(like_timm("test_nfnet"), "test_nfnet")
