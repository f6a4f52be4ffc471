"""The whole training step and inference of ResNet-50 in five forms, from data in memory to updated parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, product

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks import training as shared
from benchmarks.bn_resnet import BNResNet
from benchmarks.checks import BenchmarkError, assert_all_close, assert_close
from benchmarks.forms import all_forms, verified
from benchmarks.goals import RESNETV2, TIMM, TORCHVISION, TWIN, compiled_case
from benchmarks.harness import Comparison, Session, Settings
from benchmarks.training import CLASSES, CLIP_FACTOR, SGD, Batch, Network, clipped_parameters
from nfnets_kernels.models.flops import count_flops

BENCH = "step"
OURS = "nfnets_kernels nf_resnet50"
FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}


@dataclass(frozen=True)
class Precision:
    """How numbers are called in the name of a case, and what autocast makes of them."""

    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Variant:
    """How a network is trained and run."""

    batch_size: int
    layout: str
    precision: Precision


def run(session: Session) -> None:
    """Training and inference in every variant, what decides most first; then what takes minutes to compile."""
    settings = session.settings
    # As training scripts do, on a GPU: cuDNN then takes the algorithms that are fastest for these shapes.
    torch.backends.cudnn.benchmark = settings.on_gpu
    for variant, compile_too in session.track(list(plan(settings)), BENCH):
        measure(session, variant, compile_too)


def plan(settings: Settings) -> Iterator[tuple[Variant, bool]]:
    """The variants of each precision, and those of them in which the networks are compiled too."""
    for _, same in groupby(variants(settings), key=lambda variant: variant.precision):
        chosen = list(same)
        yield from ((variant, False) for variant in chosen)
        yield from ((variant, True) for variant in chosen if compiles(settings, variant))


def measure(session: Session, variant: Variant, compile_too: bool) -> None:
    """Compare the networks in one variant: a step and inference, or what torch.compile makes of a step."""
    settings = session.settings
    torch.manual_seed(settings.seed)
    memory_format = FORMATS[variant.layout]
    networks = make_networks(settings.device, memory_format, count_of_networks(settings, compile_too))
    dtype = variant.precision.dtype
    batch = Batch.random(settings.device, variant.batch_size, settings.image_size, dtype, memory_format)
    name = variant.precision.name + ("" if variant.layout == "NHWC" else f", {variant.layout}")
    rounds = settings.rounds_of_steps
    session.compare(replace(training(session, name, networks, batch, compile_too), rounds=rounds))
    if not compile_too:
        session.compare(replace(inference(name, networks, batch), rounds=rounds))


def count_of_networks(settings: Settings, compile_too: bool) -> int:
    """How many of the five: to compile all of them takes a CPU an hour, and quickly it has no time for the last."""
    return 3 if compile_too else 4 if settings.quick and not settings.on_gpu else 5


def variants(settings: Settings) -> Iterator[Variant]:
    """All of them. float16 is for GPUs: CPUs without AMX-FP16 multiply it no faster than float32."""
    tf32 = settings.on_gpu and torch.backends.cudnn.allow_tf32
    precisions = [
        Precision("float32, TF32 convolutions" if tf32 else "float32", torch.float32),
        Precision("bfloat16 autocast", torch.bfloat16),
    ]
    if settings.on_gpu:
        precisions.reverse()
    if settings.on_gpu and not settings.quick:
        precisions.insert(1, Precision("float16 autocast", torch.float16))
    sizes = [size for size in (settings.batch_size, settings.small_batch_size) if size is not None]
    for precision, layout, size in product(precisions, ("NHWC",) if settings.quick else FORMATS, sizes):
        yield Variant(size, layout, precision)


def compiles(settings: Settings, variant: Variant) -> bool:
    """Whether torch.compile, which takes minutes, is compared too: on a GPU even quickly in bfloat16."""
    in_bfloat16 = settings.on_gpu and variant.precision.dtype == torch.bfloat16
    return variant.layout == "NHWC" and (not settings.quick or in_bfloat16)


def make_networks(
    device: str, memory_format: torch.memory_format = torch.channels_last, count: int = 5
) -> list[Network]:
    """The first of the five networks; ours is the first of all."""
    makes = (
        lambda: shared.clipped_by_ours(OURS, nfk.models.nf_resnet50(num_classes=CLASSES), device),
        lambda: shared.clipped_by_timm(TIMM, peers.create_model("nf_resnet50", num_classes=CLASSES), device),
        lambda: shared.unclipped(TWIN, BNResNet(num_classes=CLASSES), device),
        lambda: shared.unclipped(TORCHVISION, peers.resnet50(num_classes=CLASSES), device),
        lambda: shared.unclipped(RESNETV2, peers.create_model("resnetv2_50", num_classes=CLASSES), device),
    )
    networks = [make() for make in makes[:count]]
    for network in networks:
        network.model.to(memory_format=memory_format)  # type: ignore[call-overload]  # not in its stub
    return networks


@cache
def multiply_adds(image_size: int) -> int:
    """Those of ours; the others' differ by a hundredth."""
    return count_flops(nfk.models.nf_resnet50(num_classes=CLASSES), image_size)


def training(
    session: Session, title: str, networks: Sequence[Network], batch: Batch, compile_too: bool = False
) -> Comparison:
    """A step of each network in all forms; ours must have the reference's gradients and clip as timm does."""
    forms = {
        form.name: (form, network) for network in networks for form in all_forms(network, session.settings, compile_too)
    }
    case = f"training step, {batch}, {title}"
    comparison = verified(
        shared.training(
            BENCH, compiled_case(case) if compile_too else case, [form for form, _ in forms.values()], batch
        ),
        forms,
        batch,
    )

    def check(name: str, value: object) -> None:
        comparison.check(name, value)
        if name == OURS:
            check_update(networks[0], batch)

    operations = batch.operations(multiply_adds(session.settings.image_size), passes=3)
    return replace(comparison, check=check, operations=operations)


def check_update(network: Network, batch: Batch) -> None:
    """A step of our optimizer must move the parameters as timm's clipping and torch's SGD do."""
    optimizer = network.optimizer
    assert optimizer is not None
    optimizer.zero_grad(set_to_none=True)
    batch.loss(network.model).backward()
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


def inference(title: str, networks: Sequence[Network], batch: Batch) -> Comparison:
    """The forward pass of each network; BatchNorm also folded into the convolutions before it."""
    # The cached weights of eval mode must be those of training mode, and there is no dropout to tell them apart.
    expected = batch.infer(networks[0].model.train())
    forms = [*networks, *filter(None, map(folded, networks))]
    comparison = shared.inference(BENCH, f"inference, {batch}, {title}", forms, batch)
    operations = batch.operations(multiply_adds(batch.images.shape[-1]), passes=1)

    def check(name: str, value: object) -> None:
        comparison.check(name, value)
        if name == OURS and isinstance(value, torch.Tensor):
            # TF32, which cuDNN takes for float32, has hardly more digits than bfloat16.
            rounded = batch.dtype != torch.float32 or batch.images.is_cuda
            assert_close(f"{name}: logits", value, expected, tolerance=1e-2 if rounded else 1e-4)

    return replace(comparison, check=check, operations=operations)


def folded(network: Network) -> Network | None:
    """The network with BatchNorm folded into the convolutions before it, where torch finds any to fold."""
    before = batch_norms(network.model)
    model = fuse(network.model.eval()) if before else network.model
    return Network(f"{network.name}, BatchNorm folded", model) if batch_norms(model) < before else None


def batch_norms(model: nn.Module) -> int:
    """The number of BatchNorm layers."""
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
