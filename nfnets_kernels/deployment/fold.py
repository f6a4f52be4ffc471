"""Bakes standardized weights and static factors into a network of plain torch layers."""

from __future__ import annotations

import copy
import warnings

from torch import nn

from ..modules.batched import release
from ..modules.standardized import Standardized
from .trace import trace

_PACKAGE = __name__.partition(".")[0]


def _is_ours(function_or_class: object) -> bool:
    return function_or_class.__module__.partition(".")[0] == _PACKAGE


def _derives_from_ours(module: nn.Module) -> bool:
    return any(_is_ours(base) for base in type(module).__mro__)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not any(_derives_from_ours(module) for module in model.modules()):
        raise ValueError(f"model must hold a layer of {_PACKAGE}, got a {type(model).__name__} with nothing to fold")
    for name, module in model.named_modules():
        if isinstance(module, Standardized) and not _is_ours(type(module).forward):
            raise ValueError(f"cannot fold {name or 'model'}: {type(module).__name__} has a forward of its own")


def _fold_parts(module: nn.Module, folded: dict[nn.Module, nn.Module]) -> nn.Module:
    """Replaces the parts of our classes inside `module`; `folded` holds what has become of each."""
    if module not in folded:
        if _derives_from_ours(module):
            folded[module] = trace(module)
        else:
            folded[module] = module
            for name, child in module._modules.items():
                module._modules[name] = None if child is None else _fold_parts(child, folded)
    return folded[module]


def fold(model: nn.Module) -> nn.Module:
    """The network for inference, in plain torch: each standardized weight is computed once and for all.

    WSConv2d, WSLinear and their like become nn.Conv2d, nn.Linear, ..., of the same names, with gamma, gain, and in the
    blocks of our models alpha and skip_gain, in their weights; scaled activations, the residual op, squeeze and excite
    and SAME padding become functions of torch, dropout and stochastic depth vanish. What comes back is in eval mode, on
    the model's device, in its dtypes and memory formats; it runs, pickles and unpickles without this package, and can
    be exported, quantized by `torch.ao.quantization.quantize_fx` and run on inputs of any size. Its parameters require
    grad where a parameter that they come from does, much as after torch.ao's fusion of BatchNorm.

    The network is traced by torch.fx, into a `torch.fx.GraphModule` that takes the arguments without a default; those
    with one keep it. A network that torch.fx cannot trace, because its code depends on the data, keeps its own classes,
    with a warning that names the reason: only the modules of ours in it are replaced, one by one. It must then call
    standardized layers with an input alone, and still needs this package for functions of ours that it calls.

    Args:
        model: holds modules of ours anywhere; in train mode it is folded as in eval mode. It is not changed.

    Raises:
        TypeError: model is not a module.
        ValueError: there is nothing to fold, or a standardized layer is of a subclass that overrides forward.
    """
    _check(model)
    copied = copy.deepcopy(model).eval()
    release(copied)  # its hooks are ours
    try:
        return trace(copied)
    except Exception as error:
        if _derives_from_ours(model):
            raise
        reason = f"torch.fx cannot trace it ({type(error).__name__}: {error})"
        warnings.warn(f"{type(model).__name__} is folded module by module: {reason}", stacklevel=2)
        return _fold_parts(copied, {})
