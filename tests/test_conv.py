"""Weight-standardized layers: the plain formula in float64, torch's and timm's layers, the eval cache, tools."""

import copy
import inspect
import math
import pickle

import pytest
import timm.layers as timm_layers
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import nfnets_kernels as nfk

from .helpers import assert_fake_is_real, assert_rounded_once, assert_same, channels_last
from .module_helpers import (
    CACHE_CHANGES,
    LAYERS,
    TIMM,
    assert_is_layer,
    assert_results,
    check_conv,
    check_same,
    check_timm,
    forward_folded,
    make_eval_conv,
    make_layer,
    on_one_thread,
    perturb,
    results,
    small_integers,
    standardizations,
    standardized_transposed,
    weight_of,
)
from .tolerances import assert_accurate

CONVS = [(nfk.WSConv1d, nn.Conv1d, (9,)), (nfk.WSConv2d, nn.Conv2d, (9, 8)), (nfk.WSConv3d, nn.Conv3d, (5, 4, 6))]
one_thread = pytest.fixture(on_one_thread, autouse=True)
each_conv = pytest.mark.parametrize(("ours", "torchs", "size"), CONVS, ids=[c[0].__name__ for c in CONVS])
each_layer = pytest.mark.parametrize("name", LAYERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@each_dtype
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same", "valid"])
@each_conv
def test_is_torchs_layer_with_the_standardized_weight(ours, torchs, size, padding, mode, dtype):
    check_conv(ours, torchs, torch.randn(2, 4, *size), 4, 6, 3, padding=padding, padding_mode=mode, dtype=dtype)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("keywords", [{}, {"bias": False}, {"stride": 2, "dilation": 2, "padding": 1}], ids=str)
@each_conv
def test_groups_bias_stride_and_dilation(ours, torchs, size, keywords, groups):
    check_conv(ours, torchs, torch.randn(2, 4, *size), 4, 8, 3, groups=groups, **keywords)


@each_conv
def test_unbatched_input(ours, torchs, size):
    check_conv(ours, torchs, torch.randn(4, *size), 4, 6, 3)
    check_same(ours, torchs, torch.randn(4, *size), 4, 6, 3, stride=2)


@pytest.mark.parametrize("weight_scale", [1.0, 1e-3])
@pytest.mark.parametrize("eps_form", ["clamp", "add"])
@pytest.mark.parametrize("gain", [True, False])
def test_gain_gamma_and_both_eps_forms(gain, eps_form, weight_scale):
    options = {"gamma": 1.7, "eps": 1e-3, "eps_form": eps_form}
    conv = perturb(nfk.WSConv2d(4, 6, 3, gain=gain, **options))
    conv.weight.data.mul_(weight_scale)
    assert {name for name, _ in conv.named_parameters()} == {"weight", "bias", "gain"} - (set() if gain else {"gain"})
    assert_is_layer(conv, nn.Conv2d(4, 6, 3), weight_of(**options), torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear(shape, bias, gain):
    linear = perturb(nfk.WSLinear(5, 7, bias, gain=gain, gamma=0.7))
    assert_is_layer(linear, nn.Linear(5, 7, bias), weight_of(gamma=0.7), torch.randn(shape))


@each_dtype
@pytest.mark.parametrize("output_size", [None, (11, 12)])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_standardizes_over_the_inputs_of_each_output(groups, output_size, dtype):
    arguments = (4, 6, 3, 2, 1, 1, groups)
    module = perturb(nfk.WSConvTranspose2d(*arguments, dtype=dtype))
    options = {} if output_size is None else {"output_size": output_size}

    def weight(parameters):
        return standardized_transposed(parameters["weight"], parameters["gain"], groups)

    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    assert_is_layer(module, nn.ConvTranspose2d(*arguments), weight, x, **options)
    assert_is_layer(module, nn.ConvTranspose2d(*arguments), weight, x[0], **options)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3, 5])
@each_conv
def test_same_padding_as_timm(ours, torchs, size, kernel, stride, dilation):
    check_same(ours, torchs, torch.randn(2, 4, *size), 4, 6, kernel, stride=stride, dilation=dilation)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@each_conv
def test_same_padding_in_other_modes(ours, torchs, size, mode):
    check_same(ours, torchs, torch.randn(2, 4, *size), 4, 6, 3, mode=mode, stride=2)


@each_dtype
@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize(
    "keywords",
    [{}, {"stride": 3}, {"kernel_size": (3, 5)}, {"dilation": 2}, {"groups": 2, "bias": False}, {"padding": "same"},
     {"padding": (2, 0), "bias": True}, {"kernel_size": (4, 1), "eps": 1e-2}],
    ids=str,
)  # fmt: skip
def test_is_timms_layer_with_its_state_dict(name, keywords, dtype):
    arguments = {"kernel_size": 3, **keywords}
    check_timm(LAYERS[name][0](4, 6, **arguments, dtype=dtype), TIMM[name](4, 6, **arguments))


@pytest.mark.parametrize("size", [(8, 7), (9, 10)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("name", TIMM)
def test_same_padding_is_timms_same_layer(name, stride, dilation, size):
    arguments = (4, 6, 3, stride, "SAME", dilation)
    check_timm(LAYERS[name][0](*arguments), getattr(timm_layers, f"{name}Same")(*arguments), size)


def test_scaled_std_conv_has_timms_gamma_and_gain_init():
    arguments = (4, 6, 3, 1, None, 1, 1, True, 1.5, 1e-5, 0.25)
    ours, theirs = nfk.ScaledStdConv2d(*arguments), timm_layers.ScaledStdConv2d(*arguments)
    assert_same(ours.gain.detach(), theirs.gain.detach())
    check_timm(ours, theirs)


def test_gains_load_in_either_shape_and_leave_the_state_dict_as_it_was():
    flat, timms = nfk.WSConv2d(4, 6, 3), nfk.ScaledStdConv2d(4, 6, 3)
    for source, target in ((flat, timms), (timms, flat)):
        state = perturb(source).state_dict()
        target.load_state_dict(state)
        assert state["gain"].shape == source.gain.shape != target.gain.shape
        assert_same(target.gain.detach().flatten(), source.gain.detach().flatten())
    with pytest.raises(RuntimeError, match="gain"):
        flat.load_state_dict({**flat.state_dict(), "gain": torch.ones(5)})


@each_layer
def test_signature_is_that_of_the_replaced_layer(name):
    ours, torchs, arguments, _ = LAYERS[name]
    signatures = [inspect.signature(cls).parameters.values() for cls in (ours, TIMM.get(name, torchs))]
    own, replaced = ([(p.name, p.default) for p in ps if p.kind != p.KEYWORD_ONLY] for ps in signatures)
    assert own == replaced
    assert isinstance(ours(*arguments), torchs)


@each_layer
def test_device_and_dtype(name):
    ours, torchs, arguments, shape = LAYERS[name]
    module = ours(*arguments, dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module(torch.randn(shape, dtype=torch.bfloat16)).dtype == torch.bfloat16
    module, layer = ours(*arguments, device="meta"), TIMM.get(name, torchs)(*arguments, device="meta")
    x = torch.empty(shape, device="meta")
    assert module(x).shape == layer(x).shape and module(x).is_meta
    module.to_empty(device="cpu").reset_parameters()
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert name == "StdConv2d" or (module.gain == 1).all()


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_skip_gain_and_alpha_scale_the_output(training, bias, gain):
    conv = perturb(nfk.WSConv2d(4, 6, 3, bias=bias, gain=gain, gamma=1.3)).train(training)
    conv.skip_gain = nn.Parameter(torch.tensor(0.7))
    plain, x = copy.deepcopy(conv).double(), torch.randn(2, 4, 7, 7)
    folded = results(lambda x: conv(x, skip_gain=conv.skip_gain, alpha=0.2), conv, x)
    scaled = results(lambda x: 0.2 * plain.skip_gain * plain(x), plain, x.double())
    assert_results(folded, scaled)
    with torch.no_grad():
        assert_accurate(conv(x, skip_gain=conv.skip_gain, alpha=0.2), scaled["output"], unit_length=x.numel())


def test_alpha_alone_scales_the_output():
    conv, x = make_layer("WSConv2d")
    assert_accurate(conv(x, alpha=0.2), 0.2 * copy.deepcopy(conv).double()(x.double()), unit_length=x.numel())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["WSConv2d", "WSConv3d", "ScaledStdConv2d", "StdConv2d", "WSConvTranspose2d"])
def test_channels_last(name, training):
    module, x = make_layer(name)
    module.train(training)
    double = copy.deepcopy(module).double()
    expected = results(double, double, x.double())
    assert_results(results(module, module, channels_last(x)), expected)
    with torch.no_grad():
        out = module(channels_last(x))
    assert_accurate(out, expected["output"], unit_length=x.numel())
    assert_same(out, channels_last(out))


@pytest.mark.parametrize("training", [True, False])
@each_layer
def test_autocast_rounds_the_standardized_weight_once(name, training):
    module, x = make_layer(name)
    module.train(training)
    with torch.no_grad():
        module.weight.mul_(0.02).add_(1.0)  # its deviations are lost in bfloat16
    double, x = copy.deepcopy(module).double(), x.bfloat16().float()
    expected, _ = double.standardized(x.double())
    fan_in = module.unit_axis_first(module.weight)[0].numel()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        weight, _ = module.standardized(x)
        out = module(x)
    assert weight.dtype == out.dtype == torch.bfloat16
    assert_rounded_once(weight, expected, expected.abs().amax() / 0.02, unit_length=fan_in, computed_in=torch.float32)
    assert_accurate(out, double(x.double()), unit_length=fan_in)


@each_layer
def test_gradients_under_autocast(name):
    module, x = make_layer(name)
    double, x = copy.deepcopy(module).double(), x.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(module, module, x)
    assert all(value.dtype == torch.float32 for name, value in actual.items() if name != "output")
    assert_results({name: value.bfloat16() for name, value in actual.items()}, results(double, double, x.double()))


@each_layer
def test_float64_stays_float64_under_autocast(name):
    module, x = (one.double() for one in make_layer(name))
    expected = results(module, module, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(module, module, x), expected)
        with torch.no_grad():
            assert_same(module.eval()(x), expected["output"])


cached = torch.no_grad()(forward_folded)


@pytest.mark.parametrize("change", CACHE_CHANGES)
def test_cache_serves_until_something_changes(change):
    conv, x = make_eval_conv(), torch.randn(2, 4, 7, 7)
    before = forward_folded(conv, x)
    assert standardizations(lambda: [assert_same(cached(conv, x), before) for _ in range(3)]) == 1
    with torch.no_grad():
        CACHE_CHANGES[change](conv)
    after = forward_folded(conv, x)
    assert not torch.allclose(before, after)
    assert standardizations(lambda: [assert_same(cached(conv, x), after) for _ in range(3)]) == 1


@torch.no_grad()
def test_cache_serves_one_dtype_and_memory_format():
    conv, x = make_eval_conv(), torch.randn(2, 4, 7, 7)
    assert standardizations(lambda: (conv(x), conv(x[:1]), conv(x.repeat(1, 1, 2, 2)))) == 1
    double = copy.deepcopy(conv).double()(x.double())
    for _ in range(2):
        assert conv.standardized(channels_last(x))[0].is_contiguous(memory_format=torch.channels_last)
        assert_accurate(conv(channels_last(x)), double, unit_length=36)
        with torch.autocast("cpu", torch.bfloat16):
            assert_accurate(conv(x), double, unit_length=36, ulps=4)
        assert_accurate(conv(x), double, unit_length=36)
    assert_same(conv.double()(x.double()), double)
    assert conv.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@each_layer
def test_no_cache_in_train_mode_or_with_grad(name):
    module, x = make_layer(name)
    assert standardizations(lambda: [module(x) for _ in range(2)]) == 2
    with torch.no_grad():
        assert standardizations(lambda: [module(x) for _ in range(2)]) == 2
    assert standardizations(lambda: [module.eval()(x) for _ in range(2)]) == 2
    with torch.no_grad():
        assert standardizations(lambda: [module(x) for _ in range(2)]) == 1
    assert module(x).requires_grad


@each_layer
def test_cache_is_no_state(name):
    module, x = make_layer(name)
    size, keys = len(pickle.dumps(module)), module.eval().state_dict().keys()
    with torch.no_grad():
        out = module(x)
        assert len(pickle.dumps(module)) == size and module.state_dict().keys() == keys
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
            assert standardizations(lambda other=other: assert_same(other(x), out)) == 1
        reloaded = LAYERS[name][0](*LAYERS[name][2]).eval()
        reloaded.load_state_dict(module.state_dict())
        assert_same(reloaded(x), out)


@pytest.mark.parametrize("modes", [(torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.no_grad)])
@each_layer
def test_inference_mode(name, modes):
    module, x = make_layer(name)
    expected = module.eval()(x)
    for mode in (*modes, *modes):
        with mode():
            assert_same(module(x), expected.detach())
    results(module, module, x)
    with torch.inference_mode():
        made_here, x = make_layer(name)
        assert_same(made_here.eval()(x), made_here.train()(x))


@torch.no_grad()
@each_layer
def test_functional_call(name):
    (module, x), (other, _) = make_layer(name), make_layer(name)
    own, others = module.eval()(x), other.eval()(x)
    for _ in range(2):
        assert_same(functional_call(module, {n: p.detach() for n, p in other.named_parameters()}, (x,)), others)
        assert_same(functional_call(module, dict(other.named_parameters()), (x,)), others)
        assert_same(module(x), own)
    names, tensors = zip(*other.named_parameters(), strict=True)
    assert_fake_is_real(lambda x, *ts: functional_call(module, dict(zip(names, ts, strict=True)), (x,)), x, *tensors)


@each_layer
def test_frozen_weight(name):
    module, x = make_layer(name)
    every = results(module, module, x)
    module.weight.requires_grad_(False)
    frozen = results(module, module, x)
    assert_same(frozen, {key: every[key] for key in frozen})


@each_layer
def test_compiles_and_exports_without_graph_breaks(name):
    torch.compiler.reset()
    module, x = make_layer(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, module, x), results(module, module, x))
    module.eval()
    with torch.no_grad():
        expected = module(x)
        assert_same(compiled(x), expected)
        assert_same(torch.export.export(module, (x,)).module()(x), expected)
        module.weight.mul_(torch.linspace(0.5, 2, module.weight.shape[-1]))
        assert_same(compiled(x), module(x))


def test_distributed_data_parallel(tmp_path):
    conv, x = nn.Sequential(nfk.WSConv2d(4, 6, 3), nn.ReLU(), nfk.WSConv2d(6, 2, 3)), torch.randn(2, 4, 9, 9)
    expected = results(conv, conv, x)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        out = DistributedDataParallel(conv)(x)
        out.backward(small_integers(out.shape, out.dtype))
    finally:
        dist.destroy_process_group()
    for name, parameter in conv.named_parameters():
        assert_same(parameter.grad, expected[name])


def test_repr_says_what_was_asked_for():
    shown = repr(nfk.WSConv2d(4, 6, 3, 2, groups=2, bias=False, gain=False, gamma=1.5, eps=1e-3))
    assert "stride=(2, 2), groups=2, bias=False, gain=False, gamma=1.5, eps=0.001, eps_form='clamp'" in shown
    assert "eps_form='add', padding='SAME'" in repr(nfk.ScaledStdConv2d(4, 6, 3, padding="SAME"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("gamma", math.nan), ("eps", -1.0), ("eps", math.nan), ("eps", math.inf), ("eps_form", "mul"),
     ("padding_mode", "mirror"), ("groups", 3)],
)  # fmt: skip
@each_layer
def test_bad_arguments_are_named(name, argument, value):
    ours, _, arguments, _ = LAYERS[name]
    known = argument in inspect.signature(ours).parameters
    with pytest.raises(ValueError if known else TypeError, match=argument.replace("_", ".")):
        ours(*arguments, **{argument: value})


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [*((LAYERS[name][0], (1, 4, 1), "fan_in of 1") for name in LAYERS if name not in ("WSLinear", "WSConvTranspose2d")),
     (nfk.WSLinear, (1, 4), "fan_in of 1"), (nfk.WSConvTranspose2d, (4, 4, 1, 1, 0, 0, 4), "fan_in of 1"),
     *((LAYERS[name][0], (4, 6, 3, 1, "FULL"), "padding") for name in LAYERS if "Conv" in name and "Tran" not in name)],
)  # fmt: skip
def test_fan_in_of_one_and_unknown_padding_are_refused(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(*arguments)
