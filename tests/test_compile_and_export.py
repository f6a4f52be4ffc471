"""A block of standardized convolutions and the fused residual: compiled, on GPUs that need not be there, exported."""

import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nfnets_kernels as nfk
from nfnets_kernels import ops
from nfnets_kernels.models import NFResNet

from .helpers import assert_compiled_is_eager, assert_same
from .module_helpers import perturb

CHANNELS = 8
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
in_each_layout = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
of_each_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


class Block(nn.Module):
    """A residual block with every factor that `functional.residual` takes.

    Its convolutions have no bias, whose gradient a compiled layer leaves to the convolution (see `modules.conv`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nfk.WSConv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.conv1 = nfk.WSConv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.se = nfk.SqueezeExcite(CHANNELS)
        self.gelu = nfk.ScaledGELU()
        self.relu = nfk.ScaledReLU()
        self.skip_gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, h: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        f = self.conv1(self.gelu(self.conv0(self.relu(h))))
        factors = {"skip_gain": self.skip_gain, "se": self.se(f), "keep": keep, "alpha": 0.2}
        return nfk.functional.residual(f, h, activation="gelu", scale=1.7, approximate="tanh", **factors)


def inputs(layout: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    return [torch.randn(2, CHANNELS, 5, 5).to(memory_format=layout), torch.tensor([0.0, 1.0])]


@in_each_layout
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_block_compiles_into_one_graph(layout, compiler):
    block = perturb(Block())
    parameters = dict(block.named_parameters())

    def run(h: Tensor, keep: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (h, keep))

    leaves = [x.requires_grad_() for x in inputs(layout)]
    assert_compiled_is_eager(run, [*leaves, *parameters.values()], compiler=compiler)


def on_cuda(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Fake CUDA tensors like these; inside a FakeTensorMode."""
    return [torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda") for x in tensors]


def layouts(tensors: Iterable[Tensor]) -> list[tuple]:
    return [(x.device.type, x.dtype, x.shape, x.stride()) for x in tensors]


# A torch without CUDA aborts where autograd meets a CUDA tensor: the passes are called one by one.


@in_each_layout
@of_each_dtype
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_block_on_fake_cuda_tensors(layout, dtype, compiled):
    torch.compiler.reset()
    graphs = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def run(h: Tensor, keep: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (h, keep))

    block, (h, keep) = Block(), inputs(layout)
    parameters = dict(block.named_parameters())
    weight = block.conv1.weight.detach().to(memory_format=layout)
    with FakeTensorMode(), torch.no_grad():
        function = torch.compile(run, fullgraph=True, backend=record) if compiled else run
        fake_h, *others = on_cuda([h, keep, *parameters.values()], dtype)
        outs = function(fake_h, *others)
        # whose strides are those of cuDNN, or of whatever convolves in a torch without CUDA
        convolved = nn.functional.conv2d(fake_h, *on_cuda([weight], dtype))
    assert layouts(outs) == layouts([convolved] * 2)
    assert (outs[0].device.type, outs[0].dtype, outs[0].shape) == ("cuda", dtype, h.shape)
    targets = {node.target for graph in graphs for node in graph.graph.nodes}
    assert len(graphs) == compiled
    assert not compiled or targets >= {
        ops.weight_standardize.weight_standardize,
        ops.scaled_activation.scaled_activation,
        ops.residual.residual,
    }


@in_each_layout
@of_each_dtype
def test_backward_passes_on_fake_cuda_tensors(layout, dtype):
    (x, keep), gain, weight = inputs(layout), torch.ones(CHANNELS), torch.randn(CHANNELS, 4, 3, 3)
    se, skip_gain = torch.ones(2, CHANNELS), torch.tensor(0.5)
    activation = "gelu", 1.7, "tanh", "auto"
    with FakeTensorMode(), torch.no_grad():
        grad, saved = on_cuda([x, x], dtype)
        grad_x = ops.scaled_activation.scaled_activation_backward(grad, saved, *activation)
        factors = on_cuda([skip_gain, se, keep], torch.float32)
        grads = ops.residual.residual_backward(grad, grad, grad, saved, *factors, 0.2, *activation)
        (grad_out,), of_layer = on_cuda([weight], dtype), on_cuda([weight, gain], torch.float32)
        grad_weights, grad_gains = ops.weight_standardize.weight_standardize_backward(
            [grad_out], of_layer[:1], of_layer[1:], [1.0], 1e-4, "clamp", "auto"
        )
    like_x = ("cuda", dtype, x.shape, x.stride())
    assert layouts([grad_x, *grads[:2]]) == [like_x] * 3
    assert layouts(grads[2:]) == layouts(factors)
    assert layouts([*grad_weights, *grad_gains]) == layouts(of_layer)


@of_each_dtype
def test_agc_on_fake_cuda_tensors(dtype):
    with FakeTensorMode(), torch.no_grad():
        parameters = on_cuda([torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(())], dtype)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        nfk.agc_(parameters)
        assert layouts(parameter.grad for parameter in parameters) == layouts(parameters)


@pytest.mark.parametrize("use_se", [False, True], ids=["plain", "se"])
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_exports_with_any_batch_size(strict, use_se):
    model = perturb(NFResNet((1, 1, 1, 1), 1, num_classes=10, use_se=use_se)).eval()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=(batch,), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    with torch.no_grad():
        for count in (1, 5):
            x = torch.randn(count, 3, 32, 32)
            assert_same(exported.module()(x), model(x))
            assert_same(loaded.module()(x), model(x))
