"""Multiply-adds against those that authors, torchvision and timm's model cards publish, and against counts by hand."""

import math

import pytest
import torch
from torch import nn

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.bn_resnet import BNResNet
from nfnets_kernels.models.flops import count_flops
from nfnets_kernels.models.nfnet import VARIANTS

# In G, at the size that each is tested at (Brock et al. 2021b).
NFNETS = {
    "f0": (256, 12.38),
    "f1": (320, 35.54),
    "f2": (352, 62.59),
    "f3": (416, 114.76),
    "f4": (512, 215.24),
    "f5": (544, 289.76),
    "f6": (576, 377.28),
}
# Without attention, whose products of activations torchvision counts and we do not.
TORCHVISIONS = ["resnet50", "resnext50_32x4d", "efficientnet_b0", "mobilenet_v3_large", "convnext_tiny", "densenet121"]


def on_meta(create, *args, **options) -> nn.Module:
    with torch.device("meta"):
        return create(*args, **options)


@pytest.mark.parametrize("variant", NFNETS)
def test_nfnets(variant):
    size, published = NFNETS[variant]
    assert size == VARIANTS[variant].test_size
    model = on_meta(getattr(nfk.models, f"nfnet_{variant}"))
    assert round(count_flops(model, size) / 1e9, 2) == published


def test_timm_has_the_same_architecture():
    ours, timms = on_meta(nfk.models.nfnet_f0), on_meta(peers.create_model, "dm_nfnet_f0")
    assert count_flops(ours, 256) == count_flops(timms, 256) == 12_384_198_656
    assert round(count_flops(ours, 192) / 1e9, 3) == round(count_flops(timms, 192) / 1e9, 3) == 6.977


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_networks_of_torchvision(name):
    """Grouped and depthwise convolutions, squeeze-excite, linear layers on (N, H, W, C)."""
    weights = peers.get_model_weights(name).DEFAULT
    size = weights.transforms.keywords["crop_size"]
    assert round(count_flops(on_meta(peers.get_model, name), size) / 1e9, 3) == weights.meta["_ops"]


@pytest.mark.parametrize("shortcut", ["conv", "avg_pool"])
def test_a_nf_resnet_takes_what_its_batch_norm_twin_takes(shortcut):
    ours = count_flops(on_meta(nfk.models.nf_resnet50, shortcut=shortcut), 224)
    assert ours == count_flops(on_meta(BNResNet, shortcut=shortcut), 224) == 4_089_184_256


@pytest.mark.parametrize(
    "layer, in_chans, expected",
    [
        (nn.Conv2d(4, 6, 3), 4, 6 * 4 * 9 * 8 * 8),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), 4, 6 * 2 * 9 * 5 * 5),
        (nn.Conv2d(4, 4, (3, 5), dilation=2, padding="same", groups=4, bias=False), 4, 4 * 15 * 100),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), 4, 4 * 3 * 4 * 10 * 10),
        (nfk.WSConv2d(4, 6, 3, padding=1), 4, 6 * 4 * 9 * 100),
        (nfk.ScaledStdConv2d(4, 8, 3, groups=4), 4, 8 * 9 * 100),
        (nn.Sequential(nn.Flatten(), nn.Linear(200, 7)), 2, 1400),
        (nn.Linear(10, 7, bias=False), 2, 20 * 70),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nfk.ScaledGELU()), 3, 0),
    ],
)
def test_layers_by_hand(layer, in_chans, expected):
    assert count_flops(layer, 10, in_chans=in_chans) == expected


def test_a_layer_used_twice_counts_twice_and_sizes_may_differ():
    conv = nn.Conv2d(3, 3, 1)
    assert count_flops(nn.Sequential(conv, conv), (5, 7)) == 2 * 9 * 35


def test_half_precision():
    assert count_flops(nn.Conv2d(3, 2, 1).bfloat16(), 4) == 3 * 2 * 16


def test_the_model_stays_as_it_is():
    model = nfk.models.NFResNet(depth=(1, 1, 1, 1), width=1, num_classes=10)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), model)
    model[2].blocks[0].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    assert count_flops(model, 64) > 0
    assert modes == [module.training for module in model.modules()]
    assert [id(one) for one in tensors] == [id(one) for one in [*model.parameters(), *model.buffers()]]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(math.isfinite(parameter.grad.sum()) for parameter in model.parameters())


def test_weights_that_eval_mode_keeps_are_not_counted_with():
    model = nfk.models.NFResNet(depth=(1, 1, 1, 1), width=1, num_classes=10)
    expected = count_flops(model, 64)
    with torch.no_grad():
        before = model.eval()(torch.ones(1, 3, 64, 64))
        assert count_flops(model, 64) == expected
        torch.testing.assert_close(model(torch.ones(1, 3, 64, 64)), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "model, size, in_chans, error, says",
    [
        ("resnet50", 224, 3, TypeError, "model must be a torch.nn.Module, got str"),
        (nn.ReLU(), 224.0, 3, TypeError, "image_size must be made of ints, got 224.0"),
        (nn.ReLU(), True, 3, TypeError, "image_size must be made of ints, got True"),
        (nn.ReLU(), 0, 3, ValueError, "image_size must be at least 1, got 0"),
        (nn.ReLU(), (224, -1), 3, ValueError, "image_size must be at least 1, got -1"),
        (nn.ReLU(), (3, 224, 224), 3, ValueError, "image_size must be one size or"),
        (nn.ReLU(), 224, 0, ValueError, "in_chans must be at least 1, got 0"),
        (nn.ReLU(), 224, "3", TypeError, "in_chans must be made of ints, got '3'"),
    ],
)
def test_bad_input(model, size, in_chans, error, says):
    with pytest.raises(error, match=says.replace("(", r"\(")):
        count_flops(model, size, in_chans=in_chans)
