"""Trains a small NF-ResNet, clipped in three ways, and its BatchNorm twin on handwritten digits at many batch sizes.

Figure 2 of Brock et al. 2021b (arXiv:2102.06171) on a small scale: the learning rate grows linearly with the batch
size, the epochs stay the same. ``tune_convergence`` chose the settings below without the test images.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import nn

import nfnets_kernels as nfk
from benchmarks.bn_resnet import BNResNet
from benchmarks.checks import BenchmarkError, served_by
from benchmarks.digits import ARCHITECTURE, Digits, Outcome, Recipe, train
from benchmarks.harness import Session, to_channels_last
from benchmarks.results import Incident, Role, Training

BENCH = "convergence"
BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
QUICK_BATCH_SIZES = (1024,)
SEEDS = 3

# With the mean accuracy on held-out images by which a setting was chosen, and that of its neighbours.
BASE_BATCH_SIZE = 32
BASE_LEARNING_RATE = 0.01  # 97.5 % for the BatchNorm twin; a third of it 96.3 %, three times it 75.9 %

Clip = Callable[[], object]


@dataclass(frozen=True)
class Threshold:
    """What is clipped to at batch size 32, and whether that falls in inverse proportion to the batch size."""

    base: float
    falling: bool

    def at(self, batch_size: int) -> float:
        """The threshold at a batch size."""
        return self.base * (BASE_BATCH_SIZE / batch_size if self.falling else 1)

    def __str__(self) -> str:
        return f"{self.base:g}{' at batch 32, falling' if self.falling else ''}"


MAX_NORM = Threshold(32.0, falling=True)  # 97.6 %; a quarter of it 97.2 %, at best constant, at 1, 97.2 %
CLIP_FACTOR = Threshold(1.28, falling=True)  # 98.3 %; a quarter of it 97.7 %, at best constant, at 0.02, 97.9 %


@dataclass(frozen=True)
class Method:
    """A network and how its gradients are clipped: ``clipping`` gets it and the batch size."""

    name: str
    role: Role
    network: type[nn.Module]
    ops: tuple[str, ...]
    clipping: Callable[[nn.Module, int], Clip]


def adaptive(clip_factor: Threshold) -> Method:
    """AGC of everything but the head."""

    def clipping(model: nn.Module, batch_size: int) -> Clip:
        return nfk.AGC(model, clip_factor.at(batch_size), exclude=("fc",)).clip_

    return Method("NF-ResNet with AGC", "ours", nfk.models.NFResNet, ("agc", "weight_standardize"), clipping)


def global_norm(max_norm: Threshold) -> Method:
    """The norm of all gradients together is clipped."""

    def clipping(model: nn.Module, batch_size: int) -> Clip:
        return lambda: nn.utils.clip_grad_norm_(model.parameters(), max_norm.at(batch_size))

    return Method("NF-ResNet with global norm clipping", "ours", nfk.models.NFResNet, ("weight_standardize",), clipping)


def unclipped(name: str, role: Role, network: type[nn.Module], *ops: str) -> Method:
    """Gradients as they are."""
    return Method(name, role, network, ops, lambda model, batch_size: lambda: None)


UNCLIPPED = unclipped("NF-ResNet without clipping", "ours", nfk.models.NFResNet, "weight_standardize")
TWIN = unclipped("BatchNorm twin", "peer", BNResNet)
METHODS = (adaptive(CLIP_FACTOR), global_norm(MAX_NORM), UNCLIPPED, TWIN)


def recipe_for(batch_size: int, base_learning_rate: float = BASE_LEARNING_RATE) -> Recipe:
    """The learning rate grows linearly with the batch size."""
    return Recipe(batch_size, base_learning_rate * batch_size / BASE_BATCH_SIZE)


def run(session: Session) -> None:
    """Train with every method at every batch size from every seed."""
    settings = session.settings
    digits = Digits.load(settings.device)
    batch_sizes, seeds = (QUICK_BATCH_SIZES, 1) if settings.quick else (BATCH_SIZES, SEEDS)
    runs = list(product(batch_sizes, METHODS, range(settings.seed, settings.seed + seeds)))
    for batch_size, method, seed in session.track(runs, BENCH):
        recipe = recipe_for(batch_size)
        with nfk.backend.recording() as executed:
            outcome = train_from(seed, method, recipe, digits)
        try:
            backend = served_by(method.name, method.role, method.ops, executed, settings.device)
        except BenchmarkError as error:
            session.report_incident(Incident(BENCH, f"batch {batch_size}, seed {seed}", "failed", str(error)))
            continue
        session.add_training(
            Training(
                method.name,
                method.role,
                backend,
                seed,
                **asdict(outcome),
                batch_size=batch_size,
                learning_rate=recipe.learning_rate,
            )
        )


def train_from(seed: int, method: Method, recipe: Recipe, digits: Digits) -> Outcome:
    """Train a method's network, whose weights and batches come from the seed."""
    torch.manual_seed(seed)
    model = to_channels_last(method.network(**ARCHITECTURE), str(digits.train_images.device))
    return train(model, method.clipping(model, recipe.batch_size), digits, recipe, seed)
