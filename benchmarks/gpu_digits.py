"""Real training in bfloat16 on handwritten digits, every step of it replayed from a CUDA graph.

``python -m benchmarks.gpu_digits`` trains a small NF-ResNet with `SGD_AGC` and a scheduled learning rate, and fails
below 97 % of the test images. ``--device cpu`` does the same without a graph.
"""

import argparse
import sys
from dataclasses import replace

import torch

import nfnets_kernels as nfk
from benchmarks.bench_convergence import CLIP_FACTOR, recipe_for
from benchmarks.clocks import captured, is_gpu, side_stream
from benchmarks.digits import ARCHITECTURE, WEIGHT_DECAY, Digits, Outcome, Step, loss_of, train_in_steps
from benchmarks.harness import to_channels_last

GOAL = 97.0
BATCH_SIZE = 128
EPOCHS, WARM_UP_EPOCHS = 20, 3
# At 16x16 the last stride would meet a single position, where oneDNN leaves most of a 3x3 kernel's bfloat16 gradient as
# it found the memory.
IMAGE_SIZE = 24
SEED = 1  # 99.4 % on a CPU; 97.8 % from seed 0
CALLS_BEFORE_CAPTURE = 3


def graphed(step: Step, images: torch.Tensor, labels: torch.Tensor) -> Step:
    """The step in a CUDA graph, which reads its batch from these buffers; the first steps are calls."""
    calls = 0

    def run() -> torch.Tensor:
        return step(images, labels)

    def copied(new_images: torch.Tensor, new_labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls, run
        images.copy_(new_images)
        labels.copy_(new_labels)
        if calls == CALLS_BEFORE_CAPTURE:
            run = captured(run)  # type: ignore[assignment]
        calls += 1
        # A graph writes every loss to the same place.
        return run().clone()

    return copied


def train(device: str) -> Outcome:
    """The whole training, through a graph on a GPU."""
    torch.manual_seed(SEED)
    digits = Digits.load(device, IMAGE_SIZE, "bilinear")
    recipe = replace(recipe_for(BATCH_SIZE), epochs=EPOCHS, warm_up_epochs=WARM_UP_EPOCHS)
    model = to_channels_last(nfk.models.NFResNet(**ARCHITECTURE), device)
    groups = [
        {"params": [param for name, param in model.named_parameters() if not name.startswith("fc.")]},
        {"params": list(model.get_submodule("fc").parameters()), "clip_factor": None},
    ]
    optimizer = nfk.optim.SGD_AGC(
        groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY,
        clip_factor=CLIP_FACTOR.at(BATCH_SIZE), capturable=True,
    )  # fmt: skip

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)  # a graph knows the gradients by their addresses
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_of(model, images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    buffers = digits.train_images[:BATCH_SIZE].clone(), digits.train_labels[:BATCH_SIZE].clone()
    run = graphed(step, *buffers) if is_gpu(device) else step
    return train_in_steps(model, optimizer, run, digits, recipe, SEED)


def main() -> int:
    """Command line; 1 below the goal."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_digits", description=__doc__)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    device = parser.parse_args().device
    with side_stream(device):
        outcome = train(device)
    reached = outcome.test_accuracy[-1]
    how = "replays of a CUDA graph" if is_gpu(device) else "calls"
    print(
        f"{len(outcome.test_accuracy)} epochs in {outcome.seconds:.1f} s, in {how}: {reached:.1f} % of the test images "
        f"are recognized, {'at least' if reached >= GOAL else 'not the'} {GOAL:g} %"
    )
    return int(outcome.diverged or reached < GOAL)


if __name__ == "__main__":
    sys.exit(main())
