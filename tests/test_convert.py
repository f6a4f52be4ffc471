"""`convert_conv2d`: which convolutions of a network are standardized, what they keep, and what they compute then."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

from nfnets_kernels import WSConv2d
from nfnets_kernels.modules.convert import convert_conv2d

from .module_helpers import assert_results, float64_parameters, on_one_thread, perturb, results, standardized

one_thread = pytest.fixture(on_one_thread, autouse=True)


class OwnConv(nn.Conv2d):
    pass


def network() -> nn.Sequential:
    """Convolutions of many arguments, one inside a block, and layers that stay."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=(2, 1), padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=2, bias=False), nn.ReLU()),
        nn.Conv2d(8, 8, (1, 2), padding="valid"),
        OwnConv(8, 4, 1),
        nn.Flatten(),
    )


def converted_names(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, WSConv2d)]


@pytest.mark.parametrize("options", [{}, {"gamma": 1.7, "eps": 1e-2, "eps_form": "add"}], ids=["default", "options"])
@pytest.mark.parametrize("gain", [False, True], ids=["no gain", "gain"])
def test_network_computes_with_standardized_weights(options, gain):
    plain = perturb(network()).eval()  # in train mode, BatchNorm leaves the bias before it without a gradient
    module = perturb(convert_conv2d(copy.deepcopy(plain), gain=gain, **options))
    parameters, x = float64_parameters(module), torch.randn(2, 3, 9, 8)

    def standardize_then_run(x: Tensor) -> Tensor:
        gains = {name.removesuffix("gain"): parameters[name] for name in parameters if name.endswith("gain")}
        assert (len(gains) == 3) == gain
        weights = {}
        for layer in ("0.", "2.0.", "3."):
            weights[f"{layer}weight"] = standardized(parameters[f"{layer}weight"], gains.get(layer), **options)
        return functional_call(copy.deepcopy(plain).double(), {**parameters, **weights}, x)

    assert_results(results(module, module, x), results(standardize_then_run, parameters, x.double()), layers=10)


def test_converts_plain_convolutions_alone_and_keeps_what_they_are():
    module = network()
    module[3].weight.requires_grad_(False)
    module[2].eval()
    modules, parameters = dict(module.named_modules()), dict(module.named_parameters())
    assert convert_conv2d(module) is module
    assert converted_names(module) == ["0", "2.0", "3"]
    assert dict(module.named_modules()) == modules
    assert [part.training for part in module.modules()] == [part.training for part in modules.values()]
    for name, parameter in module.named_parameters():
        assert name.endswith("gain") or parameter is parameters[name]
    assert [module[i].gain.requires_grad for i in (0, 3)] == [True, False]
    assert module[0].padding == (2, 1) and module[2][0].padding == "same"
    loaded = pickle.loads(pickle.dumps(module))
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(loaded.eval()(x), module.eval()(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="choose none of the 0"):
        convert_conv2d(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gain_has_dtype_and_device_of_the_weight(dtype):
    conv = convert_conv2d(nn.Conv2d(4, 6, 3, dtype=dtype))
    assert type(conv) is WSConv2d and conv.gain.dtype == dtype
    torch.testing.assert_close(conv.gain.detach(), torch.ones(6, dtype=dtype), rtol=0, atol=0)
    assert convert_conv2d(nn.Conv2d(4, 6, 3, device="meta")).gain.is_meta
    assert convert_conv2d(nn.Conv2d(4, 6, 3), gain=False).gain is None


def test_hooks_and_an_optimizer_go_on():
    conv = nn.Conv2d(4, 6, 3)
    calls = []
    conv.register_forward_hook(lambda *_: calls.append("forward"))
    conv.weight.register_hook(lambda _: calls.append("backward"))
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9)
    before = conv.weight.detach().clone()
    convert_conv2d(conv)(torch.randn(2, 4, 5, 5)).square().sum().backward()
    optimizer.step()
    assert calls == ["forward", "backward"]
    assert (conv.weight != before).any()


def test_shared_module_and_tied_weights():
    module = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "tied": nn.Conv2d(4, 4, 3)})
    module["again"] = module["a"]
    module["tied"].weight = module["a"].weight
    convert_conv2d(module)
    assert module["again"] is module["a"]
    assert module["tied"].weight is module["a"].weight
    assert module["tied"].gain is not module["a"].gain
    assert sorted(name for name, _ in module.named_parameters()) == ["a.bias", "a.gain", "a.weight", "tied.bias",
                                                                     "tied.gain"]  # fmt: skip


SELECTIONS = {
    "one pattern": ({"include": "2.*"}, ["2.0"]),
    "character class": ({"include": "[03]"}, ["0", "3"]),
    "patterns": ({"include": ["3", "no such"]}, ["3"]),
    "predicate": ({"include": lambda name, conv: conv.groups > 1}, ["2.0"]),
    "exclude": ({"exclude": ("0", "2.*")}, ["3"]),
    "both": ({"include": "[03]", "exclude": lambda name, conv: name == "0"}, ["3"]),
}


@pytest.mark.parametrize("arguments, names", SELECTIONS.values(), ids=SELECTIONS)
def test_selection(arguments, names):
    assert converted_names(convert_conv2d(network(), **arguments)) == names


def test_any_name_of_a_shared_module_selects_it():
    shared = nn.Conv2d(4, 4, 3)
    module = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Conv2d(4, 4, 3)})
    with pytest.raises(ValueError, match=r"include='b'.*exclude='a'.*none of the 2 nn.Conv2d in ModuleDict"):
        convert_conv2d(module, "b", "a")
    assert converted_names(convert_conv2d(module, "b")) == ["a"]


def with_own_forward() -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = lambda x: x
    return conv


REFUSED = {
    "fan-in 1": (lambda: nn.Conv2d(4, 4, 1, groups=4), "bad.*fan_in of 1"),
    "lazy": (lambda: nn.LazyConv2d(4, 3), "bad is a LazyConv2d.*run the network once"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "bad has no weight of its own"),
    "pruned": (lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5), "bad has no weight of its own"),
    "own forward": (with_own_forward, "bad has a forward"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_refuses_what_cannot_be_standardized_and_changes_nothing(make, message):
    module = nn.ModuleDict({"good": nn.Conv2d(4, 4, 3), "bad": make()})
    with pytest.raises(ValueError, match=message):
        convert_conv2d(module)
    assert converted_names(module) == []
    assert converted_names(convert_conv2d(module, exclude="bad")) == ["good"]


def test_parametrized_standardized_convolution_is_left_alone():
    module = nn.Sequential(parametrizations.weight_norm(WSConv2d(4, 4, 3)), nn.Conv2d(4, 4, 3))
    names = set(dict(module.named_parameters()))
    convert_conv2d(module)
    assert set(dict(module.named_parameters())) - names == {"1.gain"}


BAD_ARGUMENTS = {
    "module": (TypeError, lambda: convert_conv2d([nn.Conv2d(4, 4, 3)]), "module must be an nn.Module, got list"),
    "include": (TypeError, lambda: convert_conv2d(network(), 3), "include must be a name pattern.*got 3"),
    "exclude": (TypeError, lambda: convert_conv2d(network(), exclude=["0", 1]), "exclude must be a name pattern"),
    "gain": (TypeError, lambda: convert_conv2d(network(), gain=1.0), "gain must be a bool, got 1.0"),
    "gamma": (ValueError, lambda: convert_conv2d(network(), gamma=float("nan")), "gamma must be finite"),
    "eps": (ValueError, lambda: convert_conv2d(network(), eps=-1.0), "eps must be finite and not negative"),
    "eps_form": (ValueError, lambda: convert_conv2d(network(), eps_form="max"), "eps_form must be one of"),
    "dtype": (TypeError, lambda: convert_conv2d(nn.Conv2d(4, 4, 3, dtype=torch.cfloat)), "module: .*complex64"),
    "nothing there": (ValueError, lambda: convert_conv2d(nn.ReLU()), "none of the 0 nn.Conv2d in ReLU"),
}


@pytest.mark.parametrize("error, call, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(error, call, message):
    with pytest.raises(error, match=message):
        call()
