"""Trains a small NF-ResNet and its BatchNorm twin on scikit-learn's handwritten digits, from the same seed."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import nfnets_kernels as nfk
from benchmarks.bn_resnet import BNResNet
from benchmarks.harness import BenchmarkError, Session, served_by, to_channels_last
from benchmarks.results import Incident, Role, Training

BENCH = "convergence"
EPOCHS, WARM_UP_EPOCHS = 20, 2
BATCH_SIZE = 32
LEARNING_RATE = 0.3
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
# The paper clips less for smaller batches: 0.16 at 256 images, 0.01 at 4,096.
CLIP_FACTOR = 0.08
# Strided 1x1 shortcuts would lead from the last, single position to one corner of these small images.
ARCHITECTURE: dict[str, Any] = {
    "depth": (1, 1, 1, 1),
    "width": 1,
    "num_classes": 10,
    "in_chans": 1,
    "shortcut": "avg_pool",
}


@dataclass(frozen=True)
class Digits:
    """Images and labels, split for training and testing."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @classmethod
    def load(cls, device: str) -> "Digits":
        """The 8x8 digits at 32x32, standardized; every fifth image is for testing."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
        images = F.interpolate(images, scale_factor=4, mode="nearest").to(device)
        labels = torch.tensor(digits.target, device=device)
        is_test = torch.arange(len(labels), device=device) % 5 == 0
        train = images[~is_test]
        images = ((images - train.mean()) / train.std()).contiguous(memory_format=torch.channels_last)
        return cls(images[~is_test], labels[~is_test], images[is_test], labels[is_test])

    def batches(self, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch in random order, each batch moved by up to a pixel, without an incomplete last batch."""
        order = torch.randperm(len(self.train_labels), generator=generator).to(self.train_labels.device)
        for indices in order.split(BATCH_SIZE):
            if len(indices) == BATCH_SIZE:
                down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
                yield self.train_images[indices].roll((down, right), (2, 3)), self.train_labels[indices]


def run(session: Session) -> None:
    """Train both networks from every seed and record their curves."""
    settings = session.settings
    digits = Digits.load(settings.device)
    seeds = range(settings.seed, settings.seed + (3 if settings.quick else 10))
    networks: list[tuple[str, Role, type[nn.Module]]] = [
        ("NF-ResNet with AGC", "ours", nfk.models.NFResNet),
        ("BatchNorm twin", "peer", BNResNet),
    ]
    runs = [(seed, network) for seed in seeds for network in networks]
    for seed, (name, role, architecture) in session.track(runs, BENCH):
        torch.manual_seed(seed)
        model = to_channels_last(architecture(**ARCHITECTURE), settings.device)
        clip = nfk.AGC(model, CLIP_FACTOR, exclude=("fc",)).clip_ if role == "ours" else None
        ops = ("agc", "weight_standardize") if role == "ours" else ()
        with nfk.backend.recording() as executed:
            curves = train(model, clip, digits, seed, session)
        try:
            backend = served_by(name, role, ops, executed, settings.device)
        except BenchmarkError as error:
            session.report_incident(Incident(BENCH, name, "failed", str(error)))
            continue
        session.add_training(Training(name, role, backend, seed, *curves))


def train(
    model: nn.Module, clip: Callable[[], None] | None, digits: Digits, seed: int, session: Session
) -> tuple[float, list[float], list[float]]:
    """Seconds, and test accuracy and mean training loss after every epoch."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY, fused=True
    )
    steps_per_epoch = len(digits.train_labels) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_factor, steps_per_epoch))
    generator = torch.Generator().manual_seed(seed)
    accuracies, losses = [], []
    start = time.perf_counter()
    for _ in session.track(range(EPOCHS), f"  {type(model).__name__}, seed {seed}"):
        epoch_losses = []
        for images, labels in digits.batches(generator):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(images), labels, label_smoothing=LABEL_SMOOTHING)
            loss.backward()
            if clip is not None:
                clip()
            optimizer.step()
            schedule.step()
            epoch_losses.append(loss.detach())
        accuracies.append(accuracy(model, digits))
        losses.append(torch.stack(epoch_losses).mean().item())
    return time.perf_counter() - start, accuracies, losses


def learning_rate_factor(steps_per_epoch: int, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm_up = WARM_UP_EPOCHS * steps_per_epoch
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (EPOCHS * steps_per_epoch - warm_up))


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Percentage of the test images that are classified correctly."""
    model.eval()
    correct = (model(digits.test_images).argmax(1) == digits.test_labels).sum().item()
    model.train()
    return 100 * correct / len(digits.test_labels)
