"""Squeeze and excite as NF networks use it: the logits of a gate that the residual op applies."""

from torch import Tensor, nn
from torch.nn import functional as F


class SqueezeExcite(nn.Module):
    """Logits of one gate per sample and channel: pool, linear, ReLU, linear.

    The gate 2 * sigmoid(logits) belongs to the `residual` op, which multiplies it into the branch in the same pass.

    Args:
        channels: channels of the branch.
        ratio: hidden width over channels, at least one neuron (nfnets/base.py, `SqueezeExcite`).
        device, dtype: of the parameters.
    """

    def __init__(self, channels: int, ratio: float = 0.5, device=None, dtype=None) -> None:
        super().__init__()
        hidden = max(1, int(channels * ratio))
        self.fc0 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.fc1 = nn.Linear(hidden, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to logits (N, C)."""
        return self.fc1(F.relu(self.fc0(x.flatten(2).mean(dim=2))))
