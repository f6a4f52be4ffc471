"""Signal propagation metrics of a network (Brock et al. 2021a, section 3): what the signal does block by block."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..models.blocks import NFBlock
from ..models.network import NormalizerFreeNet
from .figures import new_figure, save


class SignalPropagation(dict[str, Tensor]):
    """Metrics by the authors' names; `plot` draws them block by block."""

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """The signal propagation plots of the first paper (Brock et al. 2021a, figure 1), one panel per metric.

        Args:
            path: where to write it, for instance "signal.png"; None: nowhere.

        Returns:
            The matplotlib Figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        panels = (
            ("avg_sq_mean", "average squared channel mean"),
            ("avg_var", "average channel variance"),
            ("res_avg_var", "average channel variance\nof the residual branch"),
        )
        figure = new_figure(12.0, 3.6)
        for axes, (metric, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            values = self.of(metric)
            axes.plot(range(len(values)), values, marker="o", markersize=3)
            axes.set_title(title)
            axes.set_xlabel("residual block" if metric == "res_avg_var" else "after block (0: the stem)")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylim(bottom=0.0)
            axes.grid(alpha=0.3)
        return save(figure, path)

    def of(self, metric: str) -> list[float]:
        """One metric of all blocks, in their order: "avg_sq_mean", "avg_var" or "res_avg_var"."""
        names = {f"{metric}_{i}" for i in range(len(self))}
        return [value.item() for name, value in sorted(self.items(), key=_index) if name in names]


def _index(item: tuple[str, Tensor]) -> int:
    return int(item[0].rsplit("_", 1)[1])


def _stream_metrics(h: Tensor, index: int) -> dict[str, Tensor]:
    """Average squared channel mean and average channel variance of (N, C, H, W), over N, H and W."""
    return {
        f"avg_sq_mean_{index}": h.mean(dim=(0, 2, 3)).square().mean(),
        f"avg_var_{index}": h.var(dim=(0, 2, 3), correction=0).mean(),
    }


@torch.no_grad()
def signal_propagation(model: NormalizerFreeNet, x: Tensor) -> SignalPropagation:
    """The authors' signal metrics of one forward pass (nfnets/base.py, `signal_metrics`).

    Args:
        model: the network, in the mode (train or eval) it is to be looked at; its state does not change.
        x: (N, in_chans, H, W).

    Returns:
        Scalars `avg_sq_mean_0` and `avg_var_0` after the stem, `avg_sq_mean_{i+1}` and `avg_var_{i+1}` after block i,
        and `res_avg_var_{i}`, the average channel variance of block i's residual branch before skip_gain and alpha. The
        result draws them with `signal_propagation(model, x).plot("signal.png")`.

    Raises:
        TypeError: the model is not a `NormalizerFreeNet`.
    """
    if not isinstance(model, NormalizerFreeNet):
        raise TypeError(f"model must be an NF network of nfnets_kernels.models, got {type(model).__name__}")
    metrics = SignalPropagation()

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
