"""The training step under DistributedDataParallel in two processes: NF against synchronized and local BatchNorm.

BatchNorm's statistics are sums over the batch. Synchronized, they stop all processes in every layer, forward and
backward; NF networks send nothing but their gradients.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import nfnets_kernels as nfk
from benchmarks import training
from benchmarks.bn_resnet import BNResNet
from benchmarks.checks import served_by
from benchmarks.clocks import host_clock, interleave, wall_clock
from benchmarks.environment import keep_freed_memory
from benchmarks.goals import TWIN
from benchmarks.harness import Session
from benchmarks.results import Incident, Role, Timing
from benchmarks.training import CLASSES, Batch, Network, check_loss, training_step

BENCH = "distributed"
PROCESSES = 2
OURS = "NF-ResNet-26 with AGC"
STAND_IN = f"{TWIN}, synchronized (stand-in)"


@dataclass(frozen=True)
class Work:
    """What every process runs."""

    device: str
    case: str
    batch_size: int
    image_size: int
    rounds: int
    seed: int
    keeps_memory: bool


@dataclass(frozen=True)
class Measured:
    """A network's steps in the first process, in seconds."""

    name: str
    role: Role
    backend: str
    seconds: list[float]


def run(session: Session) -> None:
    """Time the steps of three networks, interleaved, in processes of their own."""
    settings = session.settings
    batch_size, image_size = (128, 224) if settings.on_gpu else (16, 96)
    precision = "bfloat16 autocast" if settings.on_gpu else "float32, one thread each"
    case = f"training step, {PROCESSES} processes, batch {batch_size} each at {image_size}, {precision}"
    if settings.on_gpu and torch.cuda.device_count() < PROCESSES:
        reason = f"needs {PROCESSES} GPUs, {torch.cuda.device_count()} here"
        session.report_incident(Incident(BENCH, case, "skipped", reason))
        return
    rounds = settings.rounds or (12 if settings.quick else 60)
    kind = "cuda" if settings.on_gpu else "cpu"
    keeps_memory = session.results.environment.keeps_memory
    work = Work(kind, case, batch_size, image_size, rounds, settings.seed, keeps_memory)
    record(session, case, measure(work))


def measure(work: Work) -> list[Measured]:
    """What the first of the processes measured."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure_in_process, (work, folder), nprocs=PROCESSES)
        return [Measured(**row) for row in json.loads(Path(folder, "measured.json").read_text())]


def record(session: Session, case: str, all_measured: list[Measured]) -> None:
    """One timing for each network; ours is the first."""
    ours = float(np.median(all_measured[0].seconds))
    for one in all_measured:
        p20, median, p80 = (float(value) for value in np.percentile(one.seconds, [20, 50, 80]))
        session.results.timings.append(
            Timing(
                bench=BENCH,
                case=case,
                contestant=one.name,
                role=one.role,
                backend=one.backend,
                rounds=len(one.seconds),
                median_ms=1e3 * median,
                p20_ms=1e3 * p20,
                p80_ms=1e3 * p80,
                relative_time=median / ours,
            )
        )
    session.results.save(session.folder)


def measure_in_process(rank: int, work: Work, folder: str) -> None:
    """Joins the others; the first process writes what it measured."""
    torch.set_num_threads(1)
    if work.keeps_memory:
        keep_freed_memory()
    on_gpu = work.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
        torch.backends.cudnn.benchmark = True
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    torch.manual_seed(work.seed)
    networks = make_networks(work.device)
    torch.manual_seed(work.seed + rank)
    batch = Batch.random(work.device, work.batch_size, work.image_size, torch.bfloat16 if on_gpu else torch.float32)
    steps = [training_step(network, batch) for network in networks]
    backends = [first_step(network, step, work.device) for network, step in zip(networks, steps, strict=True)]
    clock = host_clock_until_done if on_gpu else wall_clock
    interleave(steps, 3, clock, distributed.barrier)  # DDP rebuilds its buckets after the first step
    samples = interleave(steps, work.rounds, clock, distributed.barrier)
    if rank == 0:
        rows = [
            asdict(Measured(network.name, network.role, backend, seconds))
            for network, backend, seconds in zip(networks, backends, samples, strict=True)
        ]
        Path(folder, "measured.json").write_text(json.dumps(rows))
    distributed.destroy_process_group()


def host_clock_until_done(run: Callable[[], object]) -> float:
    """Seconds until the GPU has done a call's work: what another process makes it wait for is part of that."""

    def finish() -> None:
        run()
        torch.cuda.synchronize()

    return host_clock(finish)


def first_step(network: Network, step: Callable[[], torch.Tensor], device: str) -> str:
    """A step whose loss must be finite; returns the backends that served it."""
    with nfk.backend.recording() as executed:
        loss = step()
    check_loss(network.name, loss)
    return served_by(network.name, network.role, network.ops, executed, device)


def make_networks(device: str) -> list[Network]:
    """The networks in DistributedDataParallel; ours first."""
    architecture: dict[str, Any] = {
        "depth": (2, 2, 2, 2),
        "width": 4 if device == "cuda" else 1,
        "num_classes": CLASSES,
    }
    twin = partial(BNResNet, **architecture)
    synchronize = nn.SyncBatchNorm.convert_sync_batchnorm if device == "cuda" else synchronize_on_cpu
    networks = [
        training.clipped_by_ours(OURS, nfk.models.NFResNet(**architecture), device),
        training.unclipped(f"{TWIN}, SyncBatchNorm" if device == "cuda" else STAND_IN, synchronize(twin()), device),
        training.unclipped(f"{TWIN}, local statistics", twin(), device),
    ]
    return [replace(network, model=DistributedDataParallel(network.model.train())) for network in networks]


class SynchronizedNormalization(torch.autograd.Function):
    """BatchNorm by the statistics of all processes, with SyncBatchNorm's messages: one forward and one backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        """x (N, C, H, W), of one shape in all processes."""
        moments = torch.stack(torch.var_mean(x, (0, 2, 3), correction=0))
        gathered = [torch.empty_like(moments) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, moments)
        variances, means = torch.stack(gathered, dim=1)
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, var)
        return nn.functional.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Native gradients for fixed statistics, and for x what moving the statistics adds."""
        x, weight, mean, var = ctx.saved_tensors
        rstd = (var + ctx.eps).rsqrt()
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, mean, rstd, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_weight, grad_bias])
        distributed.all_reduce(sums)
        of_weight, of_bias = sums / (distributed.get_world_size() * x.numel() / x.shape[1])
        slope = -weight * rstd.square() * of_weight
        shift = -weight * rstd * of_bias - slope * mean
        grad_x.addcmul_(x, slope.view(1, -1, 1, 1)).add_(shift.view(1, -1, 1, 1))
        return grad_x, grad_weight, grad_bias, None


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """In place of `torch.nn.SyncBatchNorm`, which takes no CPU tensors; without running statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W), of one shape in all processes."""
        output: Any = SynchronizedNormalization.apply(input, self.weight, self.bias, self.eps)
        return output


def synchronize_on_cpu(model: nn.Module) -> nn.Module:
    """The model with synchronized layers in place of its BatchNorm, as `convert_sync_batchnorm` does on a GPU."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, SynchronizedBatchNorm2d(child.num_features, child.eps))
    return model
