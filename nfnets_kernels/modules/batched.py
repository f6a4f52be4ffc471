"""Standardizes the weights of many layers in one launch, before the forward pass of the module that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..ops.library import check_choice
from ..sharded import is_sharded
from .standardized import Prepared, Request, Standardized, standardize_together

GROUPS = ("stage", "model")


def requests_of(module: nn.Module) -> list[Request]:
    """A request for each standardized layer inside; a module that has `requests()` makes those for its own layers."""
    if callable(getattr(module, "requests", None)):
        requests: list[Request] = [*module.requests()]  # type: ignore[operator]
        return [request for request in requests if isinstance(request.layer, Standardized)]
    own = [Request(module)] if isinstance(module, Standardized) else []
    inside = [request for child in module.children() for request in requests_of(child)]
    return list({request.layer: request for request in [*own, *inside]}.values())


def standardize_in_groups(requests: Sequence[Request], input: Tensor | None) -> list[Prepared]:
    """As `standardize_together`, for layers that may differ: one pass for each eps, eps_form, dtype and device."""
    groups: dict[Any, list[int]] = {}
    for index, (layer, _, _) in enumerate(requests):
        weight = layer.weight
        key = (layer.eps, layer.eps_form, weight.dtype, weight.device)
        groups.setdefault(key, []).append(index)
    prepared: dict[int, Prepared] = {}
    for indices in groups.values():
        prepared.update(zip(indices, standardize_together([requests[i] for i in indices], input), strict=True))
    return [prepared[index] for index in range(len(requests))]


def prepare_together(requests: Sequence[Request], input: Tensor, kept: bool = False) -> list[Prepared | None]:
    """What the layers compute with, in one pass for those that do not hold it.

    None where a layer keeps its own from earlier passes, unless `kept` is wanted too, and where it makes it by itself.
    """
    prepared: list[Prepared | None] = [
        layer.held(skip_gain, alpha) if isinstance(layer, Standardized) else None
        for layer, skip_gain, alpha in requests
    ]
    missing = [i for i, request in enumerate(requests) if prepared[i] is None and _is_wanted(request)]
    for index, pair in zip(missing, standardize_in_groups([requests[i] for i in missing], input), strict=True):
        prepared[index] = pair
    for index, (layer, skip_gain, alpha) in enumerate(requests if kept else ()):
        if prepared[index] is None and _is_ready(layer):
            prepared[index] = layer.standardized(input, skip_gain, alpha)
    return prepared


def _is_wanted(request: Request) -> bool:
    layer = request.layer
    return _is_ready(layer) and not layer.keeps_standardized()


def _is_ready(layer: nn.Module) -> bool:
    # Under fully_shard a layer has whole parameters while it is called, which is too late here.
    return isinstance(layer, Standardized) and _has_its_parameters(layer) and not is_sharded(layer.weight)


def _has_its_parameters(layer: Standardized) -> bool:
    """Not so with pruning and parametrizations: they make a weight or a bias anew when the layer is called."""
    missing = [name for name in ("weight", "bias", "gain") if name not in layer._parameters]
    return not missing or {*missing} <= {*getattr(layer, "_former_parameters", ())}  # those of DataParallel's replicas


def _prepare(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: gives each layer inside its weight."""
    requests = [request for request in requests_of(module) if _is_wanted(request)]
    input = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    for (layer, skip_gain, alpha), prepared in zip(requests, standardize_in_groups(requests, input), strict=True):
        layer.hold(prepared, skip_gain, alpha)


def _release(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook, also called after an exception: no weight outlives the pass that it was made for."""
    for layer in module.modules():
        if isinstance(layer, Standardized):
            layer.let_go()


def _stages(model: nn.Module) -> list[nn.Module]:
    """The entries of `model.stages` and the other children; a list, which is never called, counts as its entries."""
    found: list[nn.Module] = []
    for name, child in model.named_children():
        is_list = isinstance(child, nn.ModuleList) or (name == "stages" and isinstance(child, nn.Sequential))
        found += child.children() if is_list else [child]
    return found


def check_not_owned(model: nn.Module) -> None:
    """Raises ValueError where a `BatchedWeightStandardization` owns the model or a part of it."""
    for name, module in model.named_modules():
        if _prepare in module._forward_pre_hooks.values():
            raise ValueError(f"model must not be owned already: {name or 'it'} is; see release()")


class BatchedWeightStandardization:
    """Standardizes all weights of a model's layers in one launch per group, through forward pre-hooks.

    For any model that holds `WSConv2d` and its like, or timm's layers after `integrations.timm.accelerate`. Values and
    gradients are those of the model alone, bit for bit (up to rounding for a layer called twice, whose gradients are
    added earlier). The model is owned until `remove`; copies and pickles of it are owned too. In eval mode without grad
    the layers keep their weights as ever, and nothing is launched. Layers whose weight pruning or a parametrization
    makes are left to themselves.

    The weights are prepared for the first tensor that the group's module is called with: in its channels_last format,
    and in the autocast dtype. A layer with `requests()` above it gets what that says (`models.blocks.ResidualBlock`
    folds alpha and skip gain). A layer that is not called gets a gradient of zeros in place of none.

    Args:
        model: holds at least one standardized layer.
        group: "stage", one launch for each entry of `model.stages` and each other child of the model (entries of a
            ModuleList count as children): with DistributedDataParallel the gradients of the last stages can be reduced
            while the first ones are computed, and stages may be checkpointed. "model", one launch for all; layers in a
            checkpoint (`torch.utils.checkpoint`) inside the model then standardize by themselves, since they have to
            once more in the backward pass; those of `nfnets_kernels.models` do not have to.

    Raises:
        TypeError: model is not a module.
        ValueError: unknown group, nothing to standardize, or the model or a part of it is owned already; "stage" for a
            network of `nfnets_kernels.models`, which does that without an owner.
    """

    def __init__(self, model: nn.Module, group: str = "stage") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        check_choice("group", group, GROUPS)
        check_not_owned(model)
        if group == "stage" and getattr(model, "standardizes_by_stage", False):
            raise ValueError(f"group must be 'model': {type(model).__name__} standardizes by stage without an owner")
        stages = [model] if group == "model" or isinstance(model, Standardized) else _stages(model)
        owned = [stage for stage in stages if requests_of(stage)]
        if not owned:
            raise ValueError(f"model must hold standardized layers, such as WSConv2d; {type(model).__name__} has none")
        self.model = model
        self.group = group
        for module in owned:
            module.register_forward_pre_hook(_prepare, with_kwargs=True)
            module.register_forward_hook(_release, always_call=True)

    def remove(self) -> None:
        """Gives the model back; its layers standardize by themselves."""
        release(self.model)


def release(model: nn.Module) -> None:
    """Undoes `BatchedWeightStandardization` of a model, or of a copy of an owned one."""
    for module in model.modules():
        for hook, hooks, options in (
            (_prepare, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (_release, module._forward_hooks, module._forward_hooks_always_called),
        ):
            for key in [key for key, value in hooks.items() if value is hook]:
                del hooks[key]
                options.pop(key, None)
