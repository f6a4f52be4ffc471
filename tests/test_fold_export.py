"""What `deployment.fold` is for: torch.export, ONNX in onnxruntime, quantization by torch.ao."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nfnets_kernels as nfk
from nfnets_kernels.deployment import fold
from nfnets_kernels.models import NFNet, NFResNet

from .module_helpers import on_one_thread, perturb

one_thread = pytest.fixture(on_one_thread, autouse=True)

RESNET = partial(NFResNet, (1, 1, 1, 1), 1, num_classes=10)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "nf_resnet": RESNET,
    "gated": partial(RESNET, activation="gelu", use_se=True, shortcut="avg_pool"),
    "nfnet": partial(NFNet, (16, 16, 32, 32), (1, 1, 1, 1), num_classes=10, group_width=8),
}
in_each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
# An odd size: padding="SAME" then differs from layer to layer.
SIZE = (3, 37, 42)
BATCH = {0: torch.export.Dim("batch", min=1, max=64)}


def tiny(make: Callable[[], nn.Module] = RESNET) -> nn.Module:
    return perturb(make()).eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@in_each_network
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_exports_with_any_batch_size(strict, make):
    model = tiny(make)
    exported = torch.export.export(fold(model), (torch.randn(2, *SIZE),), dynamic_shapes=(BATCH,), strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets and not any("nfnets" in target for target in targets)
    with torch.no_grad():
        for count in (1, 5):
            x = torch.randn(count, *SIZE)
            assert relative_error(exported.module()(x), model(x)) < 1e-5


def test_exports_with_any_size_of_image_that_keeps_its_parity():
    model = tiny()
    sizes = {dim: 32 * torch.export.Dim(name, min=1, max=16) for dim, name in ((2, "height"), (3, "width"))}
    exported = torch.export.export(fold(model), (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sizes,))
    with torch.no_grad():
        x = torch.randn(2, 3, 128, 160)
        assert relative_error(exported.module()(x), model(x)) < 1e-5


def run_onnx(module: nn.Module, x: Tensor, path: Path) -> Tensor:
    """What onnxruntime returns for x after an export with another batch size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = str(path / "folded.onnx")
    example = torch.randn(x.shape[0] + 1, *x.shape[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own
        program = torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=(BATCH,), verbose=False)
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    return torch.from_numpy(out)


@in_each_network
def test_onnx(make, tmp_path):
    model, x = tiny(make), torch.randn(5, *SIZE)
    with torch.no_grad():
        assert relative_error(run_onnx(fold(model), x, tmp_path), model(x)) < 1e-5


def test_onnx_of_every_activation(tmp_path):
    class Activations(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = [name for name in nfk.ops.scaled_activation.reference.GAMMA if name != "glu"]
            self.activations = nn.ModuleList([nfk.ScaledActivation(name) for name in [*names, "gelu", "glu"]])
            self.activations[-2].approximate = "tanh"

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([activation(x) for activation in self.activations], dim=1)

    model, x = Activations(), torch.randn(5, 4, 3, 3)
    assert relative_error(run_onnx(fold(model), x, tmp_path), model(x)) < 1e-5


@in_each_network
def test_torch_ao_quantizes_it(make):
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    model, x = tiny(make), torch.randn(8, *SIZE)
    folded = fold(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch announces the end of its own API
        prepared = quantize_fx.prepare_fx(folded, get_default_qconfig_mapping("x86"), (x,))
        assert relative_error(prepared(x), model(x)) < 1e-5
        quantized = quantize_fx.convert_fx(prepared)
        # Each of some 20 tensors is rounded to 8 bits of its range.
        assert relative_error(quantized(x), model(x)) < 20 / 128
    convolutions = [part for part in folded.modules() if isinstance(part, nn.Conv2d)]
    quantized_names = [type(part).__name__ for part in quantized.modules() if "quantized" in type(part).__module__]
    assert sum(name in ("Conv2d", "ConvReLU2d") for name in quantized_names) == len(convolutions) > 10
    assert not any(isinstance(part, nn.Conv2d) for part in quantized.modules())
    if make is RESNET:
        assert "ConvReLU2d" in quantized_names
