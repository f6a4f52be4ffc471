"""NF-ResNet: the authors' numbers, their forward pass written out in float64, shapes, stochastic depth, training."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

import nfnets_kernels as nfk
from nfnets_kernels.models import NFResNet, load_haiku
from nfnets_kernels.models.nf_resnet import DEPTHS, NFResNetBlock
from nfnets_kernels.models.weights import haiku_state_dict
from nfnets_kernels.modules.standardized import Request, standardize_together

from .helpers import assert_same, channels_last
from .module_helpers import (
    assert_results,
    authors_nf_resnet,
    float64_parameters,
    on_one_thread,
    perturb,
    results,
    standardizations,
)

PREFIX = "nf_resnet_tiny/"
DEPTH = (1, 2, 1, 1)

one_thread = pytest.fixture(on_one_thread, autouse=True)


def tiny(depth=DEPTH, **options):
    """A small network whose every parameter is off its initial value, skip gains included."""
    return perturb(NFResNet(depth, 1, **{"num_classes": 10, **options}))


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def of_tiny(golden, part):
    prefix = f"{PREFIX}{part}/"
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_reproduces_the_authors_numbers(golden, layout, compiled):
    torch.compiler.reset()
    model = load_haiku(NFResNet(DEPTH, 1, num_classes=10), golden, prefix=f"{PREFIX}params/")
    x = torch.from_numpy(golden[f"{PREFIX}input_nhwc"]).permute(0, 3, 1, 2)
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    else:
        x = x.contiguous()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    logits = run(x)
    loss = F.cross_entropy(logits, torch.arange(len(x)) % 10)
    loss.backward()
    actual = {"logits": logits, "pool": model.forward_pool(x), "loss": loss}
    actual |= {name: p.grad for name, p in model.named_parameters()}
    expected = {name: torch.from_numpy(golden[f"{PREFIX}outputs/{name}"]) for name in ("logits", "pool")}
    expected |= {"loss": torch.tensor(golden[f"{PREFIX}loss"]), **haiku_state_dict(model, of_tiny(golden, "grads"))}
    errors = {name: relative_error(actual[name].detach(), expected[name]) for name in actual}
    assert len(errors) == len(of_tiny(golden, "grads")) + 3
    assert not {name: error for name, error in errors.items() if not error < 1e-4}
    model.eval()
    with torch.no_grad():
        assert relative_error(run(x), expected["logits"]) < 1e-4


@pytest.mark.parametrize(
    ("activation", "shortcut", "size"),
    [("relu", "conv", (37, 34)), ("relu", "conv", (32, 32)), ("relu", "avg_pool", (37, 34)), ("gelu", "conv", (37, 34)),
     ("silu", "avg_pool", (32, 33))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("use_se", [False, True], ids=["plain", "se"])
def test_is_the_authors_forward_pass_written_out(use_se, activation, shortcut, size):
    model = tiny(activation=activation, use_se=use_se, shortcut=shortcut, alpha=0.3, dtype=torch.float64)
    parameters, x = float64_parameters(model), torch.randn(2, 3, *size, dtype=torch.float64)
    options = {"alpha": 0.3, "activation": activation, "pool_shortcut": shortcut == "avg_pool"}
    expected = results(lambda x: authors_nf_resnet(parameters, x, DEPTH, **options)["logits"], parameters, x)
    layers = 2 * len(parameters)
    assert_results(results(model, model, x), expected, layers)
    assert_results(results(model, model, channels_last(x)), expected, layers)
    assert_results(results(model.eval(), model, x), expected, layers)
    with torch.no_grad():
        assert relative_error(model(x), expected["output"]) < 1e-10


@pytest.mark.parametrize("use_se", [False, True], ids=["plain", "se"])
def test_float32_and_autocast_are_close_to_float64(use_se):
    model, x = tiny(use_se=use_se), torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(model).double()(x.double())
    assert relative_error(model(x), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        assert logits.dtype == torch.bfloat16
        assert 1e-5 < relative_error(logits, expected) < 10 * torch.finfo(torch.bfloat16).eps


def test_standardizes_the_stem_and_each_stage_once_and_keeps_it_for_inference():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    assert standardizations(model, x) == standardizations(model, x) == 1 + len(DEPTH)
    model.eval()
    with torch.no_grad():
        first = model(x)
        assert standardizations(lambda: assert_same(model(x), first)) == 0
        model.blocks[2].skip_gain.add_(1)
        assert standardizations(lambda: model(x)) == 1
        assert not torch.allclose(model(x), first)
        mixed = model.train().blocks[1].conv0.eval()
        assert_same(model(x), model.eval()(x))
    assert not mixed.training


def test_layers_of_different_eps_are_not_standardized_together():
    layers = [nfk.WSConv2d(3, 4, 3), nfk.WSConv2d(3, 4, 3, eps=1e-3), nfk.WSConv2d(3, 4, 3, eps_form="add")]
    for other in layers[1:]:
        with pytest.raises(ValueError, match="one eps and eps_form"):
            standardize_together([Request(layers[0]), Request(other)], torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("layers", [50, 101, 152])
def test_sizes_are_torchvisions_and_a_skip_gain_per_block(layers):
    with torch.device("meta"):
        ours = getattr(nfk.models, f"nf_resnet{layers}")()
        theirs = getattr(torchvision.models, f"resnet{layers}")()  # scale and shift of BatchNorm: our gain and bias
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1] + sum(DEPTHS[layers])


def test_nf_resnet50_has_timms_parameters_and_a_skip_gain_per_block():
    with torch.device("meta"):
        ours, theirs = nfk.models.nf_resnet50(), timm.create_model("nf_resnet50")
    shapes = sorted((p.numel() for p in ours.parameters()), reverse=True)
    assert len(shapes) == 161 + 16
    assert shapes == sorted([*(p.numel() for p in theirs.parameters()), *[1] * 16], reverse=True)


@pytest.mark.parametrize(("layers", "depth"), DEPTHS.items())
def test_variants_have_their_depth_and_pass_options_on(layers, depth):
    model = getattr(nfk.models, f"nf_resnet{layers}")(num_classes=7, in_chans=1, device="meta")
    assert len(model.blocks) == sum(depth)
    assert model.fc.weight.shape == (7, 2048) and model.initial_conv.weight.shape == (64, 1, 7, 7)
    assert model(torch.empty(2, 1, 64, 64, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 34, 47, 64])
def test_every_stride_two_rounds_the_size_up(size):
    model, sizes = tiny(), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, outputs: sizes.append(tuple(outputs[0].shape[-2:])))
    assert torch.isfinite(model(torch.randn(1, 3, size, size + 1))).all()
    assert sizes == [(-(-size // step), -(-(size + 1) // step)) for step in (4, 8, 8, 16, 32)]


@pytest.mark.parametrize("width", [1, 2])
def test_width_depth_classes_and_channels(width):
    model = NFResNet((2, 1, 1, 3), width, num_classes=5, in_chans=4, device="meta")
    assert [block.conv2.out_channels for block in model.blocks] == [
        w * width for w in (64, 64, 128, 256, 512, 512, 512)
    ]
    assert [block.conv_shortcut is not None for block in model.blocks] == [True, False, True, True, True, False, False]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(torch.empty(2, 4, 64, 64, device="meta")).shape == (2, 5)
    model.to_empty(device="cpu").reset_parameters()
    assert model(torch.zeros(1, 4, 32, 32)).abs().sum() == 0  # zero biases and no signal


def assert_standard_deviation(x, expected):
    assert abs(x.std().item() / expected - 1) < 4 / (2 * x.numel()) ** 0.5  # four standard errors


def test_initialization_is_the_authors():
    model = NFResNet(DEPTH, 4, use_se=True)
    block = model.blocks[-1]
    for conv in (model.initial_conv, block.conv0, block.conv1, block.conv2, block.conv_shortcut):
        assert_standard_deviation(conv.weight, conv.weight[0].numel() ** -0.5)
    for linear in (block.se.fc0, block.se.fc1):  # haiku's default, a normal distribution cut at two standard deviations
        assert_standard_deviation(linear.weight, 0.879626 * linear.in_features**-0.5)
    assert_standard_deviation(model.fc.weight, 0.01)
    for name, parameter in model.named_parameters():
        if not name.endswith("weight"):
            assert (parameter == float(name.endswith(".gain"))).all(), name


@pytest.mark.parametrize("use_se", [False, True], ids=["plain", "se"])
def test_stochastic_depth_drops_whole_branches_and_rescales_nothing(use_se):
    rate, count = 0.3, 2000
    block = perturb(
        NFResNetBlock(64, 64, stride=1, alpha=0.2, beta=1.0, activation="relu", use_se=use_se, se_ratio=0.25,
                      stochdepth_rate=rate, shortcut="conv")
    )  # fmt: skip
    h = torch.randn(count, 64, 2, 2)
    with torch.no_grad():
        whole, _ = block.eval()(h, h.relu())
        torch.manual_seed(1)
        trained, a = block.train()(h, h.relu())
        torch.manual_seed(1)
        assert_same(block(h, h.relu())[0], trained)
        assert not torch.equal(block(h, h.relu())[0], trained)
    dropped = (trained == h).flatten(1).all(dim=1)
    torch.testing.assert_close(trained, torch.where(dropped[:, None, None, None], h, whole))
    assert_same(a, trained.relu())
    assert not (whole == h).flatten(1).all(dim=1).any()
    assert abs(dropped.sum().item() - rate * count) < 4 * (count * rate * (1 - rate)) ** 0.5


def test_stochastic_depth_rises_linearly_from_zero():
    model = tiny(stochdepth_rate=0.5)
    assert [block.stochdepth_rate for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert_same(model(x), model(x))


def test_dropout_only_in_training():
    model, x = tiny(drop_rate=0.5), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(1)
    logits = model(x)
    torch.manual_seed(1)
    assert_same(logits, model.fc(F.dropout(model.forward_pool(x), 0.5)))
    assert_same(model.eval()(x), model.fc(model.forward_pool(x)))


@pytest.mark.parametrize("use_se", [False, True], ids=["plain", "se"])
def test_trains_under_autocast_with_agc(use_se):
    model = tiny(use_se=use_se, stochdepth_rate=0.1, drop_rate=0.1).to(memory_format=torch.channels_last)
    x, labels = channels_last(torch.randn(8, 3, 32, 32)), torch.arange(8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    nfk.AGC(model, clip_factor=0.01, exclude=("fc",)).clip_()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all() and not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("use_se", [False, True], ids=["plain", "se"])
def test_copies_compute_the_same(use_se):
    model, x = tiny(use_se=use_se).eval(), torch.randn(2, 3, 32, 32)
    loaded = NFResNet(DEPTH, 1, num_classes=10, use_se=use_se).eval()
    with torch.no_grad():
        expected = model(x)
        loaded.load_state_dict(model.state_dict())
        for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(other(x), expected)
    assert_same(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("shortcut", "maxpool"), ("activation", "swish"), ("activation", "glu"), ("activation", "log_softmax"),
     ("stochdepth_rate", 1.0), ("stochdepth_rate", -0.1), ("drop_rate", 1.0), ("drop_rate", float("nan")),
     ("depth", (1, 1, 1)), ("depth", (1, 1, 1, 1, 1)), ("alpha", float("nan")), ("width", 0)],
)  # fmt: skip
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        NFResNet(**{"depth": DEPTH, "width": 1, argument: value})
