"""`agc_`: adaptive gradient clipping of a list of gradients, in place and in one pass."""

import math

import torch
from torch import Tensor

from .. import backend as backends
from ..reference import agc as reference
from .library import FLOAT_DTYPES, check_choice, define, is_unit_dense

RULES = ("timm", "deepmind")

# csrc/kernels/agc.h, `Norm`; any other p is code 3.
_NORM_CODES = {2.0: 0, 1.0: 1, math.inf: 2}


def check_options(clip_factor: float, eps: float, norm_type: float, rule: str) -> None:
    """Raises ValueError naming the first bad option."""
    if not (math.isfinite(clip_factor) and clip_factor >= 0):
        raise ValueError(f"clip_factor must be finite and not negative, got {clip_factor}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be a p > 0 or inf, got {norm_type}")
    check_choice("rule", rule, RULES)


def overlaps(tensor: Tensor) -> bool:
    """Whether two indices may share memory: some stride does not step over all that the smaller strides reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_gradient(name: str, weight: Tensor, grad: Tensor) -> None:
    """Raises ValueError or TypeError if this gradient cannot be clipped in place."""
    if grad.layout != torch.strided:
        raise TypeError(f"{name}.grad must be a dense (strided) tensor, got layout {grad.layout}")
    for what, tensor in ((name, weight), (f"{name}.grad", grad)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{what} must have one of the dtypes {FLOAT_DTYPES}, got {tensor.dtype}")
    if grad.shape != weight.shape:
        raise ValueError(f"{name}.grad must have the shape {tuple(weight.shape)}, got {tuple(grad.shape)}")
    if grad.device != weight.device:
        raise ValueError(f"{name}.grad must be on the device {weight.device}, got {grad.device}")
    if not grad.is_contiguous() and overlaps(grad):
        raise ValueError(
            f"{name}.grad may hold one element twice (shape {tuple(grad.shape)}, strides {grad.stride()}, as after "
            "expand()); clone it before clipping"
        )


def _agc(weights, grads, clip_factor, eps, norm_type, rule, backend):
    by_device: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for weight, grad in zip(weights, grads, strict=True):
        if grad.numel():
            pair = by_device.setdefault(grad.device.type, ([], []))
            pair[0].append(weight)
            pair[1].append(grad)
    kernels = {device: backends.select("agc", device, backend) for device in by_device}
    for device, (device_weights, device_grads) in by_device.items():
        kernels[device](device_weights, device_grads, clip_factor, eps, norm_type, rule)
    torch.autograd.graph.increment_version(grads)


def _fake(weights, grads, clip_factor, eps, norm_type, rule, backend):
    return None


@backends.register("agc", "reference")
def _reference(weights, grads, clip_factor, eps, norm_type, rule):
    for weight, grad in zip(weights, grads, strict=True):
        reference.agc_(weight, grad, clip_factor, eps, norm_type, rule)


def _dense(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor if is_unit_dense(tensor) else tensor.contiguous() for tensor in tensors]


@backends.register("agc", "cpu")
def _cpu(weights, grads, clip_factor, eps, norm_type, rule):
    assert backends.extension is not None
    dense_weights, dense_grads = _dense(weights), _dense(grads)
    counts = [1 if reference.is_one_unit(grad.shape, rule) else grad.shape[0] for grad in grads]
    backends.extension.agc(
        [weight.data_ptr() for weight in dense_weights],
        [grad.data_ptr() for grad in dense_grads],
        counts,
        [grad.numel() // count for grad, count in zip(grads, counts, strict=True)],
        [backends.DTYPE_CODES[weight.dtype] for weight in weights],
        [backends.DTYPE_CODES[grad.dtype] for grad in grads],
        clip_factor,
        eps,
        _NORM_CODES.get(norm_type, 3),
        norm_type,
        torch.get_num_threads(),
    )
    for grad, dense in zip(grads, dense_grads, strict=True):
        if grad is not dense:
            grad.copy_(dense)


agc_ = define(
    "agc_(Tensor[] weights, Tensor(a!)[] grads, float clip_factor, float eps, float norm_type, str rule, str backend) "
    "-> ()",
    _agc,
    _fake,
)
