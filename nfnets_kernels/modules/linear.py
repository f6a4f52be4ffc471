"""Weight-standardized linear layer."""

from torch import Tensor, nn
from torch.nn import functional as F

from .standardized import Standardized


class WSLinear(Standardized, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` whose weight rows are standardized: `gamma * gain * (w - mean) * rsqrt(max(N*var, eps))`.

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear`.
        gain: learn one gain per output feature.
        gamma: static scale, for instance the gain of the activation before the layer.
        eps, eps_form: see `nfnets_kernels.functional.weight_standardize_many`.

    Raises:
        ValueError: in_features is 1, or gamma, eps or eps_form is not accepted.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        gain: bool = True,
        gamma: float = 1.0,
        eps: float = 1e-4,
        eps_form: str = "clamp",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_standardization((out_features,) if gain else None, gamma, eps, eps_form)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        weight, bias = self.standardized(input)
        return F.linear(input, weight, bias)
