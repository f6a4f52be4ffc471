"""From a trained network to a plain torch module: what inference, export and quantization need."""

from .fold import fold

__all__ = ["fold"]
