"""Signal propagation metrics of a network (Brock et al. 2021a, section 3): what the signal does block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.blocks import NFBlock
from ..models.network import NormalizerFreeNet


def _stream_metrics(h: Tensor, index: int) -> dict[str, Tensor]:
    """Average squared channel mean and average channel variance of (N, C, H, W), over N, H and W."""
    return {
        f"avg_sq_mean_{index}": h.mean(dim=(0, 2, 3)).square().mean(),
        f"avg_var_{index}": h.var(dim=(0, 2, 3), correction=0).mean(),
    }


@torch.no_grad()
def signal_propagation(model: NormalizerFreeNet, x: Tensor) -> dict[str, Tensor]:
    """The authors' signal metrics of one forward pass (nfnets/base.py, `signal_metrics`).

    Args:
        model: the network, in the mode (train or eval) it is to be looked at; its state does not change.
        x: (N, in_chans, H, W).

    Returns:
        Scalars: `avg_sq_mean_0` and `avg_var_0` after the stem, `avg_sq_mean_{i+1}`, `avg_var_{i+1}` after block i, and
        `res_avg_var_{i}`, the average channel variance of block i's residual branch before skip_gain and alpha.

    Raises:
        TypeError: the model is not a `NormalizerFreeNet`.
    """
    if not isinstance(model, NormalizerFreeNet):
        raise TypeError(f"model must be an NF network of nfnets_kernels.models, got {type(model).__name__}")
    metrics: dict[str, Tensor] = {}

    def before_block(block: NFBlock, inputs: tuple[Any, ...]) -> None:
        h, a, *_ = inputs
        index = indices[block]
        if index == 0:
            metrics.update(_stream_metrics(h, 0))
        metrics[f"res_avg_var_{index}"] = block.branch(a).var(dim=(0, 2, 3), correction=0).mean()

    def after_block(block: NFBlock, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        metrics.update(_stream_metrics(outputs[0], indices[block] + 1))

    indices = {block: index for index, block in enumerate(model.blocks)}
    handles = []
    try:
        for block in model.blocks:
            handles += [block.register_forward_pre_hook(before_block), block.register_forward_hook(after_block)]
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return metrics
