"""How the cost of each op grows with parameters, tensors and threads, and that of a training step with the batch.

Ops work on copies of their data in turn, so that each call finds its own outside the cache. Every convolution has units
of 576 weights, as one of 64 channels and 3x3 taps has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import nfnets_kernels as nfk
from benchmarks import bench_sgd_agc, peers, training
from benchmarks.bench_models import fits
from benchmarks.bench_sgd_agc import SGD, in_turn
from benchmarks.bench_step import make_networks, multiply_adds
from benchmarks.bench_weight_standardize import Convolutions, tolerance
from benchmarks.bench_weight_standardize import traffic as weight_traffic
from benchmarks.checks import assert_all_close
from benchmarks.clocks import Call, Rotation, copies_to_rotate, turns
from benchmarks.directions import FORWARD
from benchmarks.harness import Comparison, Contestant, Point, Session, Settings
from benchmarks.memory import available_memory
from benchmarks.results import Incident, Role
from benchmarks.training import CLIP_FACTOR, Batch

BENCH = "scaling"
CHANNELS, TAPS = 64, 3
FAN_IN = CHANNELS * TAPS * TAPS
EPS = 1e-3
MILLION = 1_000_000

PARAMETERS, QUICK_PARAMETERS = (1, 2, 5, 10, 20, 50, 100, 200, 500), (1, 16)  # millions, in 161 tensors
TENSORS, QUICK_TENSORS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000), (10, 2000)  # of 25 million parameters
NF_RESNET_50 = (25 * MILLION, 161)
BATCH_SIZES, QUICK_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (1, 16)
IMAGE_SIZE = 64  # on a CPU, where 512 larger images would take minutes and more memory than there is

Params = list[nn.Parameter]
CallOn = Callable[[Params], Call]


def run(session: Session) -> None:
    """One sweep after the other."""
    settings = session.settings
    for sweep, comparisons in session.track(list(sweeps(settings)), BENCH):
        for at, compare in session.track(comparisons, sweep):
            with threads(int(at) if sweep.endswith("threads") else None):
                compare(session, Point(sweep, at))


Compare = Callable[[Session, Point], None]


def sweeps(settings: Settings) -> Iterator[tuple[str, list[tuple[float, Compare]]]]:
    """Names of what is varied, with its values and how to measure at each."""
    millions, tensors = (QUICK_PARAMETERS, QUICK_TENSORS) if settings.quick else (PARAMETERS, TENSORS)
    for op in OPS:
        yield f"{op}: parameters", [(m * 1e6, partial(compare_op, op, m * MILLION, 161)) for m in millions]
        yield f"{op}: tensors", [(n, partial(compare_op, op, 25 * MILLION, n)) for n in tensors]
        if not settings.on_gpu and not settings.quick:
            yield f"{op}: threads", [(n, partial(compare_op, op, *NF_RESNET_50)) for n in thread_counts()]
    batch_sizes = QUICK_BATCH_SIZES if settings.quick and not settings.on_gpu else BATCH_SIZES
    yield "training step: batch size", [(n, partial(compare_steps, n)) for n in batch_sizes]
    if not settings.on_gpu and not settings.quick:
        yield "training step: threads", [(n, partial(compare_steps, QUICK_BATCH_SIZES[-1])) for n in thread_counts()]


def thread_counts() -> list[int]:
    """Powers of two up to the threads that torch uses, and those."""
    most = torch.get_num_threads()
    return sorted({most, *(2**k for k in range(most.bit_length()) if 2**k < most)})


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many CPU threads, or as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare_op(op: str, parameters: int, tensors: int, session: Session, point: Point) -> None:
    """One op at one size, unless there is not enough memory."""
    units = max(1, round(parameters / tensors / FAN_IN))
    shapes = [(units, CHANNELS, TAPS, TAPS)] * tensors
    count = tensors * units * FAN_IN
    available = available_memory()
    needed = 4 * 4 * count + 4 * count  # weights, gradients, momentum, results; and what a peer needs in between
    case = f"{op}, {count / 1e6:.1f} M parameters in {tensors} tensors, {torch.get_num_threads()} threads"
    if available is not None and not session.settings.on_gpu and 1.2 * needed > available:
        reason = f"needs about {1.2 * needed / 1e9:.0f} GB of {available / 1e9:.0f} GB available"
        session.report_incident(Incident(BENCH, case, "skipped", reason))
        return
    torch.manual_seed(session.settings.seed)
    comparison = OPS[op](session.settings.device, shapes)
    rounds = 3 if session.settings.quick else 15
    session.compare(replace(comparison, case=case, point=point, rounds=rounds))


def agc(device: str, shapes: Sequence[Sequence[int]]) -> Comparison:
    """Clipping that finds nothing to clip: the reading of weights and gradients, which every step pays for."""
    copies = make_copies(shapes, device, tensors_each=2)
    calls: dict[str, tuple[Role, CallOn]] = {
        "AGC.clip_": ("ours", lambda params: nfk.AGC(params, CLIP_FACTOR, EPS).clip_),
        "timm adaptive_clip_grad": ("peer", lambda params: partial(peers.adaptive_clip_grad, params, CLIP_FACTOR, EPS)),
        "lean eager (foreach)": ("peer", lean),
    }
    count = sum(param.numel() for param in copies[0])
    return on_copies("agc", calls, copies, {"read": 8 * count}, changes=lambda params: gradients(params))


def sgd_agc(device: str, shapes: Sequence[Sequence[int]]) -> Comparison:
    """A step of SGD with clipping that finds nothing to clip."""
    copies = make_copies(shapes, device, tensors_each=3)
    momenta: dict[nn.Parameter, torch.Tensor] = {}

    def step(make: Callable[[Params], torch.optim.Optimizer], params: Params) -> Call:
        optimizer = make(params)
        for param in params:
            optimizer.state[param]["momentum_buffer"] = momenta.setdefault(param, torch.zeros_like(param))
        return optimizer.step

    def fused_sgd(params: Params) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, **SGD, fused=True)

    def ours(params: Params) -> Call:
        return step(lambda params: nfk.optim.SGD_AGC(params, **SGD, clip_factor=CLIP_FACTOR, eps=EPS), params)

    def timm(params: Params) -> Call:
        return in_turn(partial(peers.adaptive_clip_grad, params, CLIP_FACTOR, EPS), step(fused_sgd, params))

    calls: dict[str, tuple[Role, CallOn]] = {"SGD_AGC": ("ours", ours), "timm AGC + SGD(fused)": ("peer", timm)}
    count = sum(param.numel() for param in copies[0])
    moved = bench_sgd_agc.traffic(count, averaged=False)
    return on_copies("sgd_agc", calls, copies, moved, changes=lambda params: [*map(torch.Tensor.detach, params)])


def weight_standardize(device: str, shapes: Sequence[Sequence[int]]) -> Comparison:
    """Float32 weights to bfloat16, as every forward pass under autocast needs them."""
    dtype = torch.bfloat16
    nbytes = (4 + dtype.itemsize) * sum(torch.Size(shape).numel() for shape in shapes)
    weights = [torch.randn(shape, device=device) for shape in shapes]
    gains = [torch.rand(shape[0], 1, 1, 1, device=device).add_(0.5) for shape in shapes]
    copies = [
        Convolutions([w.clone() for w in weights], gains, [1.0] * len(weights), 1e-5)
        for _ in range(copies_to_rotate(nbytes, device))
    ]
    expected = copies[0].by_timm(dtype)
    turn = turns(len(copies))
    ours = Rotation([partial(one.together, dtype) for one in copies], turn)
    timm = Rotation([partial(one.by_timm, dtype) for one in copies], turn)
    return Comparison(
        bench=BENCH,
        case="",
        contestants=[
            Contestant("weight_standardize_many", ours, "ours", ["weight_standardize"]),
            Contestant("timm weight path", timm),
        ],
        check=lambda name, value: assert_all_close(name, value, expected, tolerance(dtype)),  # type: ignore[arg-type]
        traffic=weight_traffic(copies[0], dtype, FORWARD),
    )


OPS = {"agc": agc, "sgd_agc": sgd_agc, "weight_standardize": weight_standardize}


def make_copies(shapes: Sequence[Sequence[int]], device: str, tensors_each: int) -> list[Params]:
    """Parameters with gradients far below the threshold, as often as a rotation needs; a call moves so many of each."""
    weights = [torch.randn(tuple(shape), device=device) for shape in shapes]
    grads = [torch.rand_like(weight).add_(1.0).mul_(1e-9) for weight in weights]
    nbytes = tensors_each * sum(weight.nbytes for weight in weights)
    copies = []
    for _ in range(copies_to_rotate(nbytes, device)):
        params = [nn.Parameter(weight.clone()) for weight in weights]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        copies.append(params)
    return copies


def gradients(params: Params) -> list[torch.Tensor]:
    """The gradients of parameters that have one."""
    return [param.grad for param in params if param.grad is not None]


def lean(params: Params) -> Call:
    """Clipping in lean eager PyTorch."""
    return partial(peers.lean_agc_, [param.detach() for param in params], gradients(params), CLIP_FACTOR, EPS)


def on_copies(
    op: str,
    calls: dict[str, tuple[Role, CallOn]],
    copies: list[Params],
    traffic: dict[str, int],
    changes: Callable[[Params], list[torch.Tensor]],
) -> Comparison:
    """Contestants that take turns on copies. Whether they are right is seen on a small copy that needs clipping."""
    turn = turns(len(copies))

    def proof(call_on: CallOn) -> list[torch.Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3, CHANNELS, TAPS, TAPS, device=copies[0][0].device)) for _ in range(5)]
        for param in params:
            param.grad = torch.randn_like(param)
        call_on(params)()
        return changes(params)

    expected = proof(list(calls.values())[-1][1])
    contestants = [
        Contestant(
            name=name,
            run=Rotation([call_on(params) for params in copies], turn),
            role=role,
            ops=[op] if role == "ours" else [],
            verified_by=partial(proof, call_on),
        )
        for name, (role, call_on) in calls.items()
    ]
    return Comparison(
        bench=BENCH,
        case="",
        contestants=contestants,
        check=lambda name, value: assert_all_close(name, value, expected, 1e-5),  # type: ignore[arg-type]
        traffic=traffic,
    )


def compare_steps(batch_size: int, session: Session, point: Point) -> None:
    """A training step of ours, timm's and the BatchNorm twin."""
    settings = session.settings
    image_size = settings.image_size if settings.on_gpu else IMAGE_SIZE
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.benchmark = settings.on_gpu
    dtype = torch.bfloat16 if settings.on_gpu else torch.float32
    batch = Batch.random(settings.device, batch_size, image_size, dtype)
    case = f"training step, {batch}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    networks = make_networks(settings.device, count=3)
    if not settings.on_gpu:
        networks = [network for network in networks if fits(session, BENCH, network, batch, case)]
    if not networks:
        return
    comparison = training.training(BENCH, case, networks, batch, optional=True)
    operations = batch.operations(multiply_adds(image_size), passes=3)
    rounds = None if settings.on_gpu else 3 if settings.quick else 5
    session.compare(replace(comparison, operations=operations, point=point, rounds=rounds))
