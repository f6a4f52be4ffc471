"""Adaptive gradient clipping as a callback of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import ops
from ..optim.agc import AGC, check_exclude
from ..optim.agc_optimizer import AGCOptimizer

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            "nfnets_kernels.integrations.lightning needs Lightning: pip install 'nfnets-kernels[lightning]'"
        ) from error


class AdaptiveGradientClipping(Callback):
    """Clips the gradients of each optimizer's parameters unit by unit, right before its step.

    So it does with accumulated gradients once they are complete, with several optimizers and manual optimization, and
    with `precision="16-mixed"` after unscaling: also for optimizers that would unscale by themselves (`fused=True`),
    which the Trainer's own clipping refuses. A parameter group's own "clip_factor", as `optim.param_groups` makes it,
    goes before the callback's; None leaves the group unclipped. With `SGD_AGC`, which clips itself, no callback is
    needed.

    Args:
        clip_factor, eps, norm_type, rule, backend: see `nfnets_kernels.agc_`.
        exclude: modules of the LightningModule that stay unclipped, see `nfnets_kernels.AGC`: `exclude=("model.fc",)`.

    Raises:
        TypeError: exclude is a single name or module, or an option is of another type.
        ValueError: an option that `agc_` rejects; when training starts, a name or module that the LightningModule does
            not have, or a Trainer with a gradient_clip_val, which would clip a second time.

    Examples:
        >>> trainer = lightning.Trainer(callbacks=[AdaptiveGradientClipping(0.01, exclude=("model.fc",))])
    """

    def __init__(
        self,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        *,
        norm_type: float = 2.0,
        rule: str = "timm",
        exclude: Sequence[str | nn.Module] = (),
        backend: str = "auto",
    ) -> None:
        ops.agc.check_options(clip_factor, eps, norm_type, rule, backend)
        check_exclude(exclude)
        self.clip_factor = clip_factor
        self.options: dict[str, Any] = {"eps": eps, "norm_type": norm_type, "rule": rule, "backend": backend}
        self.exclude = exclude
        self._excluded: set[Tensor] = set()
        self._clippers: dict[Optimizer, _Clipper] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds what is excluded: by now the parameters are those that are trained."""
        if trainer.gradient_clip_val:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) and AdaptiveGradientClipping would both clip; "
                "give one of them"
            )
        self._excluded = {*pl_module.parameters()} - {*AGC(pl_module, exclude=self.exclude).parameters}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Clips; Lightning calls it between backward and step, after unscaling."""
        _unscale(trainer, optimizer)
        if optimizer not in self._clippers:
            self._clippers[optimizer] = _Clipper(optimizer, self.clip_factor, **self.options)
        clipper = self._clippers[optimizer]
        clipper.clip_factor, clipper.excluded = self.clip_factor, self._excluded
        clipper.clip_()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets go of the parameters."""
        self._excluded = set()
        self._clippers = {}


class _Clipper(AGCOptimizer):
    """Clips an optimizer's parameters, by the factors of its groups, but for some; Lightning calls its step."""

    excluded: Collection[Tensor] = ()

    def _by_factor(self) -> list[tuple[float, list[Tensor]]]:
        by_factor = super()._by_factor()
        return [(factor, [p for p in parameters if p not in self.excluded]) for factor, parameters in by_factor]


def _unscale(trainer: Any, optimizer: Optimizer) -> None:
    """Unscales gradients that Lightning left to the optimizer; a `GradScaler` then knows, and so does the optimizer."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    unscales_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
    has_gradients = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    if scaler is not None and unscales_itself and has_gradients:
        scaler.unscale_(optimizer)
