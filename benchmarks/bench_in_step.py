"""Clipping, optimizer and weight standardization where they stand in a training step of NF-ResNet-50.

The caches then hold what the backward pass, or the optimizer, has left in them, and gradients lie where autograd has
put them. What precedes is run before every call, and not timed. Images are small: what is timed does not depend on
their size.
"""

from functools import partial
from typing import Any

import torch

import nfnets_kernels as nfk
from benchmarks.bench_sgd_agc import SGD, State, ours, separate, traffic
from benchmarks.bench_weight_standardize import make_convolutions, tolerance
from benchmarks.bench_weight_standardize import traffic as weight_traffic
from benchmarks.checks import assert_all_close
from benchmarks.directions import FORWARD
from benchmarks.harness import Comparison, Contestant, Session, to_channels_last
from benchmarks.training import CLASSES, CLIP_FACTOR, Batch, leave_identity

BENCH = "in_step"
BATCH_SIZE, IMAGE_SIZE = 8, 64


def run(session: Session) -> None:
    """What follows the backward pass, and what precedes the forward pass."""
    for comparison in session.track([after_backward, before_forward], BENCH):
        session.compare(comparison(session))


def after_backward(session: Session) -> Comparison:
    """Clipping and the optimizer's step."""
    device = session.settings.device
    torch.manual_seed(session.settings.seed)
    model = to_channels_last(leave_identity(nfk.models.nf_resnet50(num_classes=CLASSES)), device)
    batch = Batch.random(device, BATCH_SIZE, IMAGE_SIZE, torch.bfloat16 if session.settings.on_gpu else torch.float32)
    params = list(model.parameters())

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        batch.loss(model).backward()

    forward_backward()
    state = State(params, averaged=False)
    contestants = [*ours(session, state), *separate(state)]

    def setup() -> None:
        state.restore()
        forward_backward()

    setup()
    contestants[-1].run()
    expected = [tensor.clone() for tensor in state.results()]

    def check(name: str, value: object) -> None:
        # A GPU's convolutions sum gradients in an order that varies.
        assert_all_close(f"{name}: parameters and momentum", state.results(), expected, tolerance=1e-3)

    unclipped = state.given_to(torch.optim.SGD(params, **SGD, fused=True)).step
    return Comparison(
        bench=BENCH,
        case="NF-ResNet-50, clipping and SGD after backward",
        contestants=[*contestants, Contestant("SGD(fused) alone, as for BatchNorm", unclipped, "ceiling")],
        check=check,
        setup=setup,
        rounds=session.settings.rounds_of_steps,
        cache="in step",
        traffic=traffic(sum(param.numel() for param in params), averaged=False),
        graphed=False,
    )


def before_forward(session: Session) -> Comparison:
    """Weight standardization of the weights that the optimizer has just written."""
    torch.manual_seed(session.settings.seed)
    convs = make_convolutions("nf_resnet50", session.settings.device, torch.contiguous_format)
    for tensor in convs.inputs:
        tensor.grad = torch.randn_like(tensor)
    optimizer = nfk.optim.SGD_AGC(convs.inputs, **SGD, clip_factor=CLIP_FACTOR)
    dtype = torch.bfloat16

    def check(name: str, value: Any) -> None:
        assert_all_close(name, value, convs.by_timm(dtype), tolerance(dtype))

    no_grad = torch.no_grad()
    return Comparison(
        bench=BENCH,
        case="NF-ResNet-50, weights to bfloat16 after the optimizer's step",
        contestants=[
            Contestant(
                "weight_standardize_many", no_grad(partial(convs.together, dtype)), "ours", ["weight_standardize"]
            ),
            Contestant("timm weight path", no_grad(partial(convs.by_timm, dtype))),
        ],
        check=check,
        setup=optimizer.step,
        cache="in step",
        traffic=weight_traffic(convs, dtype, FORWARD),
        graphed=False,
    )
