"""What the benchmarks of whole networks share: a network with its gradient clipping, a batch, a step, an inference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.checks import BenchmarkError
from benchmarks.goals import COMPILED
from benchmarks.harness import Comparison, Contestant, to_channels_last
from benchmarks.results import Role

CLASSES = 1000
CLIP_FACTOR = 0.01
# A learning rate so small that random labels keep every network finite however many rounds are run.
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-5}


@dataclass(frozen=True)
class Batch:
    """What a network is trained on, and the dtype of autocast, float32 being none."""

    images: torch.Tensor
    labels: torch.Tensor
    dtype: torch.dtype = torch.float32

    @classmethod
    def random(
        cls,
        device: str,
        batch_size: int,
        image_size: int,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> "Batch":
        """Random images and random labels."""
        images = torch.randn((batch_size, 3, image_size, image_size), device=device)
        labels = torch.randint(CLASSES, (batch_size,), device=device)
        return cls(images.contiguous(memory_format=memory_format), labels, dtype)

    def __str__(self) -> str:
        return f"batch {len(self.images)} at {self.images.shape[-1]}"

    def forward(self, model: nn.Module) -> torch.Tensor:
        """Logits in the batch's precision."""
        autocast = self.dtype != torch.float32
        with torch.autocast(self.images.device.type, self.dtype if autocast else None, enabled=autocast):
            return model(self.images)

    def loss(self, model: nn.Module) -> torch.Tensor:
        """Cross-entropy of the batch."""
        return F.cross_entropy(self.forward(model), self.labels)

    def gradients(self, network: "Network") -> torch.Tensor:
        """The gradient of the loss for all of a network's parameters, as one float32 vector."""
        params = list(network.model.parameters())
        grads = torch.autograd.grad(self.loss(network.model), params)
        return torch.cat([grad.float().flatten() for grad in grads])

    def few(self) -> "Batch":
        """Two of the images: enough to see whether a network computes what it should."""
        return replace(self, images=self.images[:2], labels=self.labels[:2])

    def operations(self, multiply_adds: int, passes: int) -> dict[str, int]:
        """What a forward pass takes at least, with the two products of a backward pass three of them."""
        return {str(self.dtype).removeprefix("torch."): 2 * passes * multiply_adds * len(self.images)}

    @torch.no_grad()
    def infer(self, model: nn.Module) -> torch.Tensor:
        """Logits without a graph."""
        return self.forward(model)


@dataclass(frozen=True)
class Network:
    """A network, what it is trained with, and the package's ops that training must run.

    ``clip`` precedes the optimizer's step; our optimizer clips in it.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    clip: Callable[[], None] | None = None
    role: Role = "peer"
    ops: tuple[str, ...] = ()
    compiled: bool = False
    graphed: bool = False
    """on a GPU, the whole step in a CUDA graph"""


@torch.no_grad()
def leave_identity(model: nn.Module) -> nn.Module:
    """Gives the branches of NF networks a part in the sum, as after some training; they start with none.

    A skip gain (or timm's last gain) that starts at 0 is 1e-9 after a clipped step. The gradients behind it are then so
    small that oneDNN's convolutions meet subnormal numbers: 540 ms instead of 380 in those of an NF-ResNet-50.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("skip_gain", "skipinit_gain", "conv3.gain")) and not parameter.any():
            parameter.fill_(0.25)
    return model


def clipped_by_ours(name: str, model: nn.Module, device: str, classifier: str = "fc") -> Network:
    """A network of the package's modules, in channels_last, whose gradients the package's optimizer clips."""
    model = to_channels_last(leave_identity(model), device)
    excluded = {id(param) for param in model.get_submodule(classifier).parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in excluded]},
        {"params": list(model.get_submodule(classifier).parameters()), "clip_factor": None},
    ]
    optimizer = nfk.optim.SGD_AGC(groups, clip_factor=CLIP_FACTOR, **SGD)
    return Network(name, model, optimizer, role="ours", ops=("sgd_agc", "weight_standardize"))


def clipped_by_timm(name: str, model: nn.Module, device: str) -> Network:
    """A network in channels_last whose gradients timm clips."""
    model = to_channels_last(leave_identity(model), device)
    clip = partial(peers.adaptive_clip_grad, clipped_parameters(model), CLIP_FACTOR)
    return Network(name, model, fused_sgd(model), clip)


def fused_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The fastest of torch's forms on CPU and GPU alike."""
    return torch.optim.SGD(model.parameters(), fused=True, **SGD)


def compiled(network: Network, mode: str | None = None) -> Network:
    """The same parameters, with the network under torch.compile."""
    return replace(
        network, name=COMPILED.format(network.name), model=peers.compiled(network.model, mode), compiled=True
    )


def unclipped(name: str, model: nn.Module, device: str) -> Network:
    """A BatchNorm network in channels_last, which trains without gradient clipping."""
    model = to_channels_last(model, device)
    return Network(name, model, fused_sgd(model))


def clipped_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but the classifier's, which gradient clipping leaves alone."""
    return [param for name, param in model.named_parameters() if not name.startswith(("fc.", "head.fc."))]


def training(bench: str, case: str, networks: Sequence[Network], batch: Batch, optional: bool = False) -> Comparison:
    """Forward, cross-entropy, backward, gradient clipping and SGD with Nesterov momentum; the memory of it too."""
    for network in networks:
        network.model.train()
    return Comparison(
        bench=bench,
        case=case,
        contestants=[
            Contestant(
                name=network.name,
                run=training_step(network, batch),
                role=network.role,
                ops=network.ops,
                optional=optional or network.compiled,
                compiled=network.compiled,
                graphed=network.graphed,
            )
            for network in networks
        ],
        check=check_loss,
        # A step then allocates its gradients, as its peak should count.
        setup=partial(drop_gradients, networks),
        cache="in step",
        graphed=False,
        memory=True,
    )


@dataclass(frozen=True)
class TrainingStep:
    """One step as a function that returns the loss, or its two halves."""

    network: Network
    batch: Batch
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def gradients(self) -> torch.Tensor:
        """Forward, loss and backward."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.batch.loss(self.network.model)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self) -> None:
        """Clipping and the optimizer."""
        if self.network.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.network.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def __call__(self) -> torch.Tensor:
        """Both."""
        loss = self.gradients()
        self.update()
        return loss


def training_step(network: Network, batch: Batch) -> TrainingStep:
    """A step of a network; float16's loss is scaled, as its gradients would otherwise underflow."""
    if network.optimizer is None:
        raise ValueError(f"{network.name} has no optimizer")
    # From the start at a scale with which no step overflows and is skipped: that would be faster.
    scaler = torch.amp.GradScaler(batch.images.device.type, init_scale=2.0**10, enabled=batch.dtype == torch.float16)
    return TrainingStep(network, batch, network.optimizer, scaler)


def drop_gradients(networks: Sequence[Network]) -> None:
    """Free the gradients of the last step."""
    for network in networks:
        network.model.zero_grad(set_to_none=True)


def check_loss(name: str, value: object) -> None:
    """Raise ``BenchmarkError`` unless the loss is finite."""
    if not isinstance(value, torch.Tensor) or not value.isfinite():
        raise BenchmarkError(f"{name}: the loss is {value}")


def inference(bench: str, case: str, networks: Sequence[Network], batch: Batch, optional: bool = False) -> Comparison:
    """The forward pass in eval mode without grad."""
    return Comparison(
        bench=bench,
        case=case,
        contestants=[
            Contestant(
                name=network.name,
                run=partial(batch.infer, network.model.eval()),
                role=network.role,
                optional=optional or network.compiled,
                compiled=network.compiled,
                graphed=network.graphed,
            )
            for network in networks
        ],
        check=check_logits,
        cache="in step",
        graphed=False,
    )


def check_logits(name: str, value: object) -> None:
    """Raise ``BenchmarkError`` unless the logits are finite."""
    if not isinstance(value, torch.Tensor) or not value.isfinite().all():
        raise BenchmarkError(f"{name}: the logits are not finite")
