"""Weight standardization in a network that others wrote: `nn.Conv2d` to `WSConv2d`, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from .. import ops
from ..ops.library import check_finite
from .conv import WSConv2d

Pattern = str | Sequence[str] | Callable[[str, nn.Conv2d], bool]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _predicate(argument: str, pattern: Pattern) -> Callable[[str, nn.Conv2d], bool]:
    """What decides whether a convolution is meant."""
    globs = [pattern] if isinstance(pattern, str) else pattern
    if isinstance(globs, Sequence) and all(isinstance(glob, str) for glob in globs):
        return lambda name, _: any(fnmatchcase(name, glob) for glob in globs)
    if callable(pattern):
        return pattern
    raise TypeError(f"{argument} must be a name pattern, a sequence of them or a function, got {pattern!r}")


def _is_plain_conv(module: nn.Module) -> bool:
    """Whether it is an nn.Conv2d of no other subclass than those that torch makes of one, or for one, on the fly."""
    of_torch = nn.LazyConv2d, nn.Conv2d
    return type(module) in of_torch or (parametrize.is_parametrized(module) and type(module).__base__ in of_torch)


def _check_conv(name: str, conv: nn.Conv2d, gamma: float, eps: float, eps_form: str) -> None:
    """Raises ValueError or TypeError, with the name, for what cannot become a WSConv2d."""
    if isinstance(conv, nn.LazyConv2d):
        raise ValueError(f"{name} is a LazyConv2d without weights: run the network once before converting it")
    if conv._parameters.get("weight") is None:
        raise ValueError(f"{name} has no weight of its own, but one that a parametrization, norm or pruning computes")
    if "forward" in vars(conv):
        raise ValueError(f"{name} has a forward that was set on the instance, which would bypass standardization")
    try:
        ops.weight_standardize.check([conv.weight], [], [gamma], eps, eps_form, None, "preserve")
    except (TypeError, ValueError) as error:
        raise type(error)(f"cannot standardize {name}: {error}") from error


def _standardize(conv: nn.Conv2d, gamma: float, eps: float, eps_form: str, gain: bool) -> None:
    """Makes the convolution a WSConv2d; as torch's parametrizations do, by its class: whoever holds it keeps it."""
    conv.__class__ = WSConv2d
    assert isinstance(conv, WSConv2d)
    conv._init_conv((conv.out_channels,) if gain else None, False, gamma, eps, eps_form)
    if conv.gain is not None:
        conv.gain.requires_grad_(conv.weight.requires_grad)


def convert_conv2d(
    module: ModuleT,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    *,
    gamma: float = 1.0,
    eps: float = 1e-4,
    eps_form: str = "clamp",
    gain: bool = True,
) -> ModuleT:
    """Turns the `nn.Conv2d` of a network into `WSConv2d`, in place.

    For training from scratch or fine-tuning: the network computes something else afterwards, with standardized weights
    and gains of 1. Normalization layers stay; the gains are new parameters, to be given to the optimizer.

    Weights and biases stay the very same parameters, so that optimizers and tied weights go on, and so do the modules
    with their arguments, hooks, train or eval mode; only their class changes. Subclasses of `nn.Conv2d`, among them
    what is standardized already, are left alone.

    Args:
        module: the network, or one `nn.Conv2d`.
        include: which convolutions: glob patterns (`fnmatch`) for qualified names as "layer1.*", one or several, or a
            function of name and module; None for all.
        exclude: likewise, which of them not. A convolution of several names is converted where any of them is included
            and none excluded.
        gamma, eps, eps_form, gain: as in `WSConv2d`. A gain requires grad where its weight does.

    Returns:
        `module` itself.

    Raises:
        TypeError: an argument of another type, or a weight of a dtype that is not accepted.
        ValueError: no convolution was found, or one cannot be standardized: a fan-in of 1, a weight that is not there
            yet (LazyConv2d) or is computed (parametrizations, weight_norm, pruning), a forward set on the instance; or
            gamma, eps or eps_form is not accepted. Nothing is changed then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if not isinstance(gain, bool):
        raise TypeError(f"gain must be a bool, got {gain!r}")
    check_finite("gamma", gamma)
    included = _predicate("include", "*" if include is None else include)
    excluded = _predicate("exclude", () if exclude is None else exclude)
    names: dict[nn.Conv2d, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if _is_plain_conv(part):
            names.setdefault(part, []).append(name)
    chosen = [
        conv
        for conv, its in names.items()
        if any(included(name, conv) for name in its) and not any(excluded(name, conv) for name in its)
    ]
    if not chosen:
        raise ValueError(
            f"include={include!r} and exclude={exclude!r} choose none of the {len(names)} nn.Conv2d "
            f"in {type(module).__name__}"
        )
    for conv in chosen:
        _check_conv(names[conv][0] or "module", conv, gamma, eps, eps_form)
    for conv in chosen:
        _standardize(conv, gamma, eps, eps_form, gain)
    return module
