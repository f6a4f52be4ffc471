"""NFNet and NF-RegNet: the authors' numbers, their forward passes in float64, sizes, options."""

import copy
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor

import nfnets_kernels as nfk
from nfnets_kernels.models import NFNet, NFRegNet, NFResNet, load_haiku, nf_regnet, nfnet
from nfnets_kernels.models.weights import haiku_state_dict

from .helpers import assert_same, channels_last
from .module_helpers import (
    FUNCTIONS,
    GAINS,
    assert_results,
    float64_parameters,
    on_one_thread,
    perturb,
    results,
    standardizations,
    standardized,
)

one_thread = pytest.fixture(on_one_thread, autouse=True)

PREFIX = "nfnet_tiny/"
WIDTH, DEPTH = (32, 48, 64, 64), (1, 2, 1, 1)


def tiny_nfnet(**options) -> NFNet:
    return perturb(NFNet(WIDTH, DEPTH, **{"num_classes": 10, "group_width": 8, **options}))


def tiny_nf_regnet(**options) -> NFRegNet:
    return perturb(NFRegNet((32, 48, 64, 64), (1, 2, 1, 1), **{"num_classes": 10, **options}))


def tiny_nf_resnet(**options) -> NFResNet:
    return perturb(NFResNet(DEPTH, 1, **{"num_classes": 10, **options}))


MAKERS: dict[str, Callable] = {"NFNet": tiny_nfnet, "NFRegNet": tiny_nf_regnet, "NFResNet": tiny_nf_resnet}
every_network = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def of_tiny(golden: Mapping, part: str) -> dict:
    prefix = f"{PREFIX}{part}/"
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


@pytest.fixture
def authors(golden) -> NFNet:
    """The golden file's network with its weights."""
    return load_haiku(NFNet(WIDTH, DEPTH, num_classes=10, group_width=8), golden, prefix=f"{PREFIX}params/")


@pytest.mark.parametrize("mode", ["eager", "compiled", "channels_last", "checkpointed"])
def test_nfnet_reproduces_the_authors_numbers(golden, authors, mode):
    torch.compiler.reset()
    x = torch.from_numpy(golden[f"{PREFIX}input_nhwc"]).permute(0, 3, 1, 2)
    if mode == "channels_last":
        authors = authors.to(memory_format=torch.channels_last)
    else:
        x = x.contiguous()
    authors.set_grad_checkpointing(mode == "checkpointed")
    run = torch.compile(authors, fullgraph=True, backend="aot_eager") if mode == "compiled" else authors
    logits = run(x)
    loss = F.cross_entropy(logits, torch.arange(len(x)) % 10)
    loss.backward()
    actual = {"logits": logits, "pool": authors.forward_pool(x), "loss": loss}
    actual |= {name: p.grad for name, p in authors.named_parameters()}
    expected = {name: torch.from_numpy(golden[f"{PREFIX}outputs/{name}"]) for name in ("logits", "pool")}
    expected |= {"loss": torch.tensor(golden[f"{PREFIX}loss"]), **haiku_state_dict(authors, of_tiny(golden, "grads"))}
    errors = {name: relative_error(actual[name].detach(), expected[name]) for name in actual}
    assert len(errors) == len(of_tiny(golden, "grads")) + 3
    assert not {name: error for name, error in errors.items() if not error < 1e-4}


def test_nfnet_has_the_authors_signal_metrics(golden, authors):
    x = torch.from_numpy(golden[f"{PREFIX}input_nhwc"]).permute(0, 3, 1, 2)
    metrics = nfk.diagnostics.signal_propagation(authors, x)
    assert len(metrics) == 2 * (1 + sum(DEPTH)) + sum(DEPTH)
    for name, value in metrics.items():
        assert value.item() == pytest.approx(golden[f"{PREFIX}outputs/{name}"].item(), rel=1e-4), name


def authors_forward(model, parameters: Mapping[str, Tensor], x: Tensor, *, strides, gate_inside: bool) -> Tensor:
    """nfnets/nfnet.py and nf_regnet.py with nothing folded or fused; groups are read off the weights' shapes."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = standardized(parameters[f"{name}.weight"], parameters[f"{name}.gain"])
        x = pad_same(x, weight.shape[-2:], (stride, stride))
        return F.conv2d(x, weight, parameters[f"{name}.bias"], stride, groups=x.shape[1] // weight.shape[1])

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ parameters[f"{name}.weight"].t() + parameters[f"{name}.bias"]

    def act(x: Tensor) -> Tensor:
        return GAINS[model.activation] * FUNCTIONS[model.activation](x)

    def gated(name: str, x: Tensor) -> Tensor:
        hidden = torch.relu(linear(f"{name}.se.fc0", x.mean(dim=(2, 3))))
        return 2 * torch.sigmoid(linear(f"{name}.se.fc1", hidden))[:, :, None, None] * x

    def block(name: str, h: Tensor, stride: int, beta: float) -> Tensor:
        out = act(h) * beta
        shortcut = h
        if f"{name}.conv_shortcut.weight" in parameters:
            pooled = F.avg_pool2d(out, 2, 2, ceil_mode=True, count_include_pad=False) if stride > 1 else out
            shortcut = conv(f"{name}.conv_shortcut", pooled)
        out = conv(f"{name}.conv1", act(conv(f"{name}.conv0", out)), stride)
        if f"{name}.conv1b.weight" in parameters:
            out = conv(f"{name}.conv1b", act(out))
        out = conv(f"{name}.conv2", act(gated(name, out) if gate_inside else out))
        out = out if gate_inside else gated(name, out)
        return out * parameters[f"{name}.skip_gain"] * model.alpha + shortcut

    if "initial_conv.weight" in parameters:
        h = conv("initial_conv", x, 2)
    else:
        h = conv("stem_conv2", act(conv("stem_conv1", act(conv("stem_conv0", x, 2)))))
        h = conv("stem_conv3", act(h), 2)
    index = 0
    for stride, count in zip(strides, model.depth, strict=True):
        for position in range(count):
            h = block(f"blocks.{index}", h, stride if position == 0 else 1, 1 / expected_std(model, index))
            index += 1
    return linear("fc", act(conv("final_conv", h)).mean(dim=(2, 3)))


def expected_std(model, index: int) -> float:
    """Of a block's input: 1 after the stem, then 1 plus alpha^2 for each block since the stage's projection."""
    starts = [sum(model.depth[:stage]) for stage in range(4)]
    since = index - max(start for start in starts if start < index) if index else 0
    return (1 + since * model.alpha**2) ** 0.5


@pytest.mark.parametrize("size", [(37, 34), (32, 48)], ids=str)
@pytest.mark.parametrize(
    ("make", "options", "strides", "gate_inside"),
    [(tiny_nfnet, {}, (1, 2, 2, 2), False), (tiny_nfnet, {"activation": "relu", "alpha": 0.3}, (1, 2, 2, 2), False),
     (tiny_nf_regnet, {}, (2, 2, 2, 2), True), (tiny_nf_regnet, {"activation": "gelu"}, (2, 2, 2, 2), True)],
    ids=["NFNet", "NFNet, relu", "NFRegNet", "NFRegNet, gelu"],
)  # fmt: skip
def test_is_the_authors_forward_pass_written_out(make, options, strides, gate_inside, size):
    model = make(dtype=torch.float64, **options)
    parameters, x = float64_parameters(model), torch.randn(2, 3, *size, dtype=torch.float64)

    def plain(x: Tensor) -> Tensor:
        return authors_forward(model, parameters, x, strides=strides, gate_inside=gate_inside)

    expected, layers = results(plain, parameters, x), 2 * len(parameters)
    assert_results(results(model, model, x), expected, layers)
    assert_results(results(model, model, channels_last(x)), expected, layers)
    model.set_grad_checkpointing()
    assert_results(results(model, model, x), expected, layers)
    with torch.no_grad():
        assert relative_error(model.eval()(x), expected["output"]) < 1e-10


@pytest.mark.parametrize(
    ("variant", "millions"),
    [("f0", 71.5), ("f1", 132.6), ("f2", 193.8), ("f3", 254.9), ("f4", 316.1), ("f5", 377.2), ("f6", 438.4)],
)
def test_nfnets_have_the_papers_parameters(variant, millions):
    with torch.device("meta"):
        model = getattr(nfk.models, f"nfnet_{variant}")()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("variant", nfnet.VARIANTS)
def test_nfnet_variants_are_the_authors_table(variant):
    scale = int(variant[1:]) + 1
    depth, drop_rate, train_size, test_size = nfnet.VARIANTS[variant]
    assert depth == tuple(scale * count for count in (1, 2, 6, 3))
    for suffix, width in (("", (256, 512, 1536, 1536)), ("_plus", (384, 768, 2048, 2048))):
        with torch.device("meta"):
            model = getattr(nfk.models, f"nfnet_{variant}{suffix}")(num_classes=7, in_chans=1)
        assert [stage[-1].conv2.out_channels for stage in model.stages()] == list(width)
        assert [block.conv1.groups for block in model.blocks][:1] == [width[0] // 256]
        assert model.drop_rate == drop_rate and model.depth == depth
        assert model.stem_conv0.in_channels == 1 and model.fc.weight.shape == (7, 2 * width[-1])
    assert train_size % 32 == test_size % 32 == 0 and train_size < test_size


@pytest.mark.parametrize("variant", nf_regnet.VARIANTS)
def test_nf_regnet_variants_have_widths_of_whole_groups(variant):
    with torch.device("meta"):
        model = getattr(nfk.models, f"nf_regnet_{variant}")()
    width, depth, drop_rate, _, _ = nf_regnet.VARIANTS[variant]
    assert [stage[-1].conv2.out_channels for stage in model.stages()] == [int(0.75 * channels) for channels in width]
    assert model.depth == depth and model.drop_rate == drop_rate
    assert all(block.conv1.in_channels // block.conv1.groups == 8 for block in model.blocks)
    assert model.blocks[0].conv0.out_channels == model.initial_conv.out_channels // 8 * 8  # no expansion in the first
    assert model.blocks[1].conv0.out_channels == int(2.25 * model.blocks[1].conv0.in_channels) // 8 * 8


@every_network
def test_features_are_the_stem_and_the_stages(make):
    model, features_only = make(), make(features_only=True)
    features_only.load_state_dict(model.state_dict(), strict=False)
    assert not isinstance(features_only.fc, torch.nn.Linear)
    x = torch.randn(2, 3, 64, 96)
    features = features_only(x)
    for feature, info in zip(features, model.feature_info, strict=True):
        assert feature.shape == (2, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]
    for feature, other in zip(features, model.forward_intermediates(x), strict=True):
        assert_same(feature, other)
    sum(feature.square().mean() for feature in features).backward()
    assert all(p.grad is not None for name, p in features_only.named_parameters())
    last = nfk.functional.scaled_activation(features[-1], model.activation, approximate=model.approximate)
    torch.testing.assert_close(last.mean(dim=(2, 3)), model.forward_pool(x), rtol=1e-4, atol=1e-4)


@every_network
def test_no_classes_give_pooled_features(make):
    model, x = make(num_classes=0), torch.randn(2, 3, 32, 32)
    assert_same(model(x), model.forward_pool(x))
    assert model(x).shape == (2, model.num_features)


@every_network
def test_checkpointing_keeps_random_numbers_and_saves_memory(make):
    model = make(stochdepth_rate=0.5, drop_rate=0.3)
    x = torch.randn(5, 3, 64, 64)  # no weight has five units
    saved: dict[bool, int] = {}
    gradients = {}
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        torch.manual_seed(1)
        count = [0]

        def pack(tensor: Tensor, count: list[int] = count) -> Tensor:
            of_blocks = tensor.ndim == 4 and len(tensor) == len(x) and tensor.shape[-1] <= 16  # the stem has 32
            count[0] += tensor.numel() if of_blocks else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x).square().sum()
        saved[checkpointed] = count[0]
        loss.backward()
        gradients[checkpointed] = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert saved[True] < 0.7 * saved[False]
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@every_network
def test_kept_branches_are_rescaled_where_asked(make):
    torch.manual_seed(0)
    model, x = make(stochdepth_rate=0.5), torch.randn(2, 3, 32, 32)
    rescaling = make(stochdepth_rate=0.5, rescale_kept=True)
    rescaling.load_state_dict(model.state_dict())
    block, other = model.blocks[-1], rescaling.blocks[-1]
    h = torch.randn(64, block.conv0.in_channels, 2, 2)
    a = h.relu()
    with torch.no_grad():
        torch.manual_seed(1)
        plain, _ = block(h, a)
        torch.manual_seed(1)
        rescaled, _ = other(h, a)
    shortcut = h if block.conv_shortcut is None else block.conv_shortcut(a if block.pool is None else block.pool(a))
    torch.testing.assert_close(rescaled - shortcut, (plain - shortcut) / (1 - block.stochdepth_rate))
    assert not torch.equal(plain, rescaled)
    assert_same(model.eval()(x), rescaling.eval()(x))


@every_network
def test_standardizes_the_stem_and_each_stage_once(make):
    model, x = make(), torch.randn(2, 3, 32, 32)
    assert standardizations(model, x) == 1 + len(DEPTH)
    model.eval()
    with torch.no_grad():
        model(x)
        assert standardizations(model, x) == 0


@every_network
def test_copies_exports_and_autocast_compute_the_same(make):
    model, x = make().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(other(x), expected)
    assert_same(torch.export.export(model, (x,)).module()(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16 and relative_error(logits, expected) < 10 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [(NFNet, "width", (32, 48, 64)), (NFNet, "group_width", 0), (NFNet, "group_width", 64), (NFNet, "attention", "x"),
     (NFNet, "numerics", "x"), (NFNet, "approximate", "erf"), (NFNet, "num_classes", -1),
     (NFNet, "depth", (1, 0, 1, 1)), (NFRegNet, "width", (4, 48, 64, 64)), (NFRegNet, "drop_rate", 1.5),
     (NFRegNet, "activation", "swish")],
)  # fmt: skip
def test_bad_arguments_are_named(kind, argument, value):
    with pytest.raises(ValueError, match=argument):
        kind(**{"width": WIDTH, "depth": DEPTH, **({"group_width": 8} if kind is NFNet else {}), argument: value})
