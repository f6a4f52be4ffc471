"""The alternatives that the package is measured against, each at its best."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F

from benchmarks import torchvision_compat

torchvision_compat.prepare()

from timm import create_model  # noqa: E402  (only importable after prepare)
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame  # noqa: E402
from timm.utils.agc import adaptive_clip_grad  # noqa: E402
from torchvision.models import get_model, get_model_weights, resnet50  # noqa: E402

__all__ = [
    "ScaledStdConv2d",
    "ScaledStdConv2dSame",
    "adaptive_clip_grad",
    "compiled",
    "create_model",
    "eager_chain",
    "eager_chain_in_place",
    "get_model",
    "get_model_weights",
    "lean_agc_",
    "published_accuracy",
    "resnet50",
    "timm_weight",
]

Function = TypeVar("Function", bound=Callable[..., object])
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def published_accuracy(name: str) -> float:
    """The ImageNet top-1 accuracy, in percent, of the first weights that torchvision published for a network.

    They come from the plain recipe of the networks' authors, later ones from longer and stronger training.
    """
    return get_model_weights(name)["IMAGENET1K_V1"].meta["_metrics"]["ImageNet-1K"]["acc@1"]


def unit_norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The norm of each output unit, or of the whole tensor up to one dimension, as timm defines units."""
    return [
        torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None, keepdim=True)
        for tensor in tensors
    ]


@torch.no_grad()
def lean_agc_(weights: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], clip_factor: float, eps: float) -> None:
    """Adaptive gradient clipping in lean eager PyTorch: two norms per tensor, the rest for whole lists.

    Same values as timm's ``adaptive_clip_grad`` while ``clip_factor * eps`` is at least 1e-6.
    """
    factors = unit_norms(weights)
    torch._foreach_clamp_min_(factors, eps)
    torch._foreach_mul_(factors, clip_factor)
    grad_norms = unit_norms(grads)
    torch._foreach_clamp_min_(grad_norms, 1e-6)
    torch._foreach_div_(factors, grad_norms)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(list(grads), factors)


def timm_weight(weight: torch.Tensor, gain: torch.Tensor, scale: float, eps: float) -> torch.Tensor:
    """The standardized weight as ``timm.layers.ScaledStdConv2d.forward`` computes it."""
    return F.batch_norm(
        weight.reshape(1, weight.shape[0], -1),
        None,
        None,
        weight=(gain * scale).view(-1),
        training=True,
        momentum=0.0,
        eps=eps,
    ).reshape_as(weight)


def eager_chain(name: str, gamma: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """``activation(x) * gamma``, as users write it."""
    activation = ACTIVATIONS[name]
    return lambda x: activation(x) * gamma


def eager_chain_in_place(name: str, gamma: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """``activation(x).mul_(gamma)``, as timm writes it. Not for relu, whose backward needs the result untouched."""
    activation = ACTIVATIONS[name]
    return lambda x: activation(x).mul_(gamma)


def compiled(function: Function, mode: str | None = None) -> Function:
    """``torch.compile`` for the fixed shapes of a benchmark, in one graph."""
    # One function compiled for many cases would reach dynamo's limit of recompilations.
    torch._dynamo.reset()
    return cast(Function, torch.compile(function, dynamic=False, fullgraph=True, mode=mode))
