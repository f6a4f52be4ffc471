"""Parameter groups of a model: what is decayed, and what is clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .. import ops
from ..ops.library import check_finite
from .lookup import find_module, unwrapped
from .text_table import text_table

Head = nn.Module | str | Sequence[nn.Module | str]

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_COLUMNS = ("group", "tensors", "parameters", "weight_decay", "clip_factor", "holds")


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer; prints as a table, one row for each."""

    def __repr__(self) -> str:
        return "\n".join(text_table([_COLUMNS, *map(_row, self)], left=(0, len(_COLUMNS) - 1)))


def _row(group: dict[str, Any]) -> tuple[str, ...]:
    if "param_names" in group:  # an optimizer has taken the group, and the pairs apart
        names, parameters = group["param_names"], group["params"]
    else:
        names, parameters = zip(*group["params"], strict=True)
    count = sum(parameter.numel() for parameter in parameters)
    holds = ", ".join([*names[:2], *(["..."] if len(names) > 2 else [])])
    numbers = f"{len(names)}", f"{count:,}", f"{group['weight_decay']}", f"{group['clip_factor']}"
    return group["name"], *numbers, holds


def param_groups(
    model: nn.Module, weight_decay: float = 2e-5, clip_factor: float | None = 0.01, head: Head | None = None
) -> ParamGroups:
    """Groups a model's parameters as Brock et al. 2021b train theirs (section 4.1, and nfnets/experiment.py).

    Decayed are the weights of convolutions, linear and bilinear layers, embeddings, attention and recurrent layers,
    and of their subclasses; not gains, biases, skip gains, normalization layers, and parameters of other modules.
    Clipped is everything except the head. It is the kind of module that says what a parameter is, neither its shape nor
    its place nor its qualified name: timm's gains of shape (C, 1, 1, 1) are not decayed.

    Every parameter is in one group, frozen ones too so that they may be unfrozen. One that several modules share is
    decayed where it is a weight in any of them, and unclipped where any of them is in the head.

    Args:
        model: also compiled or in DistributedDataParallel; names are those of the model inside.
        weight_decay: of the decayed groups; the others have 0.
        clip_factor: of the clipped groups, None for no clipping; the head's have None.
        head: what stays unclipped, with the modules inside: a module of the model, its qualified name, or a sequence of
            these, `()` for nothing. None: what the model's `get_classifier()` (timm) returns, else its `fc` (this
            package's networks, torchvision's ResNets).

    Returns:
        Those of the groups "decay", "no_decay", "head_decay" and "head_no_decay" that are not empty, each with its
        "name", "params" (pairs of name and parameter), "weight_decay" and "clip_factor". Any torch optimizer takes
        them, and keeps what it does not know; `SGD_AGC` and `AGC` read clip_factor.

    Raises:
        TypeError: an argument of another type.
        ValueError: a negative or not finite number, a head that is not found, a model without parameters or with lazy
            ones.

    Examples:
        >>> groups = param_groups(model, weight_decay=2e-5, clip_factor=0.01)
        >>> print(groups)
        >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    _check_numbers(weight_decay, clip_factor)
    model = unwrapped(model)
    in_head = {id(p) for module in _head_modules(model, head) for p in module.parameters()}
    weights = {id(p) for module in model.modules() for p in _weights(module)}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {
        (False, True): {"name": "decay", "params": [], "weight_decay": weight_decay, "clip_factor": clip_factor},
        (False, False): {"name": "no_decay", "params": [], "weight_decay": 0.0, "clip_factor": clip_factor},
        (True, True): {"name": "head_decay", "params": [], "weight_decay": weight_decay, "clip_factor": None},
        (True, False): {"name": "head_no_decay", "params": [], "weight_decay": 0.0, "clip_factor": None},
    }
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"model must have all its parameters; {name} is lazy: run the model once before")
        groups[id(parameter) in in_head, id(parameter) in weights]["params"].append((name, parameter))
    found = ParamGroups(group for group in groups.values() if group["params"])
    if not found:
        raise ValueError(f"model must have parameters; {type(model).__name__} has none")
    return found


def _check_numbers(weight_decay: float, clip_factor: float | None) -> None:
    if not isinstance(weight_decay, (int, float)):
        raise TypeError(f"weight_decay must be a number, got {type(weight_decay).__name__}")
    check_finite("weight_decay", weight_decay)
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    if clip_factor is not None:
        ops.agc.check_options(clip_factor, eps=0.0, norm_type=2.0, rule="timm", backend="auto")


def _weights(module: nn.Module) -> Iterable[nn.Parameter]:
    """The module's weights, if it is of a kind that has what weight decay is for; with what they are computed from."""
    own = dict(module.named_parameters())
    if isinstance(module, (_ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)):
        names: Iterable[str] = ("weight",)
    elif isinstance(module, nn.MultiheadAttention):
        names = _ATTENTION_WEIGHTS
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return [parameter for name, parameter in own.items() if name.startswith("weight_")]
    else:
        return []
    # as they are, under pruning, and under a parametrization
    stored = [key for name in names for key in (name, f"{name}_orig", f"parametrizations.{name}.original")]
    return [own[key] for key in stored if key in own]


def _head_modules(model: nn.Module, head: Head | None) -> list[nn.Module]:
    if head is None:
        return _classifiers(model)
    if isinstance(head, (nn.Module, str)):
        head = [head]
    if not isinstance(head, Sequence):
        raise TypeError(f"head must be a module, a name or a sequence of them, got {type(head).__name__}")
    return [find_module("head", entry, model) for entry in head]


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """Several in timm's distilled networks; one without parameters where a model has no classes."""
    get_classifier = getattr(model, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else getattr(model, "fc", None)
    classifiers: list[Any] = list(found) if isinstance(found, (tuple, list)) else [found]
    if all(isinstance(classifier, nn.Module) for classifier in classifiers):
        return classifiers
    raise ValueError(
        f"head must be given: {type(model).__name__} has neither get_classifier() nor fc; pass head='<name of its last "
        "layer>', which then stays unclipped, or head=() to clip everything"
    )
