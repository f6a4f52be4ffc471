"""The whole training step and inference of ResNet-50 in four forms, from data in memory to updated parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.bn_resnet import BNResNet
from benchmarks.harness import (
    BenchmarkError,
    Comparison,
    Contestant,
    Session,
    assert_all_close,
    assert_close,
    to_channels_last,
)
from benchmarks.results import Role

BENCH = "step"
CLASSES = 1000
CLIP_FACTOR = 0.01
# Small enough for random labels to keep every network finite however many rounds are run.
LEARNING_RATE = 1e-3
OURS = "nfnets_kernels nf_resnet50"


@dataclass(frozen=True)
class Batch:
    """What a network is trained on, and in which precision."""

    images: torch.Tensor
    labels: torch.Tensor
    autocast: bool

    def forward(self, model: nn.Module) -> torch.Tensor:
        """Logits in the batch's precision."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.autocast):
            return model(self.images)


@dataclass(frozen=True)
class Entrant:
    """A network and the gradient clipping that it is trained with."""

    name: str
    model: nn.Module
    clip: Callable[[], None]
    ops: tuple[str, ...] = ()

    @property
    def role(self) -> Role:
        """Ours or a peer."""
        return "ours" if self.name == OURS else "peer"


def run(session: Session) -> None:
    """Training and inference, in float32 and under bfloat16 autocast."""
    settings = session.settings
    torch.manual_seed(settings.seed)
    # As training scripts do, on a GPU: cuDNN then takes the algorithms that are fastest for these shapes.
    torch.backends.cudnn.benchmark = settings.on_gpu
    single = "float32, TF32 convolutions" if settings.on_gpu and torch.backends.cudnn.allow_tf32 else "float32"
    entrants = make_entrants(settings.device)
    batch = make_batch(session)
    for title, autocast in session.track([(single, False), ("bfloat16 autocast", True)], BENCH):
        session.compare(training(title, entrants, replace(batch, autocast=autocast)))
        session.compare(inference(title, entrants, replace(batch, autocast=autocast)))


def make_entrants(device: str) -> list[Entrant]:
    """The four networks, in channels_last."""
    ours = to_channels_last(nfk.models.nf_resnet50(num_classes=CLASSES), device)
    timms = to_channels_last(peers.create_model("nf_resnet50", num_classes=CLASSES), device)
    return [
        Entrant(OURS, ours, nfk.AGC(ours, CLIP_FACTOR, exclude=("fc",)).clip_, ("agc", "weight_standardize")),
        Entrant("timm nf_resnet50", timms, partial(peers.adaptive_clip_grad, clipped_parameters(timms), CLIP_FACTOR)),
        Entrant("BatchNorm twin", to_channels_last(BNResNet(num_classes=CLASSES), device), do_nothing),
        Entrant("torchvision resnet50", to_channels_last(peers.resnet50(num_classes=CLASSES), device), do_nothing),
    ]


def do_nothing() -> None:
    """BatchNorm networks train without gradient clipping."""


def make_batch(session: Session) -> Batch:
    """Random images and labels."""
    settings = session.settings
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    images = torch.randn(shape, device=settings.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (settings.batch_size,), device=settings.device)
    return Batch(images, labels, autocast=False)


def training(title: str, entrants: list[Entrant], batch: Batch) -> Comparison:
    """Forward, cross-entropy, backward, gradient clipping and SGD with Nesterov momentum."""
    for entrant in entrants:
        entrant.model.train()
    steps = {entrant.name: training_step(entrant, batch) for entrant in entrants}

    def check(name: str, value: object) -> None:
        if not isinstance(value, torch.Tensor) or not value.isfinite():
            raise BenchmarkError(f"{name}: the loss is {value}")
        if name == OURS:
            check_clipping(entrants[0], batch)

    return Comparison(
        bench=BENCH,
        case=f"training step, {describe(batch)}, {title}",
        contestants=[Contestant(e.name, steps[e.name], e.role, e.ops) for e in entrants],
        check=check,
        graphed=False,
    )


def training_step(entrant: Entrant, batch: Batch) -> Callable[[], torch.Tensor]:
    """One step as a function that returns the loss."""
    # The fused optimizer is the fastest one on CPU and GPU alike.
    optimizer = torch.optim.SGD(
        entrant.model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-5, fused=True
    )

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(batch.forward(entrant.model), batch.labels)
        loss.backward()
        entrant.clip()
        optimizer.step()
        return loss.detach()

    return step


def check_clipping(entrant: Entrant, batch: Batch) -> None:
    """Our clipping inside the step must give the gradients that timm's gives."""
    params = list(entrant.model.parameters())
    entrant.model.zero_grad(set_to_none=True)
    F.cross_entropy(batch.forward(entrant.model), batch.labels).backward()
    originals = [param.grad.clone() for param in params if param.grad is not None]
    if len(originals) != len(params):
        raise BenchmarkError(f"{entrant.name}: {len(params) - len(originals)} parameters received no gradient")
    peers.adaptive_clip_grad(clipped_parameters(entrant.model), CLIP_FACTOR)
    expected = [param.grad.clone() for param in params if param.grad is not None]
    for param, original in zip(params, originals, strict=True):
        param.grad = original
    entrant.clip()
    actual = [param.grad for param in params if param.grad is not None]
    assert_all_close(f"{entrant.name}: clipped gradients", actual, expected, tolerance=1e-5)


def clipped_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but the classifier's, which gradient clipping leaves alone."""
    return [param for name, param in model.named_parameters() if not name.startswith(("fc.", "head.fc."))]


def inference(title: str, entrants: list[Entrant], batch: Batch) -> Comparison:
    """The forward pass in eval mode without grad; BatchNorm also folded into the convolutions before it."""
    expected = training_mode_logits(entrants[0], batch)
    models = {entrant.name: entrant.model.eval() for entrant in entrants}
    folded = {f"{e.name}, BatchNorm folded": fuse(e.model) for e in entrants if is_batch_normalized(e.model)}

    def check(name: str, value: object) -> None:
        if not isinstance(value, torch.Tensor) or not value.isfinite().all():
            raise BenchmarkError(f"{name}: the logits are not finite")
        if name == OURS:
            # The cached weights of eval mode are those of training mode, and there is no dropout to tell them apart.
            # TF32, which cuDNN takes for float32, has hardly more digits than bfloat16.
            rounded = batch.autocast or batch.images.is_cuda
            assert_close(f"{name}: logits", value, expected, tolerance=1e-2 if rounded else 1e-4)

    def contestant(name: str, model: nn.Module) -> Contestant:
        return Contestant(name, partial(no_grad_forward, model, batch), "ours" if name == OURS else "peer")

    return Comparison(
        bench=BENCH,
        case=f"inference, {describe(batch)}, {title}",
        contestants=[contestant(name, model) for name, model in {**models, **folded}.items()],
        check=check,
        graphed=False,
    )


def training_mode_logits(entrant: Entrant, batch: Batch) -> torch.Tensor:
    """Our network's logits in training mode."""
    return no_grad_forward(entrant.model.train(), batch)


@torch.no_grad()
def no_grad_forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits without a graph."""
    return batch.forward(model)


def is_batch_normalized(model: nn.Module) -> bool:
    """Whether the network has BatchNorm layers."""
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def describe(batch: Batch) -> str:
    """Batch and image size in words."""
    return f"batch {len(batch.images)} at {batch.images.shape[-1]}"
