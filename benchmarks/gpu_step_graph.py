"""A whole training step replayed from a CUDA graph: forward, backward and `SGD_AGC`, with a schedule of learning rates.

``python -m benchmarks.gpu_step_graph`` trains twice from the same start, in plain calls and in replays, and compares.
"""

import argparse
import sys
from typing import Any

import torch
import torch.nn.functional as F

import nfnets_kernels as nfk
from benchmarks.clocks import captured, side_stream
from benchmarks.harness import to_channels_last

WARM_UP, STEPS, CLASSES = 3, 6, 10


def train(device: str, replayed: bool) -> dict[str, Any]:
    """What is left after some steps on new batches: parameters, averages and what was clipped."""
    torch.manual_seed(0)
    model = to_channels_last(nfk.models.NFResNet((1, 1, 1, 1), 1, num_classes=CLASSES), device)
    groups = nfk.optim.param_groups(model, weight_decay=1e-4, clip_factor=0.02)
    optimizer = nfk.optim.SGD_AGC(groups, lr=0.05, capturable=True, ema_decay=0.9, statistics=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    images = torch.empty(8, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8, device=device)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)  # a graph knows the gradients by their addresses
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    generator = torch.Generator().manual_seed(1)
    run = step
    for index in range(WARM_UP + STEPS):
        images.copy_(torch.randn(images.shape, generator=generator))
        if replayed and index == WARM_UP:
            run = captured(step)  # type: ignore[assignment]
        run()
        schedule.step()
    parameters = list(model.parameters())
    return {
        "parameters": [parameter.detach() for parameter in parameters],
        "averages": [optimizer.state[parameter]["ema"] for parameter in parameters],
        "clipped": [tuple(row[3:]) for row in optimizer.stats()],
    }


def compare(device: str) -> None:
    """Raises AssertionError unless replays train as calls do."""
    with side_stream(device):
        called, replayed = train(device, replayed=False), train(device, replayed=True)
    for name in ("parameters", "averages"):
        torch.testing.assert_close(replayed[name], called[name])
    steps = {row[0] for row in replayed["clipped"]}
    assert steps == {WARM_UP + STEPS}, f"replays counted {steps} steps of {WARM_UP + STEPS}"
    torch.testing.assert_close(replayed["clipped"], called["clipped"], rtol=1e-2, atol=1e-3)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_step_graph", description=__doc__)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    compare(parser.parse_args().device)
    print(f"{WARM_UP + STEPS} steps in calls and in replays of a CUDA graph: the same parameters, averages and counts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
