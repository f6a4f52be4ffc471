"""`SGD_AGC`: adaptive gradient clipping, weight decay, Nesterov momentum, update and moving average in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import ops
from ..ops.library import check_choice, is_unit_dense, same_order
from ..ops.sgd_agc import Call
from ..ops.snapshot import same_objects
from ..reference.weight_standardize import accumulation_dtype
from ..sharded import clip_spread_, is_sharded, reject_flat_parameters, split
from .agc_optimizer import named_parameters, unscale_
from .sgd_agc_plan import Memory, Plan, hyperparameters
from .statistics import ClippingStatistics, UnitCounts

_OF_ALL_GROUPS = ("rule", "backend", "statistics")


class SGD_AGC(Optimizer):
    """Stochastic gradient descent whose step clips gradients unit by unit, in one pass over all parameters.

    Per parameter, as `agc_` followed by `torch.optim.SGD`, and as the authors' optimizer of this name
    (deepmind-research, nfnets/optim.py), decay after clipping (Brock et al. 2021b, section 4.1, equation 3):

        d = clip(grad) + weight_decay * w
        m = momentum * m + (1 - dampening) * d                     (at the first step m = d)
        w = w - lr * (d + momentum * m if nesterov else m)
        ema = ema_decay * ema + (1 - ema_decay) * w

    The gradient is read, not written: after the step `.grad` is what backward() left. Arithmetic is in float32 (float64
    for float64); momentum has the parameter's dtype. 20 bytes of memory traffic per float32 parameter, 28 with ema.

    A `torch.amp.GradScaler` may leave gradients scaled: the same pass unscales them, and skips a step with infinities
    without waiting for the device. Parameters may be DTensors; a step is then a collective call.

    Args:
        params: parameters, named parameters, or groups of them, such as `optim.param_groups` makes.
        lr: learning rate, a number or a tensor of one element, which is read where the step runs.
        momentum, dampening, weight_decay, nesterov: as in `torch.optim.SGD`.
        clip_factor: largest ratio of gradient norm to parameter norm; None for a group that is not clipped.
        eps: lower bound of the parameter norm.
        rule: what a unit is, "timm" or "deepmind"; see `nfnets_kernels.agc_`.
        capturable: for steps in CUDA graphs: keeps lr in a tensor on the parameters' device, which schedulers fill.
        ema_decay: keeps a moving average of every parameter, as timm's ModelEmaV2 of a model without buffers; see
            `averaged_parameters`. It starts with the parameters as they are at their first step. float32 for 16-bit
            parameters.
        maximize: ascend instead.
        differentiable: only False: the step is not.
        backend: "auto", or a name that must serve or raise.
        statistics: count for every unit how often it was clipped, for `stats()`.

    All of lr to eps, ema_decay and maximize can differ between groups and be changed between steps.

    Raises:
        TypeError: an option of another type; parameters of FullyShardedDataParallel (FSDP1), which has no units.
        ValueError: an option that is negative or not finite, nesterov without momentum or with dampening,
            differentiable.
    """

    _step_supports_amp_scaling = True  # a GradScaler then leaves unscaling to step()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 2e-5,
        nesterov: bool = True,
        *,
        clip_factor: float | None = 0.01,
        eps: float = 1e-3,
        rule: str = "timm",
        capturable: bool = False,
        ema_decay: float | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        backend: str = "auto",
        statistics: bool = False,
    ) -> None:
        check_choice("rule", rule, ops.agc.RULES)
        check_choice("backend", backend, ops.sgd_agc.backends.BACKENDS)
        if differentiable:
            raise ValueError("differentiable must be False: the step writes in place; use agc_ and torch.optim.SGD")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "clip_factor": clip_factor,
            "eps": eps,
            "rule": rule,
            "capturable": capturable,
            "ema_decay": ema_decay,
            "maximize": maximize,
            "differentiable": False,
            "backend": backend,
            "statistics": statistics,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the group may have hyperparameters of its own."""
        super().add_param_group(param_group)
        try:
            self._prepare_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _prepare_group(self, group: dict[str, Any]) -> None:
        for name in _OF_ALL_GROUPS:
            if group[name] != self.defaults[name]:
                raise ValueError(f"{name} must be {self.defaults[name]!r} as in all groups, got {group[name]!r}")
        lr = group["lr"]
        if not isinstance(lr, (Tensor, Real)):
            raise TypeError(f"lr must be a number or a tensor, got {type(lr).__name__}")
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must have one element, got a tensor of shape {tuple(lr.shape)}")
        ops.sgd_agc.check_hyperparameters(hyperparameters(group, float(lr)))
        reject_flat_parameters(group["params"])
        if group["capturable"] and group["params"]:
            group["lr"] = torch.as_tensor(lr, dtype=torch.float32, device=group["params"][0].device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the parameters that have a gradient.

        Args:
            closure: evaluates the model, calls backward() and returns the loss, which is then returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._step_traced()
        elif not self._step_again():
            self._step_checked()
        return loss

    def _step_again(self) -> bool:
        """A step with what the last one collected; False, with nothing done, where something has changed."""
        memory: Memory | None = self.__dict__.get("_memory")
        if memory is None or memory.kinds != self._kinds():
            return False
        if not same_objects(memory.of_parameters, self.state.values()):
            return False
        options = self.defaults["rule"], self.defaults["backend"]
        return memory.repeat.step_(self._parameters(), memory.states_now(), self._call(), *options)

    def _step_checked(self) -> None:
        """A step that takes nothing for granted, and leaves what serves the next ones."""
        self._memory = None
        call = self._call()
        spread: set[Tensor] = set()
        if any(is_sharded(parameter) for parameter in self._parameters()):
            call = self._unscaled(call)
            spread = self._clip_spread()
        plan = Plan(call)
        for i, group in enumerate(self.param_groups):
            new = self._without_momentum(group)
            columns: tuple[list[Any], ...] = ([], [], [], [], [])
            self._init_group(group, *columns)
            for j, parameter in enumerate(columns[0]):
                variant = plan.variant(i, first=parameter in new, clipped=parameter not in spread)
                plan.add([column[j] if column else None for column in columns], variant)
        rule, backend = self.defaults["rule"], self.defaults["backend"]
        ops.sgd_agc.step_(plan.tensors, plan.call, rule, backend)
        if not plan.has_variants:
            repeat = ops.sgd_agc.repeat_for(self._parameters(), plan.tensors, rule, backend)
            self._memory = repeat and Memory(repeat, self._kinds(), *plan.states_in(self.state))

    def _step_traced(self) -> None:
        """A step under torch.compile: an op per group."""
        call = self._call()
        for group, hyper, lr in zip(self.param_groups, call.hypers, call.lrs, strict=True):
            if group["dampening"] != 0:
                raise ValueError(
                    f"dampening must be 0 under torch.compile, got {group['dampening']}: a first step, which ignores "
                    "it, would be compiled for all steps"
                )
            columns: tuple[list[Any], ...] = ([], [], [], [], [])
            self._init_group(group, *columns)
            if columns[0]:
                scalars = lr, call.grad_scale, call.found_inf
                ops.sgd_agc.sgd_agc_(*columns, *scalars, *hyper, self.defaults["rule"], self.defaults["backend"])

    def _init_group(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        grads: list[Tensor],
        momentum_buffers: list[Tensor],
        averages: list[Tensor],
        statistics: list[Tensor],
    ) -> None:
        """Fills the lists for the parameters with a gradient, those of states that the group does not have stay empty.

        The signature is torch's: torch.compile runs the method once, outside of the graph.
        """
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            parameters.append(parameter)
            grads.append(parameter.grad)
            if group["momentum"] != 0:
                momentum_buffers.append(self._state(parameter, "momentum_buffer", parameter.dtype))
            if group["ema_decay"] is not None:
                averages.append(self._state(parameter, "ema", accumulation_dtype(parameter.dtype)))
            if self.defaults["statistics"] and group["clip_factor"] is not None:
                statistics.append(self._counts.of(parameter, self.defaults["rule"]))

    def _state(self, parameter: Tensor, key: str, dtype: torch.dtype) -> Tensor:
        """A state as the step needs it: new where there is none, moved where the parameter has moved."""
        states = self.state[parameter]
        state = states.get(key)
        if state is None:
            source = torch.zeros_like(parameter) if key == "momentum_buffer" else parameter.detach().clone()
            states[key] = source.to(dtype)
        elif (state.dtype, state.device) != (dtype, parameter.device) or not _lies_as(state, parameter):
            states[key] = torch.empty_like(parameter, dtype=dtype).copy_(state)
        return states[key]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _kinds(self) -> list[tuple[Any, ...]]:
        """What the tables of a step depend on, beside tensors."""
        return [
            (len(group["params"]), group["momentum"] != 0, group["ema_decay"] is None, group["clip_factor"] is None)
            for group in self.param_groups
        ]

    def _call(self) -> Call:
        """The hyperparameters of the groups as they are now; a tensor on a device is left for the kernel to read."""
        hypers, lrs = [], []
        for group in self.param_groups:
            lr = group["lr"]
            on_device = isinstance(lr, Tensor) and (lr.device.type != "cpu" or torch.compiler.is_compiling())
            hyper = hyperparameters(group, 1.0 if on_device else float(lr))
            if not torch.compiler.is_compiling():
                ops.sgd_agc.check_hyperparameters(hyper)
            hypers.append(hyper)
            lrs.append(lr if on_device else None)
        return Call(hypers, lrs, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _without_momentum(self, group: dict[str, Any]) -> set[Tensor]:
        """Those for which the first step ignores dampening."""
        if group["momentum"] == 0 or group["dampening"] == 0:
            return set()
        return {parameter for parameter in group["params"] if self.state[parameter].get("momentum_buffer") is None}

    def _unscaled(self, call: Call) -> Call:
        """The same without a loss scale, by which the gradients have been divided."""
        if call.grad_scale is None:
            return call
        unscale_(self._parameters(), call.grad_scale)
        return call._replace(grad_scale=None)

    def _clip_spread(self) -> set[Tensor]:
        """Clips the gradients of DTensors whose units are spread over ranks, and tells which these are."""
        by_factor: dict[tuple[float, float], list[Tensor]] = {}
        for group in self.param_groups:
            if group["clip_factor"] is not None:
                by_factor.setdefault((group["clip_factor"], group["eps"]), []).extend(group["params"])
        spread: set[Tensor] = set()
        for (clip_factor, eps), parameters in by_factor.items():
            _, of_factor = split(parameters, self.defaults["rule"])
            counts = partial(self._counts.of, rule=self.defaults["rule"]) if self.defaults["statistics"] else None
            clip_spread_(of_factor, clip_factor, eps, 2.0, self.defaults["rule"], counts)
            spread.update(of_factor)
        return spread

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Inside the `with` block, parameters have their moving averages' values; for evaluation, not for steps.

        Parameters that have not taken a step yet keep their values. Needs as much memory again as the parameters.

        Raises:
            ValueError: no group has an ema_decay.
        """
        if all(group["ema_decay"] is None for group in self.param_groups):
            raise ValueError("ema_decay must be given for parameters to have averages, got None in all groups")
        pairs = [(p, self.state[p]["ema"]) for p in self._parameters() if self.state[p].get("ema") is not None]
        parameters = [parameter.detach() for parameter, _ in pairs]
        with torch.no_grad():
            current = [parameter.clone() for parameter in parameters]
            _copy(parameters, [average for _, average in pairs])
        try:
            yield
        finally:
            with torch.no_grad():
                _copy(parameters, current)

    @property
    def _counts(self) -> UnitCounts:
        return self.__dict__.setdefault("_unit_counts", UnitCounts())

    def stats(self) -> ClippingStatistics:
        """What has been clipped since construction or `reset_stats()`; see `AGC.stats`.

        Raises:
            RuntimeError: nothing was counted: statistics=True was not given.
        """
        if not self.defaults["statistics"]:
            raise RuntimeError("nothing was counted: SGD_AGC was made without statistics=True")
        return self._counts.read(named_parameters(self))

    def reset_stats(self) -> None:
        """Starts counting anew."""
        self._counts.reset()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; also what a `torch.optim.SGD` has saved.

        Of a group, options that were not saved (a clip_factor, by SGD) stay as they are; so do rule, backend and
        statistics.
        """
        kept = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, before in zip(self.param_groups, kept, strict=True):
            for key, value in before.items():
                group.setdefault(key, value)
            group.update({key: self.defaults[key] for key in _OF_ALL_GROUPS})
            self._prepare_group(group)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(saved, self._parameters(), strict=True):
            average = state_dict["state"].get(index, {}).get("ema")
            if average is not None:  # which has been rounded to the dtype of the parameter
                self.state[parameter]["ema"] = average.to(parameter.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_unit_counts": self._counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._memory = None
        super().__setstate__(state)


def _lies_as(state: Tensor, parameter: Tensor) -> bool:
    """Whether a kernel takes both as they lie, as far as the state can be blamed."""
    return same_order(state, parameter) or not is_unit_dense(parameter)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Raises the versions of the targets, as caches of standardized weights need it."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
