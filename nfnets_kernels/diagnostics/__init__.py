"""Looking into normalizer-free networks."""

from .signal_propagation import signal_propagation

__all__ = ["signal_propagation"]
