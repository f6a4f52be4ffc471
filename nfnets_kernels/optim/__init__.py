"""Optimization of NF networks."""

from .agc import AGC

__all__ = ["AGC"]
