"""`deployment.fold`: layers, arithmetic and networks in plain torch against plain formulas in float64."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.func import functional_call

import nfnets_kernels as nfk
from nfnets_kernels.deployment import fold, plain_ops
from nfnets_kernels.models import NFResNet
from nfnets_kernels.modules.standardized import Standardized

from .helpers import MODULES, channels_last, named
from .module_helpers import (
    LAYERS,
    authors_nf_resnet,
    float64_parameters,
    make_layer,
    on_one_thread,
    perturb,
    standardized_transposed,
    weight_of,
)
from .tolerances import assert_accurate

one_thread = pytest.fixture(on_one_thread, autouse=True)

PLAIN_CONV = weight_of()
# Of layers with a fan-in of 36.
WEIGHTS = {
    "WSConvTranspose2d": lambda parameters: standardized_transposed(parameters["weight"], parameters["gain"], 1),
    "ScaledStdConv2d": weight_of(eps=1e-6, eps_form="add"),
    "StdConv2d": weight_of(gamma=6.0, eps=1e-6, eps_form="add"),
}
DEPTH = (1, 2, 1, 1)


def assert_outputs(folded: nn.Module, inputs: tuple[Tensor, ...], expected: Tensor, layers: int = 1) -> None:
    """What folded returns is expected, a float64 result, and nothing but torch computes it."""
    with torch.no_grad(), nfk.backend.recording() as calls:
        out = folded(*inputs)
    assert not calls and not any(isinstance(part, Standardized) for part in folded.modules())
    terms = out.numel() + sum(x.numel() for x in inputs)
    assert_accurate(out, expected, unit_length=terms, magnitude=layers * expected.abs().max())


def assert_is_plain(folded: nn.Module) -> None:
    assert not [part for part in folded.modules() if not type(part).__module__.startswith("torch.")]
    assert not any(part.training for part in folded.modules())


@pytest.mark.parametrize("name", LAYERS)
def test_layer_becomes_torchs(name):
    module, x = make_layer(name)
    _, torchs, arguments, _ = LAYERS[name]
    module.requires_grad_(name != "WSConv1d")
    before = copy.deepcopy(module.state_dict())
    folded = fold(module)
    assert type(folded) is torchs
    assert_is_plain(folded)
    assert {p.requires_grad for p in folded.parameters()} == {name != "WSConv1d"}
    assert module.training and not torch.equal(folded.weight, module.weight)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    parameters = float64_parameters(module)
    weights = {"weight": WEIGHTS.get(name, PLAIN_CONV)(parameters), "bias": parameters.get("bias")}
    options = {"padding": 1} if name in ("ScaledStdConv2d", "StdConv2d") else {}
    layer = torchs(*arguments, bias="bias" in parameters, **options)
    weights = {key: value for key, value in weights.items() if value is not None}
    assert_outputs(folded, (x,), functional_call(layer, weights, x.double()))


ARGUMENTS = {
    "strided": {"stride": (2, 1), "padding": (1, 0)},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "grouped": {"groups": 2, "padding": 1},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "no bias": {"bias": False},
    "no gain": {"gain": False},
    "eps": {"gamma": 1.7, "eps": 0.1, "eps_form": "add"},
}


@pytest.mark.parametrize("options", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_a_convolution(options):
    module, x = perturb(nfk.WSConv2d(4, 6, 3, **options)), torch.randn(2, 4, 9, 8)
    parameters = float64_parameters(module)
    standardization = {key: options[key] for key in options if key in ("gamma", "eps", "eps_form")}
    layer = nn.Conv2d(4, 6, 3, **{key: options[key] for key in options if key not in (*standardization, "gain")})
    weights = {**parameters, "weight": weight_of(**standardization)(parameters)}
    assert_outputs(fold(module), (x,), functional_call(layer, weights, x.double()))


def test_transposed_convolution_takes_an_output_size():
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nfk.WSConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[10, 9])

    module, x = perturb(Up()), torch.randn(2, 4, 5, 5)
    parameters = float64_parameters(module.up)
    weight = standardized_transposed(parameters["weight"], parameters["gain"], 2)
    expected = F.conv_transpose2d(x.double(), weight, parameters["bias"], 2, 1, (1, 0), 2)
    assert_outputs(fold(module), (x,), expected)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, (7, 4)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_of_one_folded_network_is_exact_for_every_size(kernel_size, stride, dilation):
    module = perturb(nfk.WSConv2d(4, 6, kernel_size, stride, "SAME", dilation))
    folded = fold(nn.Sequential(module))
    parameters = float64_parameters(module)
    weight = weight_of()(parameters)
    for size in [(9, 8), (8, 9), (7, 12), (10, 10), (11, 11)]:
        x = torch.randn(2, 4, *size)
        padded = pad_same(x.double(), module.kernel_size, module.stride, module.dilation)
        expected = F.conv2d(padded, weight, parameters["bias"], module.stride, 0, module.dilation)
        assert_outputs(folded, (x,), expected)


def test_same_padding_that_no_size_changes_is_left_to_torchs_layer():
    assert fold(nfk.WSConv2d(4, 6, (3, 1), (1, 2), padding="SAME")).padding == (1, 0)
    assert fold(nfk.WSConv1d(4, 6, 5, dilation=2, padding="SAME")).padding == (4,)
    folded = fold(nfk.WSConv2d(4, 6, 3, 2, padding="SAME", padding_mode="reflect"))
    assert_is_plain(folded)
    assert folded.get_submodule("0").padding == (0, 0)


@pytest.mark.parametrize("ours, size", [(nfk.WSConv1d, (9,)), (nfk.WSConv3d, (5, 6, 4))], ids=["1d", "3d"])
def test_same_padding_of_other_dims_and_modes(ours, size):
    module, x = perturb(ours(4, 6, 3, 2, padding="SAME", padding_mode="circular")), torch.randn(2, 4, *size)
    parameters = float64_parameters(module)
    pads = [pad for length in reversed(size) for pad in ((1, 1) if length % 2 else (0, 1))]
    padded = F.pad(x.double(), pads, mode="circular")
    convolve = F.conv1d if len(size) == 1 else F.conv3d
    assert_outputs(fold(module), (x,), convolve(padded, weight_of()(parameters), parameters["bias"], 2))


@pytest.mark.parametrize("key", MODULES)
def test_activations(key):
    name, approximate = named(key)
    module = nfk.ScaledActivation(name, 1.3, 0.7, approximate=approximate)
    x = torch.randn(2, 4, 5, 6)
    assert_outputs(fold(nn.Sequential(module)), (x,), 1.3 * 0.7 * MODULES[key](x.double()))


class Biased(nn.Module):
    """A convolution whose bias the activation adds."""

    def __init__(self, layer: type) -> None:
        super().__init__()
        self.conv = layer(4, 6, 1, bias=False)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        inner = nfk.functional.scaled_activation(self.conv(x), "gelu", bias=self.bias)
        return nfk.functional.scaled_activation(inner, "relu", bias=self.bias, inplace=True)


@pytest.mark.parametrize("layer, size", [(nfk.WSConv1d, (7,)), (nfk.WSConv2d, (5, 4)), (nfk.WSConv3d, (2, 3, 4))],
                         ids=["1d", "2d", "3d"])  # fmt: skip
def test_activation_with_a_bias(layer, size):
    module = perturb(Biased(layer))
    x, p = torch.randn(2, 4, *size), float64_parameters(module)
    weight = weight_of()({"weight": p["conv.weight"], "gain": p["conv.gain"]}).flatten(1)
    bias = p["bias"].view(-1, *(1,) * len(size))
    inner = 1.7015043497085571 * torch.nn.functional.gelu(torch.einsum("oc,nc...->no...", weight, x.double()) + bias)
    assert_outputs(fold(module), (x,), 1.7139588594436646 * torch.relu(inner + bias))


class Block(nn.Module):
    """A block with every factor of `functional.residual`."""

    def __init__(self, layer: type, gated: bool) -> None:
        super().__init__()
        self.conv = layer(4, 4, 1)
        self.se = nfk.SqueezeExcite(4) if gated else None
        self.skip_gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        f = self.conv(x)
        factors = {"skip_gain": self.skip_gain, "se": None if self.se is None else self.se(f), "keep": keep}
        return nfk.functional.residual(f, x, alpha=0.2, activation="silu", scale=1.5, **factors)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("layer, size", [(nfk.WSConv1d, (7,)), (nfk.WSConv2d, (5, 4)), (nfk.WSConv3d, (2, 3, 4))],
                         ids=["1d", "2d", "3d"])  # fmt: skip
def test_residual(layer, size, gated):
    block = perturb(Block(layer, gated))
    x, keep = torch.randn(2, 4, *size), torch.tensor([1.0, 1.25])
    p, ones = float64_parameters(block), (1,) * len(size)
    x64 = x.double()
    weight = weight_of()({"weight": p["conv.weight"], "gain": p["conv.gain"]}).flatten(1)
    f = torch.einsum("oc,nc...->no...", weight, x64) + p["conv.bias"].view(-1, *ones)
    factor = 0.2 * p["skip_gain"] * keep.double()[:, None]
    if gated:
        hidden = torch.relu(f.flatten(2).mean(2) @ p["se.fc0.weight"].t() + p["se.fc0.bias"])
        factor = factor * 2 * torch.sigmoid(hidden @ p["se.fc1.weight"].t() + p["se.fc1.bias"])
    h = factor.reshape(*factor.shape, *ones) * f + x64
    folded = fold(block)
    for part, expected in enumerate((h, 1.5 * F.silu(h))):
        assert_outputs(Part(folded, part), (x, keep), expected, layers=4)


class Part(nn.Module):
    """One of the results of a module that returns several."""

    def __init__(self, module: nn.Module, part: int) -> None:
        super().__init__()
        self.module = module
        self.part = part

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)[self.part]


NETWORKS = {
    "relu": {},
    "gated": {"use_se": True, "stochdepth_rate": 0.2, "drop_rate": 0.2},
    "gelu": {"activation": "gelu", "shortcut": "avg_pool"},
    "silu, gated": {"activation": "silu", "use_se": True, "shortcut": "avg_pool"},
}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_nf_resnet_is_the_authors(options):
    model = perturb(NFResNet(DEPTH, 1, num_classes=10, **options))
    folded = fold(model)
    assert_is_plain(folded)
    assert {f"{name}.weight" for name, part in model.named_modules() if hasattr(part, "weight")} <= set(
        folded.state_dict()
    )
    assert not any(word in name for name in folded.state_dict() for word in ("gain", "constant"))
    parameters = {name: p.detach() for name, p in float64_parameters(model).items()}
    authors = {"activation": options.get("activation", "relu"), "pool_shortcut": "shortcut" in options}
    for size in [(32, 32), (33, 47)]:
        x = torch.randn(2, 3, *size)
        expected = authors_nf_resnet(parameters, x.double(), DEPTH, **authors)["logits"]
        assert_outputs(folded, (x,), expected, layers=2 * len(parameters))
        assert_outputs(fold(model.double()), (x.double(),), expected, layers=2 * len(parameters))
        model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_dtype_and_channels_last_are_kept(dtype, options):
    model = perturb(NFResNet((1, 1, 1, 1), 1, num_classes=10, **options)).to(dtype, memory_format=torch.channels_last)
    folded = fold(model)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    for name, p in folded.named_parameters():
        assert p.stride() == model.get_parameter(name).stride(), name
    layouts = []
    for part in folded.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda _, inputs, out: layouts.extend([inputs[0], out]))
    x = channels_last(torch.randn(2, 3, 40, 40)).to(dtype)
    with torch.no_grad():
        out, expected = folded(x), model.eval()(x)
    assert len(layouts) > 20
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in layouts)
    assert out.dtype == dtype
    # each of some 20 layers rounds to the dtype
    assert ((out - expected).norm() / expected.norm()) < 20 * torch.finfo(dtype).eps


def test_other_threads_keep_the_ops():
    """While one thread traces, another trains."""
    f, gain = torch.randn(2, 3, 4, 4), torch.ones((), requires_grad=True)

    def train():
        nfk.functional.residual(f, f, skip_gain=gain)[0].sum().backward()

    with plain_ops.traceable_ops():
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    torch.testing.assert_close(gain.grad, f.sum())
