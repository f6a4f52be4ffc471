"""Shows how the settings of bench_convergence were chosen: ``python -m benchmarks.tune_convergence``, 3 minutes.

On every fifth training image, held out for that; the test images are not looked at. The learning rate is the one that
suits the BatchNorm twin best, so that it favours what is compared with; with it every kind of clipping gets the
threshold that suits it best. What is best has the highest mean accuracy over small, middle and large batches.
"""

from collections.abc import Iterator, Mapping
from statistics import mean
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from benchmarks.bench_convergence import TWIN, Method, Threshold, adaptive, global_norm, recipe_for, train_from
from benchmarks.digits import Digits

BATCH_SIZES = (64, 256, 1024)
LEARNING_RATES = (0.003, 0.01, 0.03)
MAX_NORMS = [Threshold(norm, falling=False) for norm in (0.25, 1.0, 4.0)]
MAX_NORMS += [Threshold(norm, falling=True) for norm in (8.0, 32.0, 128.0)]
CLIP_FACTORS = [Threshold(factor, falling=False) for factor in (0.005, 0.02, 0.08)]
CLIP_FACTORS += [Threshold(factor, falling=True) for factor in (0.32, 1.28, 5.12)]
SEED = 1000  # not one of those that are measured

Value = TypeVar("Value")


def accuracies(method: Method, learning_rate: float, digits: Digits) -> Iterator[float]:
    """Of the held-out images, in percent, at every batch size."""
    for batch_size in BATCH_SIZES:
        yield train_from(SEED, method, recipe_for(batch_size, learning_rate), digits).test_accuracy[-1]


def best(what: str, candidates: Mapping[Value, tuple[Method, float]], digits: Digits, console: Console) -> Value:
    """The candidate with the highest mean accuracy, after printing them all."""
    means = {}
    for value, (method, learning_rate) in track(candidates.items(), what, console=console, transient=True):
        reached = list(accuracies(method, learning_rate, digits))
        means[value] = mean(reached)
        listed = ", ".join(f"batch {size} {one:.1f}" for size, one in zip(BATCH_SIZES, reached, strict=True))
        console.print(f"{method.name}, {what} {value}: mean {means[value]:.2f} % ({listed})", highlight=False)
    return max(means, key=means.__getitem__)


def main() -> None:
    """Print every candidate's accuracy and the choices."""
    console = Console(soft_wrap=True)
    digits = Digits.load("cpu").for_validation()
    rate = best("base learning rate", {rate: (TWIN, rate) for rate in LEARNING_RATES}, digits, console)
    norm = best("maximal norm", {norm: (global_norm(norm), rate) for norm in MAX_NORMS}, digits, console)
    factor = best("clip factor", {factor: (adaptive(factor), rate) for factor in CLIP_FACTORS}, digits, console)
    console.print(f"chosen: base learning rate {rate}, maximal norm {norm}, clip factor {factor}", highlight=False)


if __name__ == "__main__":
    main()
