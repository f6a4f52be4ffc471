"""`deployment.fold` as a graph: what others' networks do around our layers, sharing, loading without the package."""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import nfnets_kernels as nfk
from nfnets_kernels.deployment import fold
from nfnets_kernels.integrations.timm import accelerate
from nfnets_kernels.models import NFNet, NFRegNet, NFResNet
from nfnets_kernels.modules.batched import BatchedWeightStandardization
from nfnets_kernels.modules.standardized import Standardized

from .module_helpers import assert_results, float64_parameters, on_one_thread, perturb, weight_of

one_thread = pytest.fixture(on_one_thread, autouse=True)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def assert_folds(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """The folded model returns what the model in eval mode does; returns it."""
    folded = fold(model)
    assert not any(isinstance(part, Standardized) for part in folded.modules())
    with torch.no_grad():
        assert_close(folded(*inputs), copy.deepcopy(model).eval()(*inputs))
    return folded


WITHOUT_PACKAGE = """
import sys
sys.modules["nfnets_kernels"] = None  # importing it fails
import copy, pickle, torch
torch.set_num_threads(1)
saved = torch.load(sys.argv[1], weights_only=False)
for model, x, expected in saved:
    for loaded in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), expected)
print(len(saved))
"""


def test_loads_and_runs_where_the_package_is_not(tmp_path):
    saved = []
    for options in ({"use_se": True, "activation": "gelu"}, {"shortcut": "avg_pool"}):
        folded = fold(perturb(NFResNet((1, 1, 1, 1), 1, num_classes=10, **options)))
        saved.append((folded, torch.randn(2, 3, 33, 40)))
    saved.append((fold(nfk.WSConv2d(3, 4, 3)), torch.randn(2, 3, 8, 8)))
    with torch.no_grad():
        torch.save([(folded, x, folded(x)) for folded, x in saved], tmp_path / "folded.pt")
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_PACKAGE, str(tmp_path / "folded.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("3", "")


class Everyday(nn.Module):
    """What other people's networks do around our layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nfk.WSConv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nfk.ScaledReLU(inplace=True))
        self.conv = nfk.WSConv2d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("offset", torch.rand(8, 1, 1))
        self.drop = nn.Dropout2d(0.5)
        self.head = nfk.WSLinear(8, 5)

    def forward(self, x: Tensor, crop: int | None = None, *, features: bool = False) -> Tensor:
        if crop is not None:
            x = x[..., :crop]
        x = self.stem(x)
        x += self.offset
        out = self.drop(self.conv(x))
        out.add_(x)
        out = out * F.normalize(self.scale, dim=0)
        out = F.interpolate(out, [2 * size for size in out.shape[-2:]])
        out = F.dropout(out.mean(dim=(2, 3)), 0.3, self.training)
        return out if features else self.head(out)


def test_other_peoples_networks():
    model = perturb(Everyday())
    model.stem[1].running_mean.normal_()
    folded = assert_folds(model, torch.randn(2, 3, 9, 12))
    x = torch.randn(3, 3, 11, 7)
    with torch.no_grad():
        expected = model.eval()(x)
        folded.train().stem.eval()  # BatchNorm
        assert_close(folded(x), expected)  # dropout does not come back
    assert "drop" not in "".join(str(node.target) for node in folded.graph.nodes)
    assert dict(folded.named_buffers()).keys() >= {"offset", "stem.1.running_mean"}


class Shared(nn.Module):
    """One convolution called with different factors, and twice with the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nfk.WSConv2d(4, 4, 1)
        self.skip_gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(self.conv(x)) + self.conv(input=x, alpha=0.5)
        out = out + self.conv(x, skip_gain=self.skip_gain, alpha=0.5)
        return out + self.conv(x, skip_gain=x.mean())


def test_a_layer_is_folded_once_for_each_set_of_factors():
    model, x = perturb(Shared()), torch.randn(2, 4, 5, 5)
    folded = assert_folds(model, x)
    assert [name for name, _ in folded.named_children()] == ["conv", "conv__1", "conv__2"]
    p = float64_parameters(model)
    weight = weight_of()({"weight": p["conv.weight"], "gain": p["conv.gain"]})
    for layer, factor in ((folded.conv, 1.0), (folded.conv__1, 0.5)):
        expected = F.conv2d(x.double(), factor * weight, factor * p["conv.bias"]).detach()
        assert_results({"output": layer(x).detach(), "input": x}, {"output": expected, "input": x.double()})


class Overwrites(nn.Module):
    """Reads a tensor after an activation and a sum that were written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nfk.WSConv2d(4, 4, 1)
        self.activations = nn.ModuleList(
            [nfk.ScaledReLU(inplace=True), nfk.ScaledActivation("leaky_relu", inplace=True)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for activation in self.activations:
            out = self.conv(x)
            activation(out)
            out.add_(x)
            x = out
        return x


def test_what_is_written_in_place_is_read_again():
    assert_folds(perturb(Overwrites()), torch.randn(2, 4, 5, 5))


def test_parametrized_and_frozen_layers():
    model = nn.Sequential(parametrizations.weight_norm(nfk.WSConv2d(3, 4, 3)), nfk.WSConv2d(4, 4, 3))
    model[1].requires_grad_(False)
    folded = assert_folds(perturb(model), torch.randn(2, 3, 8, 8))
    assert [name for name, p in folded.named_parameters() if not p.requires_grad] == ["1.weight", "1.bias"]


WIDTH, BLOCKS = (16, 16, 32, 32), (1, 2, 1, 1)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "nfnet": partial(NFNet, WIDTH, BLOCKS, group_width=4, stochdepth_rate=0.1, drop_rate=0.2),
    "nfnet, eca, timm": partial(NFNet, WIDTH, BLOCKS, group_width=4, attention="eca", numerics="timm"),
    "nf_regnet": partial(NFRegNet, WIDTH, BLOCKS),
    "nf_resnet, timm": partial(NFResNet, BLOCKS, 1, numerics="timm", shortcut="avg_pool"),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_fold_whole(make):
    model = perturb(make(num_classes=10))
    folded = fold(model)
    assert isinstance(folded, torch.fx.GraphModule)
    assert not any(type(part).__module__.startswith("nfnets_kernels") for part in folded.modules())
    model.double().eval()
    for size in (64, 75):
        x = torch.randn(2, 3, size, size + 1)
        with torch.no_grad():
            assert_close(folded(x), model(x.double()))


def test_features_fold_into_a_list():
    model = perturb(NFResNet(BLOCKS, 1, features_only=True)).eval()
    x = torch.randn(2, 3, 33, 32)
    with torch.no_grad():
        actual, expected = fold(model)(x), model(x)
    assert len(actual) == len(expected) == 5
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", ["nf_regnet_b0", "nf_resnet26"])
def test_accelerated_timm_model_folds_to_timms_values(name):
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(2, 3, 65, 64)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        assert_close(fold(accelerate(model))(x), expected)


class DependsOnData(nn.Module):
    """torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = NFResNet((1, 1, 1, 1), 1, num_classes=6, use_se=True)
        self.heads = nn.ModuleList([nfk.WSLinear(6, 4), nn.Sequential(nfk.ScaledGELU(), nfk.WSLinear(6, 4))])
        self.also = self.heads[0]
        self.nothing = None

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        head = self.heads[0] if features.sum() > 0 else self.heads[1]
        return head(features) + self.also(features)


def test_a_network_that_cannot_be_traced_is_folded_module_by_module():
    model = perturb(DependsOnData())
    BatchedWeightStandardization(model, "model")
    with pytest.warns(UserWarning, match=r"DependsOnData is folded module by module: torch.fx cannot trace it \(Trace"):
        folded = fold(model)
    assert type(folded) is DependsOnData and not folded.training
    assert type(folded.also) is nn.Linear and folded.also is folded.heads[0]
    assert isinstance(model.also, nfk.WSLinear)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in folded.modules())
    assert not any(type(part).__module__.startswith("nfnets_kernels") for part in folded.modules())
    with torch.no_grad():
        for seed in range(4):
            x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            assert_close(folded(x), copy.deepcopy(model).eval()(x))


def test_standardized_layers_inside_torchs_own_modules():
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    layer.linear1 = nfk.WSLinear(8, 16)
    model = nn.TransformerDecoder(layer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether torch.fx can trace it is torch's affair
        assert_folds(perturb(model), torch.randn(2, 3, 8), torch.randn(2, 4, 8))


class OwnForward(nfk.WSConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


BAD_MODELS = {
    "no module": (TypeError, lambda: fold(torch.ones(3)), "model must be an nn.Module, got Tensor"),
    "nothing": (ValueError, lambda: fold(nn.Sequential(nn.Conv2d(3, 4, 3))), "got a Sequential with nothing to fold"),
    "own forward": (ValueError, lambda: fold(nn.Sequential(OwnForward(3, 4, 3))), "cannot fold 0: OwnForward has a"),
}


@pytest.mark.parametrize("error, call, message", BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models(error, call, message):
    with pytest.raises(error, match=message):
        call()


class Broken(NFResNet):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            raise RuntimeError
        return super().forward(x)


def test_a_model_of_ours_that_cannot_be_traced_is_an_error_and_leaves_no_trace():
    model = Broken((1, 1, 1, 1), 1)
    before = nfk.ops.residual.residual
    with pytest.raises(torch.fx.proxy.TraceError):
        fold(model)
    assert nfk.ops.residual.residual is before
