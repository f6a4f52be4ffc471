"""What the tests of modules and models share: the layers, the plain formulas in float64, and gradients by name."""

from collections.abc import Callable, Iterator, Mapping

import timm.layers as timm_layers
import torch
import torch.nn.functional as F
from timm.layers.padding import get_same_padding, pad_same
from torch import Tensor, nn
from torch.func import functional_call

import nfnets_kernels as nfk

from .helpers import threads
from .tolerances import assert_accurate

# Module, torch's layer, its arguments, input shape.
LAYERS: dict[str, tuple[type, type, tuple[int, ...], tuple[int, ...]]] = {
    "WSConv1d": (nfk.WSConv1d, nn.Conv1d, (4, 6, 3), (2, 4, 9)),
    "WSConv2d": (nfk.WSConv2d, nn.Conv2d, (4, 6, 3), (2, 4, 9, 8)),
    "WSConv3d": (nfk.WSConv3d, nn.Conv3d, (4, 6, 3), (2, 4, 5, 4, 6)),
    "WSConvTranspose2d": (nfk.WSConvTranspose2d, nn.ConvTranspose2d, (4, 6, 3), (2, 4, 5, 6)),
    "WSLinear": (nfk.WSLinear, nn.Linear, (5, 7), (3, 5)),
    "ScaledStdConv2d": (nfk.ScaledStdConv2d, nn.Conv2d, (4, 6, 3), (2, 4, 9, 8)),
    "StdConv2d": (nfk.StdConv2d, nn.Conv2d, (4, 6, 3), (2, 4, 9, 8)),
}
TIMM = {"ScaledStdConv2d": timm_layers.ScaledStdConv2d, "StdConv2d": timm_layers.StdConv2d}
GAINS = {"relu": 1.7139588594436646, "gelu": 1.7015043497085571, "silu": 1.7881293296813965}
FUNCTIONS = {"relu": torch.relu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


def standardized(
    weight: Tensor, gain: Tensor | None = None, *, gamma: float = 1.0, eps: float = 1e-4, eps_form: str = "clamp"
) -> Tensor:
    """Brock et al. 2021a, equation 1, written out; units are dim 0."""
    dims = tuple(range(1, weight.ndim))
    fan_in = weight[0].numel()
    variance = weight.var(dims, correction=0, keepdim=True)
    squared = (fan_in * variance).clamp(min=eps) if eps_form == "clamp" else fan_in * (variance + eps)
    out = gamma * (weight - weight.mean(dims, keepdim=True)) / squared.sqrt()
    return out if gain is None else out * gain.reshape(-1, *(1 for _ in dims))


def on_one_thread() -> Iterator[None]:
    """A fixture for small tensors, where threads would only wait for each other; the tests of the ops have many."""
    with threads(1):
        yield


def weight_of(**options) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """`standardized` of a layer's parameters."""
    return lambda parameters: standardized(parameters["weight"], parameters.get("gain"), **options)


def standardized_transposed(weight: Tensor, gain: Tensor, groups: int) -> Tensor:
    """The same for a transposed convolution's (in, out / groups, ...), group by group; units are outputs."""
    pairs = zip(weight.chunk(groups), gain.chunk(groups), strict=True)
    return torch.cat([standardized(part.transpose(0, 1), part_gain).transpose(0, 1) for part, part_gain in pairs])


def float64_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Leaves with the values of the module's parameters."""
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def small_integers(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Values that every dtype represents, without a simple pattern."""
    return ((torch.arange(shape.numel()) * 37 % 101) % 7 - 3).to(dtype).view(shape)


def results(
    function: Callable[..., Tensor], parameters: Mapping[str, Tensor] | nn.Module, x: Tensor
) -> dict[str, Tensor]:
    """function(x), and for a fixed cotangent the gradients of x and of the parameters that require one."""
    named = dict(parameters.named_parameters()) if isinstance(parameters, nn.Module) else dict(parameters)
    named = {name: p for name, p in named.items() if p.requires_grad}
    x = x.detach().requires_grad_()
    out = function(x)
    grads = torch.autograd.grad(out, [x, *named.values()], small_integers(out.shape, out.dtype))
    return {"output": out.detach(), "input": grads[0], **dict(zip(named, grads[1:], strict=True))}


def assert_results(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], layers: int = 1) -> None:
    """`assert_accurate` for what `results` returns; no sum in a layer is longer than all outputs and inputs.

    layers: how many layers a signal passes forth and back, each of which adds its own error.
    """
    assert actual.keys() == expected.keys()
    terms = actual["output"].numel() + actual["input"].numel()
    for name, value in actual.items():
        assert torch.isfinite(value).all(), name
        reference = expected[name].reshape(value.shape)
        try:
            assert_accurate(value, reference, unit_length=terms, magnitude=layers * reference.abs().max())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def assert_is_layer(
    module: nn.Module,
    layer: nn.Module,
    weight: Callable[[dict[str, Tensor]], Tensor],
    x: Tensor,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
    **options,
) -> None:
    """module(x) and its gradients are those of torch's layer in float64 with weight(parameters) and the same bias.

    Args:
        module: to be tested, in the dtype of x.
        layer: torch's, whose own parameters do not matter.
        weight: the layer's weight from the module's parameters.
        x: input.
        prepare: what happens to the layer's input before, such as padding.
        options: of both forwards.
    """
    parameters = float64_parameters(module)

    def plain(x: Tensor) -> Tensor:
        replaced = {"weight": weight(parameters)}
        if "bias" in parameters:
            replaced["bias"] = parameters["bias"]
        return functional_call(layer, replaced, (prepare(x),), options)

    assert_results(results(lambda x: module(x, **options), module, x), results(plain, parameters, x.double()))


def check_conv(ours: type, torchs: type, x: Tensor, *arguments, dtype: torch.dtype = torch.float32, **keywords) -> None:
    """`assert_is_layer` for a convolution made with the arguments that torch's takes too."""
    module = perturb(ours(*arguments, **keywords, dtype=dtype))
    assert_is_layer(module, torchs(*arguments, **keywords), weight_of(), x.to(dtype))


def check_same(ours: type, torchs: type, x: Tensor, *arguments, mode: str = "zeros", **keywords) -> None:
    """padding="SAME" is timm's padding before an unpadded layer."""
    layer = torchs(*arguments, **keywords)
    sizes = x.shape[-len(layer.kernel_size) :]
    options = zip(sizes, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    totals = [get_same_padding(*one) for one in options]
    pads = [pad for total in reversed(totals) for pad in (total // 2, total - total // 2)]
    fill = "constant" if mode == "zeros" else mode
    module = perturb(ours(*arguments, padding="SAME", padding_mode=mode, **keywords))
    assert_is_layer(module, layer, weight_of(), x, lambda x: F.pad(x, pads, mode=fill))


def check_timm(ours: nn.Module, theirs: nn.Module, size: tuple[int, int] = (9, 8)) -> None:
    """Equal values and gradients, with state_dicts that load both ways."""
    perturb(theirs).double()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, *size, dtype=ours.weight.dtype)
    assert_results(results(ours, ours, x), results(theirs, theirs, x.double()))


def make_layer(name: str) -> tuple[nn.Module, Tensor]:
    """A layer of LAYERS with every parameter off its initial value, and an input."""
    ours, _, arguments, shape = LAYERS[name]
    return perturb(ours(*arguments)), torch.randn(shape)


def perturb(module: nn.Module) -> nn.Module:
    """Moves every parameter off its initial value, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def standardizations(function: Callable[..., object], *args: object) -> int:
    """How often the function standardizes weights."""
    with nfk.backend.recording() as calls:
        function(*args)
    return sum(op == "weight_standardize" for op, _ in calls)


def make_eval_conv() -> nn.Module:
    """A convolution in eval mode that has what its owner would fold into it."""
    conv = nfk.WSConv2d(4, 6, 3)
    conv.skip_gain = nn.Parameter(torch.tensor(0.5))
    conv.alpha = 0.2
    return perturb(conv).eval()


def forward_folded(conv: nn.Module, x: Tensor) -> Tensor:
    """The output of `make_eval_conv`'s, from a cached weight only without grad."""
    return conv(x, skip_gain=conv.skip_gain, alpha=conv.alpha).detach()


def _step(optimizer: type[torch.optim.Optimizer], conv: nn.Module, **options) -> None:
    for parameter in conv.parameters():
        parameter.grad = torch.ones_like(parameter).cumsum(-1)
    optimizer(conv.parameters(), lr=0.1, **options).step()


def _try_for_the_old_address(conv: nn.Module) -> None:
    """New data until it lies where the old did, which a cache that keeps the old data prevents."""
    address = conv.weight.data_ptr()
    for _ in range(1000):
        conv.weight.data = torch.randn(6, 4, 3, 3)
        if conv.weight.data_ptr() == address:
            return


# What a cached weight of `make_eval_conv` must not survive.
CACHE_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight": lambda conv: conv.weight.mul_(torch.linspace(0.5, 2, 3)),
    "gain": lambda conv: conv.gain.add_(1),
    "bias": lambda conv: conv.bias.add_(1),
    "skip gain": lambda conv: conv.skip_gain.add_(1),
    "new skip gain": lambda conv: setattr(conv, "skip_gain", nn.Parameter(torch.tensor(0.9))),
    "load_state_dict": lambda conv: conv.load_state_dict(make_eval_conv().state_dict()),
    "load_state_dict(assign=True)": lambda conv: conv.load_state_dict(make_eval_conv().state_dict(), assign=True),
    "new data": lambda conv: setattr(conv.weight, "data", torch.randn(6, 4, 3, 3)),
    "new data at the old address": _try_for_the_old_address,
    "alpha": lambda conv: setattr(conv, "alpha", 0.3),
    "other view of the data": lambda conv: setattr(conv.weight, "data", conv.weight.data.transpose(2, 3)),
    "data in place, in train mode": lambda conv: (conv.train(), conv.weight.data.mul_(torch.rand(3)), conv.eval()),
    "new parameter": lambda conv: setattr(conv, "weight", nn.Parameter(torch.randn(6, 4, 3, 3))),
    "SGD": lambda conv: _step(torch.optim.SGD, conv),
    "SGD(foreach=True)": lambda conv: _step(torch.optim.SGD, conv, foreach=True),
    "AdamW(fused=True)": lambda conv: _step(torch.optim.AdamW, conv, fused=True),
    "reset_parameters": lambda conv: conv.reset_parameters(),
    "gamma": lambda conv: setattr(conv, "gamma", 2.0),
    "no gain": lambda conv: setattr(conv, "gain", None),
}


def authors_nf_resnet(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    depth: tuple[int, ...],
    *,
    alpha: float = 0.2,
    activation: str = "relu",
    pool_shortcut: bool = False,
) -> dict[str, Tensor]:
    """The authors' forward pass (nfnets/nf_resnet.py) with nothing folded or fused: logits, pool and signal metrics."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = standardized(parameters[f"{name}.weight"], parameters[f"{name}.gain"])
        x = pad_same(x, weight.shape[-2:], (stride, stride))
        return F.conv2d(x, weight, parameters[f"{name}.bias"], stride)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ parameters[f"{name}.weight"].t() + parameters[f"{name}.bias"]

    def act(x: Tensor) -> Tensor:
        return GAINS[activation] * FUNCTIONS[activation](x)

    def variance(x: Tensor) -> Tensor:
        return x.var(dim=(0, 2, 3), correction=0).mean()

    def metrics(h: Tensor, index: int) -> dict[str, Tensor]:
        return {f"avg_var_{index}": variance(h), f"avg_sq_mean_{index}": h.mean(dim=(0, 2, 3)).square().mean()}

    def block(name: str, h: Tensor, stride: int, beta: float) -> tuple[Tensor, Tensor]:
        out = beta * act(h)
        shortcut = h
        if f"{name}.conv_shortcut.weight" in parameters:
            pools = pool_shortcut and stride > 1
            pooled = F.avg_pool2d(out, 2, 2, ceil_mode=True, count_include_pad=False) if pools else out
            shortcut = conv(f"{name}.conv_shortcut", pooled, 1 if pools else stride)
        out = conv(f"{name}.conv0", out)
        out = conv(f"{name}.conv1", act(out), stride)
        out = conv(f"{name}.conv2", act(out))
        if f"{name}.se.fc0.weight" in parameters:
            hidden = torch.relu(linear(f"{name}.se.fc0", out.mean(dim=(2, 3))))
            out = 2 * torch.sigmoid(linear(f"{name}.se.fc1", hidden))[:, :, None, None] * out
        return out * parameters[f"{name}.skip_gain"] * alpha + shortcut, variance(out)

    h = conv("initial_conv", x, 2)
    h = F.max_pool2d(pad_same(h, (3, 3), (2, 2), value=-float("inf")), 3, 2)
    outputs = metrics(h, 0)
    index, expected_std = 0, 1.0
    for stage, blocks in enumerate(depth):
        for position in range(blocks):
            stride = 2 if stage > 0 and position == 0 else 1
            h, branch_variance = block(f"blocks.{index}", h, stride, 1 / expected_std)
            outputs |= {**metrics(h, index + 1), f"res_avg_var_{index}": branch_variance}
            expected_std = 1.0 if position == 0 else expected_std
            expected_std = (expected_std**2 + alpha**2) ** 0.5
            index += 1
    outputs["pool"] = act(h).mean(dim=(2, 3))
    outputs["logits"] = linear("fc", outputs["pool"])
    return outputs
