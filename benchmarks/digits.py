"""Training on scikit-learn's handwritten digits: the images, the recipe, and what comes of it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

# Strided 1x1 shortcuts would lead from the last, single position to one corner of these small images.
ARCHITECTURE: dict[str, Any] = {
    "depth": (1, 1, 1, 1),
    "width": 1,
    "num_classes": 10,
    "in_chans": 1,
    "shortcut": "avg_pool",
}
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
# Three standard deviations above the 10 % of a network that always gives the same answer, for 360 images.
CHANCE = 15.0


@dataclass(frozen=True)
class Digits:
    """Images and labels, split for training and testing."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @classmethod
    def load(cls, device: str, size: int = 16, mode: str = "nearest") -> "Digits":
        """The 8x8 digits at a size for which the networks have strides enough; every fifth image is for testing."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
        images = F.interpolate(images, size=(size, size), mode=mode).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        return cls._split(images, torch.tensor(digits.target, device=device))

    def for_validation(self) -> "Digits":
        """The training images alone, every fifth of them in the place of the test images."""
        return self._split(self.train_images, self.train_labels)

    @classmethod
    def _split(cls, images: torch.Tensor, labels: torch.Tensor) -> "Digits":
        is_test = torch.arange(len(labels), device=labels.device) % 5 == 0
        train = images[~is_test]
        images = (images - train.mean()) / train.std()
        return cls(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, the learning rate warmed up linearly, then following a cosine to zero."""

    batch_size: int
    learning_rate: float
    epochs: int = 30
    warm_up_epochs: int = 5

    def steps(self, images: int) -> int:
        """Steps of the whole training: batches run across the ends of epochs, so that no image is left out."""
        return self.epochs * images // self.batch_size

    def learning_rate_factor(self, steps: int, step: int) -> float:
        """The share of the learning rate at one of so many steps."""
        warm_up = steps * self.warm_up_epochs / self.epochs
        if step < warm_up:
            return min(1.0, (step + 1) / warm_up)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))


# Of images and labels: one step of training, which returns the loss.
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """Test accuracy in percent and mean training loss after every epoch.

    ``diverged``: a loss became infinite or NaN, after which there is no other epoch, or the accuracy is in the end that
    of guessing.
    """

    seconds: float
    test_accuracy: list[float]
    train_loss: list[float]
    diverged: bool


def train(
    model: nn.Module,
    clip: Callable[[], object],
    digits: Digits,
    recipe: Recipe,
    seed: int,
) -> Outcome:
    """Train with torch's SGD; ``clip`` precedes its steps."""
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY, fused=True
    )

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, images, labels)
        loss.backward()
        clip()
        optimizer.step()
        return loss.detach()

    return train_in_steps(model, optimizer, step, digits, recipe, seed)


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with smoothed labels."""
    return F.cross_entropy(model(images), labels, label_smoothing=LABEL_SMOOTHING)


def train_in_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, digits: Digits, recipe: Recipe, seed: int
) -> Outcome:
    """Train on the images in the seed's order, which is the same for every network; NaN or infinite losses end it."""
    images = len(digits.train_labels)
    steps = recipe.steps(images)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(recipe.learning_rate_factor, steps))
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(recipe.epochs)])
    batches = order[: steps * recipe.batch_size].view(steps, recipe.batch_size).to(digits.train_labels.device)
    accuracies: list[float] = []
    losses: list[float] = []
    start = time.perf_counter()
    for epoch in batches.tensor_split(recipe.epochs):
        epoch_losses = []
        for indices in epoch:
            loss = step(digits.train_images[indices], digits.train_labels[indices])
            schedule.step()
            epoch_losses.append(loss)
        accuracies.append(accuracy(model, digits))
        mean_loss = torch.stack(epoch_losses).mean().item()
        if not math.isfinite(mean_loss):
            break
        losses.append(mean_loss)
    seconds = time.perf_counter() - start
    return Outcome(seconds, accuracies, losses, diverged=len(losses) < recipe.epochs or accuracies[-1] <= CHANCE)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Percentage of the test images that are classified correctly."""
    model.eval()
    correct = (model(digits.test_images).argmax(1) == digits.test_labels).sum().item()
    model.train()
    return 100 * correct / len(digits.test_labels)
