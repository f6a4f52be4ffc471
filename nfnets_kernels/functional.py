"""Stateless public functions. Every argument is checked here, before anything is written."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import ops
from .ops.library import check_choice
from .reference.scaled_activation import GAMMA
from .sharded import clip_sharded_, is_sharded

_FORMAT_NAMES = {
    torch.preserve_format: "preserve",
    torch.contiguous_format: "contiguous",
    torch.channels_last: "channels_last",
    torch.channels_last_3d: "channels_last",
}


def gamma(name: str) -> float:
    """The gain that brings an activation of N(0, 1) inputs back to variance 1 (Brock et al. 2021a, section 4.2).

    Args:
        name: one of the 16 activations of the authors' table, such as "relu", "gelu", "silu".

    Raises:
        ValueError: the name is not in the table.
    """
    check_choice("name", name, tuple(GAMMA))
    return GAMMA[name]


def scaled_activation(
    x: Tensor,
    name: str,
    gamma: float | None = None,
    beta: float = 1.0,
    *,
    bias: Tensor | None = None,
    approximate: str = "none",
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`beta * gamma * f(x + bias)` in one pass.

    Args:
        x: (...) of float32, float64, bfloat16 or float16; glu and log_softmax work on dim 1 of (N, C, ...).
        name: an activation of `gamma`'s table.
        gamma: gain of the activation; None takes the table's.
        beta: further static scale, in NF networks 1 / expected standard deviation of the block's input.
        bias: (C,) of any of the floating dtypes, for x of (N, C, ...): that of the convolution that computed x, which
            then adds none. Its gradient is summed in the backward pass of the activation. Not for glu and log_softmax.
        approximate: for gelu, "none" (timm) or "tanh" (the authors), as in `torch.nn.GELU`.
        inplace: overwrite x and return it. For identity, and for relu and leaky_relu where beta * gamma >= 1: their
            gradients follow from the output alone.
        backend: "auto", or a name that must serve or raise; see `nfnets_kernels.backend`.

    Returns:
        A tensor of x's dtype, shape (half the channels for glu) and memory format.

    Raises:
        TypeError: x is not a dense floating tensor.
        ValueError: unknown name, approximate or backend, a scale that is not finite, a bias that does not fit, inplace
            where not offered.
    """
    check_choice("name", name, tuple(GAMMA))
    scale = (GAMMA[name] if gamma is None else gamma) * beta
    ops.scaled_activation.check(x, name, scale, approximate)
    if inplace:
        ops.scaled_activation.check_inplace(name, scale)
    options = name, scale, approximate, backend
    if bias is None:
        op = ops.scaled_activation.scaled_activation_ if inplace else ops.scaled_activation.scaled_activation
        return op(x, *options)
    ops.bias_activation.check(x, name, bias)
    op = ops.bias_activation.bias_activation_ if inplace else ops.bias_activation.bias_activation
    return op(x, bias, *options)


def weight_standardize_many(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None] = (),
    *,
    scales: Sequence[float] | None = None,
    eps: float = 1e-4,
    eps_form: str = "clamp",
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    backend: str = "auto",
) -> list[Tensor]:
    """Scaled weight standardization of many weights in one pass (Brock et al. 2021a, equation 1).

    Each output unit (index of dim 0) of N = fan-in weights becomes `scale * gain * (w - mean) * r` with biased variance
    and r = `rsqrt(max(N*var, eps))` for eps_form "clamp" (the authors'), `rsqrt(N*(var + eps))` for "add" (timm's).

    Args:
        weights: each (O, I, ...), any floating dtype; statistics are taken in float32 (float64 for float64).
        gains: per weight, a learnable gain per unit (any shape of O elements, the weight's dtype) or None for 1;
            empty: all 1.
        scales: static factor per weight, into which gamma, beta and alpha of the surrounding block can be folded;
            None: all 1.
        eps: lower bound of, or addition to, the variance term.
        eps_form: "clamp" or "add".
        dtype: dtype of the results; None keeps each weight's. bfloat16 under autocast saves the cast.
        memory_format: of the results; channels_last saves the reordering that a channels_last convolution would do.
        backend: "auto", or a name that must serve or raise.

    Returns:
        The standardized weights, shaped as the weights.

    Raises:
        TypeError: a dtype or layout that is not accepted.
        ValueError: lengths differ, fan_in is 1, eps is negative or not finite, unknown eps_form or backend.
    """
    if isinstance(weights, Tensor):
        raise TypeError("weights must be a sequence of tensors, got one tensor; see weight_standardize")
    weights, gains = list(weights), list(gains)
    if gains and len(gains) != len(weights):
        raise ValueError(f"gains must hold one entry per weight ({len(weights)}) or none, got {len(gains)}")
    scales = [1.0] * len(weights) if scales is None else [float(scale) for scale in scales]
    if memory_format not in _FORMAT_NAMES:
        raise ValueError(f"memory_format must be one of {tuple(_FORMAT_NAMES)}, got {memory_format}")
    layout = _FORMAT_NAMES[memory_format]
    present = [] if all(gain is None for gain in gains) else _fill_missing(weights, gains)
    arguments = weights, present, scales, eps, eps_form, dtype, layout, backend
    return ops.weight_standardize.check_and_standardize(*arguments)


def _fill_missing(weights: Sequence[Tensor], gains: Sequence[Tensor | None]) -> list[Tensor]:
    """Ones for the gains that are None: the op takes a gain for every weight or none at all."""
    return [w.new_ones(w.shape[:1]) if gain is None else gain for w, gain in zip(weights, gains, strict=True)]


def weight_standardize(
    weight: Tensor,
    gain: Tensor | None = None,
    *,
    scale: float = 1.0,
    eps: float = 1e-4,
    eps_form: str = "clamp",
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    backend: str = "auto",
) -> Tensor:
    """Scaled weight standardization of one weight; see `weight_standardize_many`."""
    (out,) = weight_standardize_many(
        [weight],
        [gain],
        scales=[scale],
        eps=eps,
        eps_form=eps_form,
        dtype=dtype,
        memory_format=memory_format,
        backend=backend,
    )
    return out


def residual(
    f: Tensor,
    shortcut: Tensor,
    *,
    skip_gain: Tensor | None = None,
    se: Tensor | None = None,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    activation: str = "relu",
    scale: float = 1.0,
    approximate: str = "none",
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of a residual block and the start of the next one in one pass (Brock et al. 2021, section 3).

    `h = alpha * skip_gain * keep * gate * f + bias + shortcut` and `a = scale * act(h)`, gate = 2 * sigmoid(se).

    Args:
        f: (N, C, ...), the residual branch.
        shortcut: as f.
        skip_gain: learnable scalar (SkipInit), shape ().
        se: (N, C) logits of squeeze and excite.
        keep: (N,) stochastic depth, 0 or 1 (or 1 / keep probability) per sample.
        bias: (C,) of any of the floating dtypes; for instance the sum of the biases of the convolutions that computed f
            and shortcut, whose gradients are the same.
        alpha: static scale of the branch.
        activation: an elementwise activation of `gamma`'s table.
        scale: static scale of the activation, for instance gamma times the next block's beta.
        approximate: for gelu, as in `scaled_activation`.
        inplace: write h into f and return f as h, which saves a tensor of f's size. Where skip_gain, se and keep are
            None: their gradients need f.
        backend: "auto", or a name that must serve or raise.

    Returns:
        h and a, each as f.

    Raises:
        TypeError: a tensor that is not dense or not floating.
        ValueError: shapes, dtypes or devices that do not fit, unknown activation or backend, inplace where not offered.
    """
    ops.residual.check(f, shortcut, skip_gain, se, keep, alpha, activation, scale, approximate, bias)
    if inplace:
        ops.residual.check_inplace(skip_gain, se, keep)
        return ops.residual.residual_(f, shortcut, alpha, activation, scale, approximate, backend, bias)
    factors = skip_gain, se, keep, alpha
    given = () if bias is None else (bias,)
    return ops.residual.residual(f, shortcut, *factors, activation, scale, approximate, backend, *given)


def agc_(
    parameters: Tensor | Iterable[Tensor],
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float = 2.0,
    *,
    rule: str = "timm",
    backend: str = "auto",
) -> None:
    """Clips gradients in place to `clip_factor` of their parameter's norm, unit by unit, in one pass.

    A unit is one output channel or neuron: an index of dim 0; scalars and vectors are one unit. A unit whose gradient
    norm is not below `max_norm = clip_factor * max(||w||, eps)` is multiplied by `max_norm / max(||g||, 1e-6)`
    (Brock et al. 2021, equation 3). A NaN in a unit's gradient makes the unit NaN.

    Args:
        parameters: tensors with `.grad`, or one; those without a gradient are skipped, one that comes twice is clipped
            once. Any mixture of float32, float64, bfloat16 and float16; norms are taken in float32 (float64 for
            float64). With DTensors it is a collective call, see `nfnets_kernels.sharded`.
        clip_factor: largest ratio of gradient norm to parameter norm (lambda in the paper).
        eps: lower bound of the parameter norm, so that zero-initialized parameters can move.
        norm_type: 1, 2, inf or any p > 0.
        rule: what a (C, 1, 1, 1) tensor is: "timm", C units of one element; "deepmind" (and optax), squeezed to a
            vector, one unit.
        backend: "auto", or a name that must serve or raise.

    Raises:
        TypeError: not a tensor, or a gradient that is sparse, complex or of another dtype than the four.
        ValueError: negative or not finite options, a gradient of another shape or device than its parameter, or one
            whose elements share memory. Nothing is written then.
    """
    ops.agc.check_options(clip_factor, eps, norm_type, rule, backend)
    parameters = ops.agc.listed(parameters)
    compiling = torch.compiler.is_compiling()
    if not compiling and ops.agc.clip_again_(parameters, clip_factor, eps, norm_type, rule, backend):
        return
    if any(map(is_sharded, parameters)):
        clip_sharded_(parameters, clip_factor, eps, norm_type, rule=rule, backend=backend)
        return
    weights, grads = ops.agc.with_gradients(parameters)
    with torch.no_grad():
        ops.agc.agc_(weights, grads, clip_factor, eps, norm_type, rule, backend)
    if not compiling:
        ops.agc.remember(parameters, rule, backend)
