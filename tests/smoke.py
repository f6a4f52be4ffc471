"""Tries an installed nfnets_kernels on the CPU, beside any torch: `python tests/smoke.py`, in some seconds.

Needs the package and its dependencies alone, and takes it from where it is installed, never from the checkout. Every
result is compared with a computation in plain torch, in float64 where rounding matters.
"""

import copy
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nfnets_kernels as nfk

EPS = 1e-4
GELU_GAMMA = 1.7015043497085571


def standardized(weight: Tensor, gain: Tensor) -> Tensor:
    """Scaled weight standardization (Brock et al. 2021a, equation 1)."""
    dims = tuple(range(1, weight.ndim))
    variance, mean = torch.var_mean(weight, dims, correction=0, keepdim=True)
    scale = torch.rsqrt((variance * weight[0].numel()).clamp(min=EPS))
    return gain.view_as(mean) * (weight - mean) * scale


def clipped(weight: Tensor, grad: Tensor, clip_factor: float) -> Tensor:
    """Adaptive gradient clipping (Brock et al. 2021b, equation 3)."""

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)) if x.ndim > 1 else None, keepdim=True)

    largest = clip_factor * norm(weight).clamp(min=1e-3)
    return torch.where(norm(grad) < largest, grad, grad * largest / norm(grad).clamp(min=1e-6))


def tiny_network() -> nn.Module:
    return nfk.models.NFResNet(depth=(1, 1, 1, 1), width=1, num_classes=10)


def with_gradients() -> list[nn.Parameter]:
    """Parameters of which some units will be clipped and some not."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((8, 4, 3, 3), (16, 8), (16,))]
    for parameter in parameters:
        parameter.grad = parameter.detach() * torch.linspace(0.0, 0.05, len(parameter)).view(
            -1, *[1] * (parameter.ndim - 1)
        )
    return parameters


def check_installed() -> None:
    checkout = Path(__file__).resolve().parents[1]
    assert not Path(nfk.__file__).resolve().is_relative_to(checkout / "nfnets_kernels"), (
        "this is the checkout's package"
    )
    description = nfk.backend.describe()
    print(description)
    assert set(description.serving["cpu"].values()) == {"cpu"}, "the compiled CPU kernels do not serve"
    if not nfk.backend.extension.cuda_build.startswith("not built"):
        assert nfk.backend.cuda_extension is not None, "the CUDA kernels were built and cannot be imported"


def check_convolution() -> None:
    layer, x = nfk.WSConv2d(6, 8, 3, padding=1), torch.randn(2, 6, 9, 9)
    nn.init.normal_(layer.gain)
    inputs = [x.requires_grad_(), layer.weight, layer.gain, layer.bias]
    x64, weight, gain, bias = exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.conv2d(x64, standardized(weight, gain), bias, padding=1)
    actual = layer(x)
    torch.testing.assert_close(actual, expected.float())
    cotangent = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, inputs, cotangent)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, exact, cotangent.double()), strict=True):
        torch.testing.assert_close(gradient, reference.float(), rtol=1e-5, atol=1e-5)


def check_activation() -> None:
    x = torch.randn(100, 7, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    actual, expected = nfk.ScaledGELU()(x), GELU_GAMMA * F.gelu(x64)
    torch.testing.assert_close(actual, expected.float())
    (gradient,), (reference,) = (torch.autograd.grad(y.sum(), z) for y, z in ((actual, x), (expected, x64)))
    torch.testing.assert_close(gradient, reference.float())


def check_residual() -> None:
    f, shortcut, skip_gain = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor(0.7)
    h, a = nfk.functional.residual(f, shortcut, skip_gain=skip_gain, alpha=0.2, activation="relu", scale=1.5)
    expected = 0.2 * 0.7 * f.double() + shortcut.double()
    torch.testing.assert_close(h, expected.float())
    torch.testing.assert_close(a, (1.5 * expected.relu()).float())


def check_clipping() -> None:
    parameters = with_gradients()
    expected = [clipped(p.detach().double(), p.grad.double(), 0.02).float() for p in parameters]
    assert not torch.equal(expected[0], parameters[0].grad)
    nfk.agc_(parameters, clip_factor=0.02)
    torch.testing.assert_close([p.grad for p in parameters], expected)


def check_optimizer() -> None:
    parameters = with_gradients()
    twins = [nn.Parameter(p.detach().double()) for p in parameters]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
    ours, theirs = nfk.optim.SGD_AGC(parameters, clip_factor=0.02, **options), torch.optim.SGD(twins, **options)
    for _ in range(2):
        for parameter, twin in zip(parameters, twins, strict=True):
            twin.grad = clipped(twin.detach(), parameter.grad.double(), 0.02)
        ours.step()
        theirs.step()
    torch.testing.assert_close([p.detach() for p in parameters], [p.detach().float() for p in twins])


def check_training() -> None:
    model = tiny_network()
    optimizer = nfk.optim.SGD_AGC(nfk.optim.param_groups(model), lr=0.05)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses


def check_compile() -> None:
    network, x = nn.Sequential(nfk.WSConv2d(3, 4, 3), nfk.ScaledGELU()), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))


def check_fold_and_pickle() -> None:
    model, images = tiny_network().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        plain = nfk.deployment.fold(copy.deepcopy(model))
        for other in (pickle.loads(pickle.dumps(model)), plain, pickle.loads(pickle.dumps(plain))):
            torch.testing.assert_close(other(images), expected, rtol=1e-4, atol=1e-5)
    assert not [module for module in plain.modules() if type(module).__module__.startswith("nfnets_kernels")]


def main() -> None:
    torch.manual_seed(0)
    checks = [check for name, check in globals().items() if name.startswith("check_")]
    for check in checks:
        check()
        print(f"{check.__name__}: ok")
    print(f"nfnets_kernels {nfk.__version__} works beside torch {torch.__version__}")


if __name__ == "__main__":
    main()
