"""What the tests of the residual op share: the op by an activation's key, and its small inputs."""

import torch

from nfnets_kernels import functional

from .helpers import named, randn

SMALL = ("skip_gain", "se", "keep")


def residual(f, shortcut, key="relu", **options):
    """The op with the activation of that key."""
    name, approximate = named(key)
    return functional.residual(f, shortcut, activation=name, approximate=approximate, **options)


def small_inputs(f, names=SMALL, dtype=None):
    """Random skip_gain, se and keep that fit f; keep drops every third sample, not the first."""
    dtype = dtype or f.dtype
    samples, channels = f.shape[:2]
    keep = ((torch.arange(samples) % 3 != 1) / 0.75).to(dtype)
    every = {"skip_gain": randn((), dtype), "se": 2 * randn((samples, channels), dtype), "keep": keep}
    return {name: every[name] for name in SMALL if name in names}
