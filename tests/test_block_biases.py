"""The biases of a network's convolutions, which on a GPU the passes after them add: nothing else may change."""

import contextlib
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import prune

import nfnets_kernels as nfk
from nfnets_kernels.diagnostics import signal_propagation
from nfnets_kernels.models import blocks, network, nfnet
from nfnets_kernels.modules.squeeze_excite import pool_through

from .helpers import assert_differentiable_twice, channels_last, randn

NFNET = {"width": (32, 32, 64, 64), "depth": (1, 1, 2, 1), "group_width": 16}
NF_RESNET = {"depth": (1, 2, 1, 1), "width": 1}
NETWORKS = {
    "NF-ResNet": lambda **options: nfk.models.NFResNet(**NF_RESNET, **options),
    "NF-ResNet, pooled shortcuts": lambda **options: nfk.models.NFResNet(
        **NF_RESNET, shortcut="avg_pool", numerics="timm", activation="silu", **options
    ),
    "NF-ResNet, gated": lambda **options: nfk.models.NFResNet(
        **NF_RESNET, use_se=True, activation="gelu", **options
    ),
    "NF-ResNet, stochastic depth": lambda **options: nfk.models.NFResNet(**NF_RESNET, stochdepth_rate=0.5, **options),
    "NFNet": lambda **options: nfk.models.NFNet(**NFNET, **options),
    "NFNet, stochastic depth": lambda **options: nfk.models.NFNet(
        **NFNET, activation="relu", stochdepth_rate=0.5, **options
    ),
    "NF-RegNet": lambda **options: nfk.models.NFRegNet((16, 16, 24, 32), (1, 2, 1, 1), group_width=8, **options),
}  # fmt: skip


def make(name, dtype=torch.float64, **options):
    """A network whose biases, gains and skip gains are not what they start as."""
    torch.manual_seed(0)
    model = NETWORKS[name](num_classes=5, **options).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(dtype=torch.float64):
    return channels_last(randn((2, 3, 48, 48), dtype))


@contextlib.contextmanager
def taking_biases(taking=True):
    """Activations add the biases of convolutions, as on a GPU; or not, as on a CPU."""
    with contextlib.ExitStack() as stack:
        for module in (blocks, network, nfnet):
            stack.enter_context(mock.patch.object(module, "takes_biases", lambda _: taking))
        yield


@pytest.fixture
def as_on_a_gpu():
    with taking_biases():
        yield


def results(model, x):
    """Outputs of training and all gradients."""
    torch.manual_seed(1)  # of stochastic depth
    model.zero_grad()
    outputs = model(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(out.square().sum() for out in outputs).backward()
    return [*(out.detach() for out in outputs), *(parameter.grad for parameter in model.parameters())]


@contextlib.contextmanager
def convolution_biases():
    """Collects the biases that convolutions are called with."""
    biases, convolve = [], F.conv2d

    def record(input, weight, bias=None, *rest):
        biases.append(bias)
        return convolve(input, weight, bias, *rest)

    with mock.patch.object(F, "conv2d", record):
        yield biases


@pytest.mark.parametrize("name", NETWORKS)
def test_same_outputs_and_gradients(as_on_a_gpu, name):
    model, x = make(name), images()
    together = results(model, x)
    with taking_biases(False):
        torch.testing.assert_close(together, results(model, x))


@pytest.mark.parametrize("name", ["NF-ResNet", "NFNet"])
def test_same_features(as_on_a_gpu, name):
    model, x = make(name, features_only=True), images()
    together = results(model, x)
    with taking_biases(False):
        torch.testing.assert_close(together, results(model, x))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), together[: len(model.feature_info)])


@pytest.mark.parametrize("name", ["NF-ResNet", "NFNet", "NF-RegNet"])
def test_same_outputs_and_gradients_with_checkpoints_and_an_owner(as_on_a_gpu, name):
    model, x = make(name), images()
    alone = results(model, x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(results(model, x), alone)
    nfk.BatchedWeightStandardization(model, group="model")
    torch.testing.assert_close(results(model, x), alone)


@pytest.mark.parametrize(("name", "gated"), [("NF-ResNet", False), ("NFNet", True), ("NF-RegNet", True)])
def test_convolutions_add_a_bias_only_before_a_gate(as_on_a_gpu, name, gated):
    """In inference on a CPU every convolution adds its own, which oneDNN does for nothing."""
    model, x = make(name, torch.float32), images(torch.float32)
    with convolution_biases() as biases:
        model(x)
    assert sum(bias is not None for bias in biases) == (len(model.blocks) if gated else 0)
    with taking_biases(False), convolution_biases() as biases, torch.no_grad():
        model.eval()(x)
    assert biases
    assert all(bias is not None for bias in biases)


def test_on_a_cpu_the_last_pass_of_a_block_adds_biases_in_training():
    model, x = make("NF-ResNet", torch.float32), images(torch.float32)
    with convolution_biases() as biases:
        model(x)
    last = sum(1 if block.conv_shortcut is None else 2 for block in model.blocks)
    assert sum(bias is None for bias in biases) == last


@pytest.mark.parametrize("name", NETWORKS)
def test_inference_as_on_a_gpu(name):
    """Nor do convolutions add biases there, whose weights are kept from pass to pass."""
    model, x = make(name).eval(), images()
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            with taking_biases(), convolution_biases() as biases:
                torch.testing.assert_close(model(x), expected)
    gated = 0 if model.blocks[0].se is None else len(model.blocks)
    assert sum(bias is not None for bias in biases) == gated


def test_compiled_convolutions_keep_their_biases():
    model, x = make("NF-ResNet", torch.float32), images(torch.float32)
    traced = []

    def collect(graph, inputs):
        traced.extend(node for node in graph.graph.nodes if node.target is torch.conv2d)
        return graph.forward

    torch.compile(model, backend=collect, fullgraph=True)(x)
    assert traced
    assert all(node.args[2] is not None for node in traced)


@pytest.mark.parametrize("name", ["NF-ResNet", "NFNet", "NF-RegNet"])
def test_hooks_see_what_a_convolution_returns_in_inference(as_on_a_gpu, name):
    model, x = make(name), images()
    layers = [module for module in model.modules() if isinstance(module, nfk.WSConv2d)]
    seen = []
    handles = [layer.register_forward_hook(lambda layer, _, out: seen.append(out.clone())) for layer in layers]
    model(x)
    trained, seen[:] = list(seen), []
    with torch.no_grad():
        model.eval()(x)
    torch.testing.assert_close(trained, seen)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["NF-ResNet", "NFNet"])
def test_signal_metrics_of_training_are_those_of_inference(as_on_a_gpu, name):
    model, x = make(name), images()
    torch.testing.assert_close(dict(signal_propagation(model, x)), dict(signal_propagation(model.eval(), x)))


def test_a_block_by_itself():
    block = make("NF-ResNet").blocks[0]
    h = channels_last(randn((2, block.conv0.in_channels, 8, 8), torch.float64))
    both = []
    for context in (taking_biases(), taking_biases(False)):
        with context:
            outputs = block(h, h.relu())
            both.append([*outputs, *torch.autograd.grad(outputs[1].square().sum(), block.conv0.bias)])
    torch.testing.assert_close(*both)


def test_a_layer_without_a_bias_and_a_pruned_one(as_on_a_gpu):
    model, x = make("NF-ResNet"), images()
    block = model.blocks[1]
    block.conv0.bias = None
    prune.custom_from_mask(block.conv1, "weight", (torch.rand_like(block.conv1.weight) > 0.5).double())
    together = model(x)
    with taking_biases(False):
        torch.testing.assert_close(together, model(x))


def test_pooling_for_a_gate():
    """The average and its gradient, in x's memory format, twice differentiable, compiled, without gradients too."""
    x = channels_last(randn((2, 3, 4, 5), torch.float64)).requires_grad_()
    pooled, same = pool_through(x)
    torch.testing.assert_close(pooled, x.mean((2, 3), keepdim=True))
    assert same.data_ptr() == x.data_ptr()
    inner = x * 1
    inner.register_hook(lambda grad: strides.append(grad.stride()))
    strides: list[tuple[int, ...]] = []
    pooled, same = pool_through(inner)
    torch.autograd.backward([pooled, same], [torch.ones_like(pooled), torch.ones_like(x)])
    assert strides == [x.stride()]

    def gated(x):
        pooled, x = pool_through(x)
        return x * pooled.mean((2, 3), keepdim=True).sigmoid()

    torch.testing.assert_close(gated(x), x * x.mean((2, 3), keepdim=True).sigmoid())
    assert_differentiable_twice(gated, [x])
    assert_differentiable_twice(lambda x: pool_through(x)[0], [x])
    outputs = [function(x) for function in (gated, torch.compile(gated, backend="aot_eager", fullgraph=True))]
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x) for out in outputs))
    with torch.inference_mode():
        torch.testing.assert_close(pool_through(x)[0], x.mean((2, 3), keepdim=True))
    assert pool_through(x[:0])[0].shape == (0, 3, 1, 1)
