"""The contract of every op: its torch.library schema, fake, gradient, argument checks and the choice of backend."""

from . import agc, bias_activation, residual, scaled_activation, sgd_agc, weight_standardize

__all__ = ["agc", "bias_activation", "residual", "scaled_activation", "sgd_agc", "weight_standardize"]
