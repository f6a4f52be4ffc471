"""Looking into normalizer-free networks and their training."""

from . import clipping
from .signal_propagation import SignalPropagation, signal_propagation

__all__ = ["SignalPropagation", "clipping", "signal_propagation"]
