"""What has to be known of the tables, in sentences made from the figures."""

from collections.abc import Sequence
from statistics import mean

from benchmarks.report.tables import final_accuracies
from benchmarks.results import ModelFigures, Results, Training


def note(results: Results, bench: str) -> str:
    """What has to be known of the table of a bench that has figures; mostly nothing."""
    if bench == "convergence":
        return trainings_note(results)
    if bench == "profile":
        return profile_note(results)
    return models_note(results.models) if bench == "models" else ""


def profile_note(results: Results) -> str:
    """What has to be known of the table of profiles."""
    of_gpu = (
        "Device time of kernels by torch.profiler; idle: what a step takes beyond the sum of its kernels, in which the "
        "GPU waits for Python to launch the next one"
    )
    of_cpu = (
        "Self time of operators by torch.profiler; outside operators: what a step takes beyond their sum, in Python"
    )
    return (
        f"{of_gpu if results.environment.gpu else of_cpu}. The step's own time is a median without the profiler. "
        "Where a network has no BatchNorm, its kernels count as weight standardization, which timm runs through them; "
        "all that clipping and the optimizer launch is theirs."
    )


def models_note(models: Sequence[ModelFigures]) -> str:
    """What has to be known of the table of networks."""
    sizes = sorted({model.batch_size for model in models})
    sources: dict[str, list[str]] = {}
    for model in models:
        if model.accuracy and model.architecture not in sources.setdefault(model.source, []):
            sources[model.source].append(model.architecture)
    cited = "; ".join(f"{source}: {', '.join(names)}" for source, names in sources.items())
    return (
        f"Batch {' and '.join(map(str, sizes))}; multiply-adds (MACs) and times of one image; AGC in the step of "
        "normalizer-free networks; peak: what a step allocates on top of parameters and optimizer state; accuracy as "
        f"published, not trained here ({cited})."
    )


def trainings_note(results: Results) -> str:
    """How the networks were trained, up to where that went well, and how ours compares at the largest batch size."""
    return (
        f"{max(len(training.test_accuracy) for training in results.trainings)} epochs, the learning rate linear in the "
        "batch size. Test accuracy in the end: mean and range over seeds, diverged ones included (the loss became "
        "infinite or NaN, or the accuracy is that of guessing). The settings were chosen on images held out from the "
        f"training images (benchmarks/tune_convergence.py). {trainings_outcome(results)}"
    )


def trainings_outcome(results: Results) -> str:
    """Up to which batch size training went well, and how ours compares at the largest."""
    trained = results.trained()
    names = dict.fromkeys(training.contestant for training in results.trainings)
    stable = ", ".join(f"{name} {largest_stable(trained, name) or 'none'}" for name in names)
    parts = [f"Largest batch up to which no seed diverged: {stable}."]
    (ours, own), *others = ((name, final_accuracies(runs)) for name, runs in trained[max(trained)].items())
    if others:
        gaps = ", ".join(f"{mean(own) - mean(reached):+.1f} {name}{overlap(own, reached)}" for name, reached in others)
        parts.append(f"Percentage points from the others to {ours} at batch {max(trained)}: {gaps}.")
    return " ".join(parts)


def largest_stable(trained: dict[int, dict[str, list[Training]]], name: str) -> int:
    """The largest batch size up to which no run of a contestant diverged; 0 if one did at the smallest."""
    largest = 0
    for batch_size in sorted(trained):
        runs = trained[batch_size].get(name, [])
        if not runs or any(run.diverged for run in runs):
            break
        largest = batch_size
    return largest


def overlap(some: list[float], others: list[float]) -> str:
    """A remark where two contestants differ by no more than their seeds do."""
    return " (the seeds' ranges overlap)" if min(some) <= max(others) and min(others) <= max(some) else ""
