"""Whole networks at the size they are trained at: what a step, an inference and the memory of a step take of each.

With the accuracy that its authors published that is Figure 1 of Brock et al. 2021b, for this machine. None is trained.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.forms import all_forms, verified
from benchmarks.goals import ACCELERATED, compiled_case
from benchmarks.harness import Session, Settings
from benchmarks.memory import available_memory, peak_tensor_memory
from benchmarks.results import Incident, ModelFigures
from benchmarks.training import (
    CLASSES,
    Batch,
    Network,
    clipped_by_ours,
    clipped_by_timm,
    inference,
    training,
    training_step,
    unclipped,
)
from nfnets_kernels.integrations.timm import accelerate
from nfnets_kernels.models.flops import count_flops

BENCH = "models"
QUICK = {"NFNet-F0"}
# On a CPU a step takes seconds.
ROUNDS_QUICK, ROUNDS_FULL = 1, 5

TORCHVISION = "torchvision, IMAGENET1K_V1"
TAN = "Tan and Le 2019"
BROCK = "Brock et al. 2021b"
EFFICIENT_NETS = {
    "b0": (224, 77.1),
    "b1": (240, 79.1),
    "b2": (260, 80.1),
    "b3": (300, 81.6),
    "b4": (380, 82.9),
    "b5": (456, 83.6),
    "b6": (528, 84.0),
    "b7": (600, 84.3),
}
# At the size of training; the accuracy is that at the larger size of testing. F6 is published with SAM alone.
NFNETS = {
    "f0": (192, 83.6),
    "f1": (224, 84.7),
    "f2": (256, 85.1),
    "f3": (320, 85.7),
    "f4": (384, 85.9),
    "f5": (416, 86.0),
    "f6": (448, 86.5),
}
STOCHASTIC_DEPTH = 0.25  # of all of them, ours and timm's alike

Make = Callable[[str], Network]
"""makes a network on a device"""


@dataclass(frozen=True)
class Architecture:
    """Networks of one size and accuracy, which are compared with each other; ours is the first, where there is one."""

    name: str
    image_size: int
    makes: Sequence[Make]
    accuracy: float | None = None
    source: str = ""
    in_all_forms: bool = False
    """on a GPU, also in CUDA graphs and under torch.compile, which takes minutes"""
    on_gpu: Sequence[Make] = ()
    """further networks on a GPU"""


def run(session: Session) -> None:
    """One architecture after the other, the quick ones first, in float32 or, on a GPU, under bfloat16 autocast."""
    settings = session.settings
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.benchmark = settings.on_gpu
    chosen = [one for one in architectures() if one.name in QUICK or not settings.quick]
    chosen.sort(key=lambda one: one.name not in QUICK)
    for architecture in session.track(chosen, BENCH):
        measure(session, architecture)


def measure(session: Session, architecture: Architecture) -> None:
    """Compare the networks of an architecture in training and inference, and record what else is known of them."""
    settings = session.settings
    makes = [*architecture.makes, *(architecture.on_gpu if settings.on_gpu else ())]
    networks = [make(settings.device) for make in makes]
    dtype = torch.bfloat16 if settings.on_gpu else torch.float32
    batch = Batch.random(settings.device, settings.batch_size, architecture.image_size, dtype)
    case = f"{architecture.name}, {batch}, {'bfloat16 autocast' if settings.on_gpu else 'float32'}"
    figures = [describe(architecture, network, case, settings.batch_size) for network in networks]
    for one in figures:
        session.add_model(one)
    # Large networks may need more memory than there is: a GPU says so, a CPU's system ends the process.
    optional = architecture.name not in QUICK
    if optional and not settings.on_gpu:
        networks = [network for network in networks if fits(session, BENCH, network, batch, case)]
    if not networks:
        return
    rounds = None if settings.on_gpu else ROUNDS_QUICK if settings.quick else ROUNDS_FULL
    forms = {
        form.name: (form, network)
        for network in networks
        for form in (all_forms(network, settings, compile_too=False) if architecture.in_all_forms else [network])
    }
    steps = training(BENCH, figures[0].training_case, [form for form, _ in forms.values()], batch, optional)
    session.compare(replace(verified(steps, forms, batch), rounds=rounds))
    forwards = inference(BENCH, figures[0].inference_case, networks, batch, optional)
    session.compare(replace(forwards, rounds=rounds))
    if settings.on_gpu and architecture.in_all_forms:
        case, beside = compiled_case(figures[0].training_case), compiled_beside(architecture, networks, settings)
        session.compare(replace(training(BENCH, case, beside, batch, optional=True), rounds=rounds))


def compiled_beside(architecture: Architecture, networks: Sequence[Network], settings: Settings) -> list[Network]:
    """Ours as it is, and all but what is for GPUs alone under torch.compile, in calls and in CUDA graphs."""
    compiled = networks[: len(architecture.makes)]
    return [networks[0], *(form for one in compiled for form in all_forms(one, settings, True) if form.compiled)]


def fits(session: Session, bench: str, network: Network, batch: Batch, case: str) -> bool:
    """Whether the memory that is available suffices for a step, by what one of a single image needs; says so if not."""
    available = available_memory()
    if available is None:
        return True
    network.model.train()
    single = peak_tensor_memory(
        training_step(network, replace(batch, images=batch.images[:1], labels=batch.labels[:1]))
    )
    network.model.zero_grad(set_to_none=True)
    # Gradients and momentum do not grow with the batch.
    constant = 2 * sum(parameter.nbytes for parameter in network.model.parameters())
    needed = constant + (single - constant) * len(batch.images)
    if needed <= available:
        return True
    reason = f"{network.name}: a step needs about {needed / 1e9:.0f} GB of {available / 1e9:.0f} GB available"
    session.report_incident(Incident(bench, case, "skipped", reason))
    return False


def describe(architecture: Architecture, network: Network, case: str, batch_size: int) -> ModelFigures:
    """What is known of a network without running it."""
    return ModelFigures(
        contestant=network.name,
        role=network.role,
        case=case,
        batch_size=batch_size,
        image_size=architecture.image_size,
        parameters=sum(parameter.numel() for parameter in network.model.parameters()),
        multiply_adds=count_flops(network.model, architecture.image_size),
        accuracy=architecture.accuracy,
        source=architecture.source,
    )


def architectures() -> Iterator[Architecture]:
    """All of them, each family from small to large. Where there is no accuracy, none of the authors could be cited."""
    for depth in (50, 101, 152):
        name = f"resnet{depth}"
        accuracy = peers.published_accuracy(name)
        yield Architecture(f"ResNet-{depth}", 224, [partial(from_torchvision, name)], accuracy, TORCHVISION)
    yield Architecture("SE-ResNeXt-50", 224, [partial(batch_normalized_from_timm, "seresnext50_32x4d")])
    for variant, (size, accuracy) in EFFICIENT_NETS.items():
        makes = [partial(from_torchvision, f"efficientnet_{variant}")]
        yield Architecture(f"EfficientNet-{variant.upper()}", size, makes, accuracy, TAN)
    for depth in (50, 101, 152):
        name = f"nf_resnet{depth}"
        theirs = [partial(from_timm, name), partial(accelerated, name)] if depth == 50 else []
        yield Architecture(f"NF-ResNet-{depth}", 224, [partial(ours, name), *theirs])
    for variant, (size, accuracy) in NFNETS.items():
        makes = [partial(ours, f"nfnet_{variant}", stochdepth_rate=STOCHASTIC_DEPTH)]
        if variant == "f0":
            makes += [
                partial(make, "dm_nfnet_f0", drop_path_rate=STOCHASTIC_DEPTH) for make in (from_timm, accelerated)
            ]
        source = f"{BROCK}, with SAM" if variant == "f6" else BROCK
        f0 = variant == "f0"
        # cuDNN's grouped convolutions may be faster in either memory format.
        on_gpu = [partial(ours_contiguous, "nfnet_f0", stochdepth_rate=STOCHASTIC_DEPTH)] if f0 else []
        name = f"NFNet-{variant.upper()}"
        yield Architecture(name, size, makes, accuracy, source, in_all_forms=f0, on_gpu=on_gpu)


def ours(name: str, device: str, **options: Any) -> Network:
    """A network of the package."""
    model = getattr(nfk.models, name)(num_classes=CLASSES, **options)
    return clipped_by_ours(f"nfnets_kernels {name}", model, device)


class Contiguous(torch.nn.Module):
    """A network in contiguous memory format (NCHW), whatever that of its input is."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # not in its stub

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the network."""
        return self.model(x.contiguous())


def ours_contiguous(name: str, device: str, **options: Any) -> Network:
    """A network of the package in contiguous memory format."""
    network = ours(name, device, **options)
    return replace(network, name=f"{network.name}, contiguous", model=Contiguous(network.model))


def from_timm(name: str, device: str, **options: Any) -> Network:
    """A normalizer-free network of timm, with timm's clipping."""
    return clipped_by_timm(f"timm {name}", peers.create_model(name, num_classes=CLASSES, **options), device)


def accelerated(name: str, device: str, **options: Any) -> Network:
    """A normalizer-free network of timm with the package's kernels and clipping."""
    model = accelerate(peers.create_model(name, num_classes=CLASSES, **options))
    return clipped_by_ours(ACCELERATED.format(f"timm {name}"), model, device, classifier="head.fc")


def batch_normalized_from_timm(name: str, device: str) -> Network:
    """A BatchNorm network of timm."""
    return unclipped(f"timm {name}", peers.create_model(name, num_classes=CLASSES), device)


def from_torchvision(name: str, device: str) -> Network:
    """A BatchNorm network of torchvision."""
    return unclipped(f"torchvision {name}", peers.get_model(name, num_classes=CLASSES), device)
