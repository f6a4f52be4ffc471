"""This package's kernels inside timm's Normalizer-Free networks, with timm's parameters and `state_dict`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, EcaModule, ScaledStdConv2d, ScaledStdConv2dSame, SEModule
from timm.models.nfnet import GammaAct, NormFreeBlock
from torch import Tensor, nn

from .. import functional, ops
from ..modules.batched import GROUPS, BatchedWeightStandardization, check_not_owned, release
from ..ops.library import check_choice
from .timm_modules import (
    ATTRIBUTES,
    ORIGINALS,
    AcceleratedBlock,
    AcceleratedConv,
    AcceleratedConvSame,
    AcceleratedGammaAct,
    AcceleratedStage,
    AcceleratedStem,
)
from .timm_training import use_agc as use_agc

_CONVOLUTIONS = {ScaledStdConv2d: AcceleratedConv, ScaledStdConv2dSame: AcceleratedConvSame}


class _Activation(NamedTuple):
    """`gamma * f(x)`, and f by name."""

    name: str
    approximate: str
    gamma: float

    @property
    def function(self) -> dict[str, str]:
        """f, as the attributes of our modules."""
        return {"activation": self.name, "approximate": self.approximate}


class _Swap(NamedTuple):
    module: nn.Module
    accelerated: type[nn.Module]
    attributes: dict[str, Any]


def _recognize(function: Callable[[Tensor], Tensor]) -> tuple[str, str] | None:
    """The activation of ours that has the function's values, and which approximation of it."""
    x = torch.linspace(-8.0, 8.0, 65, dtype=torch.float64, device="cpu")
    values = function(x.clone())
    for known in ops.residual.ACTIVATIONS:
        for approximate in ops.scaled_activation.APPROXIMATIONS if known == "gelu" else ("none",):
            ours = functional.scaled_activation(x, known, gamma=1.0, approximate=approximate, backend="reference")
            if torch.allclose(values, ours, rtol=1e-9, atol=1e-9):
                return known, approximate
    return None


def _activation(name: str, module: Any) -> _Activation:
    if any(True for _ in module.parameters()):
        raise ValueError(f"model must have activations without parameters; {name} is {module}")
    scaled = isinstance(module, GammaAct)
    found = _recognize(module.act_fn if scaled else module.forward)
    if found is None:
        raise ValueError(f"model must have activations of {ops.residual.ACTIVATIONS}; {name}, {module}, is another one")
    return _Activation(*found, module.gamma if scaled else 1.0)


def _check_attention(name: str, attention: Any) -> None:
    if attention is None:
        return
    known = type(attention) is EcaModule or (type(attention) is SEModule and not attention.add_maxpool)
    if not known:
        raise ValueError(f"model must have SEModule (without add_maxpool) or EcaModule for attention; {name} has not")
    if _recognize(attention.gate.forward) != ("sigmoid", "none"):
        raise ValueError(f"model must have sigmoid gates in its attention; {name}.gate is {attention.gate}")


def _plan_block(name: str, block: Any) -> Iterator[_Swap]:
    """The block and its convolutions, into which the gamma of the activation before and the block's beta are folded."""
    if type(block.drop_path) not in (DropPath, nn.Identity):
        raise ValueError(f"model must have DropPath for stochastic depth; {name}.drop_path is {block.drop_path}")
    for attention in ("attn", "attn_last"):
        _check_attention(f"{name}.{attention}", getattr(block, attention))
    places = [place for place in ("1", "2", "2b", "3") if getattr(block, f"conv{place}") is not None]
    activations = {place: _activation(f"{name}.act{place}", getattr(block, f"act{place}")) for place in places}
    first = activations["1"]
    if any(activation.function != first.function for activation in activations.values()):
        raise ValueError(f"model must have one activation in a block; {name} has several")
    factors = {getattr(block, f"conv{place}"): activation.gamma for place, activation in activations.items()}
    factors[block.conv1] = first.gamma * block.beta
    if block.downsample is not None:
        factors[block.downsample.conv] = first.gamma * block.beta
    for conv, factor in factors.items():
        if type(conv) not in _CONVOLUTIONS:
            raise ValueError(f"model must have timm's ScaledStdConv2d in its blocks; {name} has {type(conv).__name__}")
        yield _Swap(conv, _CONVOLUTIONS[type(conv)], {"factor": factor})
    yield _Swap(block, AcceleratedBlock, first.function)


def _plan(model: nn.Module) -> list[_Swap]:
    """What to change, with nothing changed yet."""
    modules = dict(model.named_modules())
    swaps: dict[nn.Module, _Swap] = {}
    for name, module in modules.items():
        if type(module) is NormFreeBlock:
            swaps.update((swap.module, swap) for swap in _plan_block(name, module))
    for name, module in modules.items():
        if type(module) is GammaAct:
            swaps[module] = _Swap(module, AcceleratedGammaAct, _activation(name, module).function)
        elif type(module) in _CONVOLUTIONS and module not in swaps:
            swaps[module] = _Swap(module, _CONVOLUTIONS[type(module)], {})
        elif type(module) is nn.Sequential and len(module) > 0:
            functions = [swaps[block].attributes if type(block) is NormFreeBlock else None for block in module]
            if functions[0] is not None and all(function == functions[0] for function in functions):
                swaps[module] = _Swap(module, AcceleratedStage, {})
            elif sum(type(child) in _CONVOLUTIONS for child in module) > 1:
                swaps[module] = _Swap(module, AcceleratedStem, {})
    return list(swaps.values())


def accelerate(model: nn.Module, group: str = "stage") -> nn.Module:
    """Swaps the kernels into a timm `NormFreeNet`, or any model that holds its parts, in place.

    Outputs and gradients are timm's up to rounding, and so are random numbers, parameters, names and shapes: weights
    load both ways, before and after. Fused are weight standardization (one launch per group, see
    `modules.BatchedWeightStandardization`), into which go gamma, beta, alpha and skip gain, and the end of each block:
    gate, stochastic depth, sum, and the next block's activation. Modules become instances of subclasses, so hooks,
    copies and pickles stay as they are; but a block no longer calls its activations, `attn`, `drop_path` and
    `downsample`, so hooks on these are not called. Wrap (DistributedDataParallel) and compile afterwards.

    Args:
        model: made by `timm.create_model`, with `features_only` or without.
        group: "stage" or "model", what is standardized in one launch; "stage" for gradient checkpointing.

    Returns:
        The model.

    Raises:
        TypeError: model is not a module.
        ValueError: unknown group, nothing to accelerate, accelerated already, or a part without a kernel: an activation
            that `functional.residual` does not know, an attention other than timm's SE and ECA with sigmoid gates.
            Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    check_choice("group", group, GROUPS)
    if _accelerated(model):
        raise ValueError("model must not be accelerated already")
    check_not_owned(model)
    swaps = _plan(model)
    if not swaps:
        raise ValueError(f"model must hold parts of timm's NormFreeNet; {type(model).__name__} has none")
    for module, accelerated, attributes in swaps:
        module.__class__ = accelerated
        vars(module).update(attributes)
    if group == "model":  # stages and stem standardize their weights together by themselves
        BatchedWeightStandardization(model, group)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`: classes, attributes and forward passes are timm's again, the parameters stay as they are.

    Returns:
        The model.

    Raises:
        TypeError: model is not a module.
        ValueError: model is not accelerated.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    accelerated = _accelerated(model)
    if not accelerated:
        raise ValueError("model must be accelerated")
    release(model)
    for module in accelerated:
        module.__class__ = ORIGINALS[type(module)]
        for name in ATTRIBUTES:
            vars(module).pop(name, None)
    return model


def _accelerated(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in ORIGINALS]
