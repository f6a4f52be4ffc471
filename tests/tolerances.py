"""How far a result may lie from the float64 reference: from unit length and ulps, never from what happens to pass."""

import math

import torch
from torch import Tensor


def relative_bound(dtype: torch.dtype, unit_length: int = 1, ulps: float = 2.0) -> float:
    """Relative error that `ulps` roundings to dtype and one accumulation over unit_length terms may leave.

    A sum of n rounded terms errs by at most n ulps of the accumulation dtype and, the roundings being independent, by
    some sqrt(n) of them in practice (Higham, Accuracy and Stability of Numerical Algorithms, section 2.8).
    """
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    return ulps * torch.finfo(dtype).eps + (8.0 + math.sqrt(unit_length)) * torch.finfo(accumulation).eps


def assert_accurate(
    actual: Tensor,
    expected: Tensor,
    *,
    unit_length: int = 1,
    ulps: float = 2.0,
    magnitude: Tensor | float | None = None,
) -> None:
    """Asserts that actual is expected, a float64 result, up to rounding; NaN equals NaN and infinities are equal.

    Args:
        actual: the result, whose dtype sets the ulp.
        expected: the reference in float64, of the same shape.
        unit_length: terms that the longest sum behind an element adds up.
        ulps: roundings to actual's dtype on the way to an element.
        magnitude: size of the terms that may have cancelled in an element; default the largest finite |expected|. Where
            it is not finite, nothing may have cancelled.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert expected.dtype == torch.float64, "expected must come from the float64 reference"
    if actual.numel() == 0:
        return
    info = torch.finfo(actual.dtype)
    expected = expected.detach()
    value = actual.detach().to(torch.float64)
    rounded = expected.to(actual.dtype).to(torch.float64)
    torch.testing.assert_close(value.isnan(), rounded.isnan(), rtol=0, atol=0, msg="NaN in other places than expected")
    infinite = rounded.isinf()
    torch.testing.assert_close(value[infinite], rounded[infinite], rtol=0, atol=0, msg="infinities differ")
    finite = rounded.isfinite()
    if not finite.any():
        return
    if magnitude is None:
        magnitude = expected[finite].abs().max()
    scale = torch.as_tensor(magnitude, dtype=torch.float64).expand_as(expected)[finite].nan_to_num(0.0, 0.0, 0.0)
    bound = relative_bound(actual.dtype, unit_length, ulps) * torch.maximum(expected[finite].abs(), scale)
    error = (value[finite] - expected[finite]).abs()
    excess = error - bound - info.smallest_normal * info.eps  # a subnormal's ulp
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"off by {error[worst]:.3e} where {bound[worst]:.3e} is allowed: got {value[finite][worst]:.9g}, "
        f"expected {expected[finite][worst]:.9g}"
    )
