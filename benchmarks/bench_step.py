"""The whole training step and inference of ResNet-50 in four forms, from data in memory to updated parameters."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks import training as shared
from benchmarks.bn_resnet import BNResNet
from benchmarks.goals import TIMM, TORCHVISION, TWIN, compiled_case
from benchmarks.harness import BenchmarkError, Comparison, Session, assert_all_close, assert_close
from benchmarks.training import CLASSES, CLIP_FACTOR, SGD, Batch, Network, clipped_parameters

BENCH = "step"
OURS = "nfnets_kernels nf_resnet50"


def run(session: Session) -> None:
    """Training and inference, in float32 and under bfloat16 autocast."""
    settings = session.settings
    torch.manual_seed(settings.seed)
    # As training scripts do, on a GPU: cuDNN then takes the algorithms that are fastest for these shapes.
    torch.backends.cudnn.benchmark = settings.on_gpu
    single = "float32, TF32 convolutions" if settings.on_gpu and torch.backends.cudnn.allow_tf32 else "float32"
    networks = make_networks(settings.device)
    batch = Batch.random(settings.device, settings.batch_size, settings.image_size)
    for title, autocast in session.track([(single, False), ("bfloat16 autocast", True)], BENCH):
        session.compare(training(title, networks, replace(batch, autocast=autocast)))
        session.compare(inference(title, networks, replace(batch, autocast=autocast)))
    if settings.on_gpu:  # last, since compiling takes minutes
        session.compare(training_compiled("bfloat16 autocast", networks[:3], replace(batch, autocast=True)))


def make_networks(device: str) -> list[Network]:
    """The four networks; ours first."""
    return [
        shared.clipped_by_ours(OURS, nfk.models.nf_resnet50(num_classes=CLASSES), device),
        shared.clipped_by_timm(TIMM, peers.create_model("nf_resnet50", num_classes=CLASSES), device),
        shared.unclipped(TWIN, BNResNet(num_classes=CLASSES), device),
        shared.unclipped(TORCHVISION, peers.resnet50(num_classes=CLASSES), device),
    ]


def training(title: str, networks: list[Network], batch: Batch) -> Comparison:
    """A step of each network; ours must also clip as timm does."""
    comparison = shared.training(BENCH, f"training step, {batch}, {title}", networks, batch)

    def check(name: str, value: object) -> None:
        comparison.check(name, value)
        if name == OURS:
            check_update(networks[0], batch)

    return replace(comparison, check=check)


def training_compiled(title: str, networks: list[Network], batch: Batch) -> Comparison:
    """A step of ours, and of each network under torch.compile."""
    contestants = [networks[0], *map(shared.compiled, networks)]
    case = compiled_case(f"training step, {batch}, {title}")
    return shared.training(BENCH, case, contestants, batch, optional=True)


def check_update(network: Network, batch: Batch) -> None:
    """A step of our optimizer must move the parameters as timm's clipping and torch's SGD do."""
    optimizer = network.optimizer
    assert optimizer is not None
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(batch.forward(network.model), batch.labels).backward()
    params = list(network.model.parameters())
    if without := sum(param.grad is None for param in params):
        raise BenchmarkError(f"{network.name}: {without} parameters received no gradient")
    twins = {param: twin_of(param) for param in params}
    separate = torch.optim.SGD(twins.values(), **SGD)
    for param, twin in twins.items():
        separate.state[twin]["momentum_buffer"] = optimizer.state[param]["momentum_buffer"].clone()
    clipped = clipped_parameters(network.model)
    peers.adaptive_clip_grad([twins[param] for param in clipped], CLIP_FACTOR)
    separate.step()
    optimizer.step()
    expected = [twin.detach() for twin in twins.values()]
    assert_all_close(f"{network.name}: updated parameters", params, expected, tolerance=1e-6)


def twin_of(param: nn.Parameter) -> nn.Parameter:
    """A copy with the same gradient."""
    twin = nn.Parameter(param.detach().clone())
    assert param.grad is not None
    twin.grad = param.grad.clone()
    return twin


def inference(title: str, networks: list[Network], batch: Batch) -> Comparison:
    """The forward pass of each network; BatchNorm also folded into the convolutions before it."""
    # The cached weights of eval mode must be those of training mode, and there is no dropout to tell them apart.
    expected = batch.infer(networks[0].model.train())
    folded = [
        Network(f"{network.name}, BatchNorm folded", fuse(network.model.eval()))
        for network in networks
        if is_batch_normalized(network.model)
    ]
    comparison = shared.inference(BENCH, f"inference, {batch}, {title}", [*networks, *folded], batch)

    def check(name: str, value: object) -> None:
        comparison.check(name, value)
        if name == OURS and isinstance(value, torch.Tensor):
            # TF32, which cuDNN takes for float32, has hardly more digits than bfloat16.
            rounded = batch.autocast or batch.images.is_cuda
            assert_close(f"{name}: logits", value, expected, tolerance=1e-2 if rounded else 1e-4)

    return replace(comparison, check=check)


def is_batch_normalized(model: nn.Module) -> bool:
    """Whether the network has BatchNorm layers."""
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
