"""Activations scaled to keep the variance of N(0, 1) inputs at 1 (Brock et al. 2021a, section 4.2)."""

from torch import Tensor, nn

from .. import functional, ops


class ScaledActivation(nn.Module):
    """`beta * gamma * f(x)` in one pass, for each of the 16 activations of the authors' table.

    Args:
        name: the activation, a name of `nfnets_kernels.functional.gamma`'s table.
        gamma: gain; None takes the table's.
        beta: further static scale.
        approximate: for gelu, "none" (timm) or "tanh" (the authors).
        inplace: overwrite the input; see `nfnets_kernels.functional.scaled_activation` for those that can.

    Raises:
        ValueError: unknown name or approximate, or inplace where it is not offered.
    """

    def __init__(
        self,
        name: str,
        gamma: float | None = None,
        beta: float = 1.0,
        *,
        approximate: str = "none",
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.gamma = functional.gamma(name) if gamma is None else float(gamma)
        self.beta = float(beta)
        self.approximate = approximate
        self.inplace = inplace
        ops.scaled_activation.check_options(name, self.gamma * self.beta, approximate)
        if inplace:
            ops.scaled_activation.check_inplace(name, self.gamma * self.beta)

    def forward(self, x: Tensor) -> Tensor:
        """x: (...) of a floating dtype; see `nfnets_kernels.functional.scaled_activation`."""
        return functional.scaled_activation(
            x, self.name, self.gamma, self.beta, approximate=self.approximate, inplace=self.inplace
        )

    def extra_repr(self) -> str:
        """The arguments that make an equal module."""
        approximate = f", approximate={self.approximate!r}" if self.name == "gelu" else ""
        inplace = ", inplace=True" if self.inplace else ""
        return f"{self.name!r}, gamma={self.gamma}, beta={self.beta}{approximate}{inplace}"


class ScaledReLU(ScaledActivation):
    """ReLU times gamma = 1.7139588594436646."""

    def __init__(self, gamma: float | None = None, beta: float = 1.0, *, inplace: bool = False) -> None:
        super().__init__("relu", gamma, beta, inplace=inplace)


class ScaledGELU(ScaledActivation):
    """GELU times gamma = 1.7015043497085571; `approximate` comes first, as in `nn.GELU`."""

    def __init__(self, approximate: str = "none", gamma: float | None = None, beta: float = 1.0) -> None:
        super().__init__("gelu", gamma, beta, approximate=approximate)


class ScaledSiLU(ScaledActivation):
    """SiLU times gamma = 1.7881293296813965."""

    def __init__(self, gamma: float | None = None, beta: float = 1.0) -> None:
        super().__init__("silu", gamma, beta)
