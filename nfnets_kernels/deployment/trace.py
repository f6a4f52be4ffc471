"""A network as a `torch.fx.GraphModule` of plain torch layers and functions."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ..modules.standardized import Prepared, Standardized
from .layers import bake, pad_same, plain_layer
from .plain_ops import SPACE, traceable_ops

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


class LayerCall(NamedTuple):
    """A standardized layer with what its forward pass folds into it, and the padding that takes the place of SAME."""

    layer: Standardized
    skip_gain: Tensor | None
    alpha: float
    prepared: Prepared | None
    padding: tuple[int, ...] | None

    def bake(self) -> nn.Module:
        """The plain layer; after tracing, during which parametrizations do not compute."""
        prepared = bake(self.layer, self.skip_gain, self.alpha) if self.prepared is None else self.prepared
        return plain_layer(self.layer, prepared, **({} if self.padding is None else {"padding": self.padding}))


class FoldingTracer(fx.Tracer):
    """Records a network in eval mode, and the name of each plain layer that is to be made: `targets`."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: dict[LayerCall, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own modules, but those that hold standardized layers."""
        leaf = super().is_leaf_module(m, module_qualified_name)
        return leaf and not any(isinstance(part, Standardized) for part in m.modules())

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Parameters are constants: what is computed from them alone is computed now."""
        return attr_val

    def iter(self, obj: Any) -> Iterator[Any]:
        """Lets code go over `x.shape[-2:]`, whose length is known although the shape is not."""
        node = obj.node
        if node.target is operator.getitem and _is_shape(node.args[0]):
            match node.args[1]:
                case slice(start=int(start), stop=None, step=None) if start < 0:
                    return (obj[index] for index in range(-start))
        return super().iter(obj)

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict[str, Any], *rest: Any, **options: Any):
        """Leaves out dropout that does nothing, and optional arguments of the network, which keep their defaults."""
        if kind == "call_function" and target in DROPOUTS and not kwargs.get("training", True):
            return args[0]
        if kind == "placeholder" and args:
            return args[0]
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Folds standardized layers; the rest as torch.fx."""
        if isinstance(m, Standardized):
            return self._call_standardized(m, *args, **kwargs)
        if isinstance(m, _DropoutNd):
            return args[0]
        return super().call_module(m, forward, args, kwargs)

    def _call_standardized(
        self,
        layer: Standardized,
        input: Any,
        *args: Any,
        skip_gain: Any = None,
        alpha: float = 1.0,
        prepared: Any = None,
        **kwargs: Any,
    ) -> fx.Proxy:
        constant_gain = None if isinstance(skip_gain, fx.Proxy) else skip_gain
        padding = None
        if getattr(layer, "_same", False):
            input, padding = pad_same(input, layer)
        call = LayerCall(layer, constant_gain, alpha, prepared, padding)
        out = self.create_proxy("call_module", self._target(call), (input, *args), kwargs)
        out.node.meta[SPACE] = len(getattr(layer, "kernel_size", (0, 0)))
        return out if constant_gain is skip_gain else out * skip_gain

    def _target(self, call: LayerCall) -> str:
        """The layer's own name, with a number from the second set of factors on."""
        if call not in self.targets:
            path = self.path_of_module(call.layer)
            names = itertools.chain([path], (f"{path}__{count}" for count in itertools.count(1)))
            self.targets[call] = next(name for name in names if name not in self.targets.values())
        return self.targets[call]


def _is_shape(node: Any) -> bool:
    return node.target == "size" or (node.target is getattr and node.args[1] == "shape")


def _add_out_of_place(graph: fx.Graph, layers: Container[str]) -> None:
    """An addition into a layer's output that nothing else reads: quantizers know the plain one."""
    for node in graph.nodes:
        if node.op != "call_method" or node.target != "add_" or len(node.args) != 2 or node.kwargs:
            continue
        output = node.args[0]
        if output.op == "call_module" and output.target in layers and list(output.users) == [node]:
            node.op, node.target = "call_function", operator.add


def trace(model: nn.Module) -> nn.Module:
    """The network in eval mode as a graph of plain layers and functions; `model` itself is used up.

    Raises:
        Exception: whatever the network's code raises for torch.fx's proxies.
    """
    root = nn.Sequential(model) if isinstance(model, Standardized) else model
    tracer = FoldingTracer()
    with torch.no_grad(), traceable_ops():
        traced = tracer.trace(root)
        layers = {target: call.bake() for call, target in tracer.targets.items()}
    _add_out_of_place(traced, layers)
    if root is not model and len(traced.nodes) == 3:  # input, layer, output
        return layers["0"]
    graph = fx.Graph()  # a copy, since `traced` refers to our tracer's class, also when pickled
    graph.output(graph.graph_copy(traced, {}))
    for node in graph.nodes:
        node.type = None  # annotations may name what only the network's module imports
    targets = [node.target for node in graph.nodes if node.op in ("call_module", "get_attr")]
    parts = {target: layers.get(target) or operator.attrgetter(target)(root) for target in targets}
    return fx.GraphModule(parts, graph, type(model).__name__).eval()
