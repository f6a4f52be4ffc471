"""`weight_standardize`: every backend against the float64 reference, the authors' numbers, timm, torch's checkers."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nfnets_kernels import backend as backends
from nfnets_kernels.functional import weight_standardize, weight_standardize_many
from nfnets_kernels.reference import weight_standardize as reference

from .helpers import (
    DTYPES,
    INFINITY,
    LAYOUTS,
    NAN,
    assert_compiled_is_eager,
    assert_differentiable_twice,
    assert_fake_is_real,
    assert_rounded_once,
    assert_same,
    assert_same_for_any_threads,
    available,
    randn,
    serving,
    targets,
    threads,
)
from .strategies import FACTORS, SPECIALS, shapes, tensors

TARGETS = targets("weight_standardize")
OPS = torch.ops.nfnets_kernels
FORMATS = {
    torch.preserve_format: "preserve",
    torch.contiguous_format: "contiguous",
    torch.channels_last: "channels_last",
}
# 3x3, grouped, depthwise, 1x1, 1-D, linear and 3-D convolutions.
SHAPES = [(5, 6, 3, 3), (8, 2, 3, 3), (6, 1, 3, 5), (7, 9, 1, 1), (4, 5, 3), (4, 9), (3, 4, 2, 3, 3)]


@pytest.fixture(params=TARGETS)
def backend(request):
    with serving(request.param) as name:
        yield name


@threads(1)
def assert_results(weight, gain, out, grad_out, grads, *, scale=1.0, eps=1e-4, eps_form="clamp"):
    """out and grads (of weight and gain) are those of the float64 reference, up to the rounding of what they sum."""
    w, g, d = (None if x is None else x.detach().double() for x in (weight, gain, grad_out))
    units, d_units, n = w.flatten(1), d.flatten(1), w[0].numel()
    deviations = units - units.mean(dim=1, keepdim=True)
    squared = deviations.square().sum(dim=1, keepdim=True)
    r = (squared.clamp(min=eps) if eps_form == "clamp" else squared + n * eps).rsqrt()
    factor = abs(scale) * r * (1.0 if g is None else g.reshape(-1, 1).abs())
    largest = units.abs().amax(dim=1, keepdim=True)
    condition = 1.0 + largest * r * math.sqrt(n)  # how much larger the weights are than their deviations
    projection = r.square() * (d_units * deviations).abs().sum(dim=1, keepdim=True)
    terms = d_units.abs().amax(dim=1, keepdim=True) + deviations.abs() * projection
    bounds = {"unit_length": n, "computed_in": reference.accumulation_dtype(weight.dtype)}

    expected = reference.weight_standardize(w, g, scale, eps, eps_form, torch.float64)
    assert_rounded_once(out, expected, (factor * largest).expand(units.shape).reshape(w.shape), **bounds)
    expected, expected_gain = reference.weight_standardize_backward(d, w, g, scale, eps, eps_form)
    assert_rounded_once(grads[0], expected, (factor * condition * terms).reshape(w.shape), **bounds)
    if g is not None:
        size = abs(scale) * r * largest * d_units.abs().sum(dim=1, keepdim=True)
        assert_rounded_once(grads[1], expected_gain, size.reshape(g.shape), **bounds)


def check(weights, gains, *, scales=None, eps=1e-4, eps_form="clamp", grad_layout="contiguous", **options):
    """Runs one call on all weights, checks dtypes, values and gradients, and returns the outputs."""
    scales = scales or [1.0] * len(weights)
    inputs = [x.requires_grad_() for x in (*weights, *gains) if x is not None]
    outs = weight_standardize_many(weights, gains, scales=scales, eps=eps, eps_form=eps_form, **options)
    grad_outs = [randn(out.shape, out.dtype, grad_layout) for out in outs]
    grads = dict(zip(map(id, inputs), torch.autograd.grad(outs, inputs, grad_outs), strict=True))
    for i, (weight, gain) in enumerate(zip(weights, gains or [None] * len(weights), strict=True)):
        own = [grads[id(weight)], grads.get(id(gain))]
        assert outs[i].dtype == (options.get("dtype") or weight.dtype)
        assert all(grad is None or grad.dtype == weight.dtype for grad in own)
        if weight.numel():
            assert_results(weight, gain, outs[i], grad_outs[i], own, scale=scales[i], eps=eps, eps_form=eps_form)
        else:
            assert outs[i].shape == own[0].shape == weight.shape
            assert gain is None or not own[1].any()
    return outs


def test_cpu_kernel_is_built():
    assert "cpu:baseline" in TARGETS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 31, 32, 33, 1023, 4608, 100_000])
def test_unit_lengths(backend, n, dtype):
    for eps_form in ("clamp", "add"):
        units = 1 if n == 100_000 else 3
        check([randn((units, n), dtype)], [randn(units, dtype)], scales=[1.7], eps_form=eps_form, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_pairs_of_dtypes(backend, weight_dtype, dtype):
    for layout in ("contiguous", "channels_last"):
        weight = randn((5, 7, 3, 3), weight_dtype, layout)
        check([weight], [randn(5, weight_dtype)], dtype=dtype, memory_format=torch.channels_last, backend=backend)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_formats(backend, shape, layout, memory_format):
    weight = randn(shape, layout=layout)
    (out,) = check([weight], [randn(shape[0])], memory_format=memory_format, backend=backend)
    kept = "channels_last" if layout in ("channels_last", "offset_channels_last") else "contiguous"
    order = kept if memory_format == torch.preserve_format else FORMATS[memory_format]
    assert_same(out.detach(), LAYOUTS[order](out.detach()))


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_gradient_in_another_memory_format(backend, layout, grad_layout):
    for shape in SHAPES:
        check([randn(shape, layout=layout)], [randn(shape[0])], grad_layout=grad_layout, backend=backend)


def test_expanded_gradient(backend):
    weight, grad = randn((4, 3, 3, 3)).requires_grad_(), randn((4, 1, 3, 1)).expand(4, 3, 3, 3)
    out = weight_standardize(weight, backend=backend)
    grads = [torch.autograd.grad(out, weight, x, retain_graph=True) for x in (grad, grad.contiguous())]
    assert_same(*grads)


def test_gain_shapes_and_strides(backend):
    for gain in (None, randn(6), randn((6, 1, 1, 1)), randn((1, 6)), randn((6, 2))[:, 1], randn(7)[1:]):
        check([randn((6, 3, 3, 3))], [gain], backend=backend)


def mixture():
    weights, gains = [], []
    for i, layout in enumerate(LAYOUTS):
        for j, shape in enumerate([*SHAPES, (0, 3, 3, 3)]):
            dtype = DTYPES[(i + j) % 4]
            weights.append(randn(shape, dtype, layout))
            gains.append([None, randn(shape[0], dtype), randn((shape[0], 1, 1, 1), dtype)][(i + j) % 3])
    return weights, gains, [0.5 + 0.1 * i for i in range(len(weights))]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_one_call_takes_any_mixture(backend, memory_format):
    weights, gains, scales = mixture()
    check(weights, gains, scales=scales, memory_format=memory_format, dtype=torch.bfloat16, backend=backend)


def test_one_call_is_many_calls(backend):
    weights, gains, scales = mixture()
    outs = weight_standardize_many(weights, gains, scales=scales, backend=backend)
    for out, weight, gain, scale in zip(outs, weights, gains, scales, strict=True):
        assert_same(out, weight_standardize(weight, gain, scale=scale, backend=backend))


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 3, 3), (3, 0), (3, 0, 3, 3), (0, 0)])
def test_empty_weights_and_no_weights(backend, shape):
    check([randn(shape)], [randn(shape[0])], backend=backend)
    assert weight_standardize_many([], backend=backend) == []


def test_output_without_gradient_leaves_the_others_theirs(backend):
    weights = [randn((4, 5), torch.float64).requires_grad_() for _ in range(3)]
    first, second, _ = weight_standardize_many(weights, backend=backend)
    grads = torch.autograd.grad(second.square().sum() + 0 * first.sum(), weights, allow_unused=True)
    (alone,) = torch.autograd.grad(weight_standardize(weights[1], backend=backend).square().sum(), weights[1])
    assert_same(grads[1], alone)
    assert all(grad is None or not grad.any() for grad in (grads[0], grads[2]))


def test_gradient_of_gain_alone(backend):
    weight, gain = randn((4, 5), torch.float64), randn(4, torch.float64).requires_grad_()
    out = weight_standardize(weight, gain, backend=backend)
    (grad,) = torch.autograd.grad(out, gain, torch.ones_like(out).cumsum(1))
    torch.testing.assert_close(grad, (out / gain[:, None] * torch.arange(1, 6)).sum(dim=1).detach())


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bad_number_stays_in_its_unit(backend, layout, value):
    weight, gain = randn((5, 4, 3, 3), layout=layout), randn(5)
    weight[2, 1, 0, 2] = value
    out = check([weight], [gain], memory_format=torch.channels_last, backend=backend)[0]
    assert torch.equal(out.isnan().flatten(1).all(dim=1), torch.arange(5) == 2)
    assert torch.equal(out.isnan().flatten(1).any(dim=1), torch.arange(5) == 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps_form", ["clamp", "add"])
def test_constant_weights_become_zero(backend, eps_form, dtype):
    for n in (2, 33, 4608):
        weight = torch.tensor([0.5, 0.0, -2.0], dtype=dtype)[:, None].expand(3, n).clone()
        (out,) = check([weight], [randn(3, dtype)], eps_form=eps_form, backend=backend)
        assert not out.any()


def test_below_the_clamp_the_gradient_is_a_centered_multiple(backend):
    weight = (1e-4 * randn((3, 4, 3, 3), torch.float64)).requires_grad_()  # N * var = 3.6e-7 < eps
    out = weight_standardize(weight, scale=2.0, eps=1e-4, backend=backend)
    grad_out = randn(out.shape, torch.float64)
    (grad,) = torch.autograd.grad(out, weight, grad_out)
    centered = grad_out - grad_out.flatten(1).mean(dim=1).view(3, 1, 1, 1)
    torch.testing.assert_close(grad, centered * 2.0 / math.sqrt(1e-4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3e-5, 3e-3, 3e-1])
def test_small_weights_on_both_sides_of_the_clamp(backend, size, dtype):
    weight = size * randn((6, 4, 3, 3), dtype)
    for eps_form in ("clamp", "add"):
        check([weight.detach()], [randn(6, dtype)], eps=1e-4, eps_form=eps_form, backend=backend)


@pytest.mark.parametrize("n", [33, 1000, 4608])
def test_mean_far_larger_than_the_deviations(backend, n):
    weight = randn((4, n)) + 1e3
    for eps_form in ("clamp", "add"):
        check([weight.detach()], [randn(4)], eps_form=eps_form, backend=backend)


@pytest.mark.parametrize("case", ["3x3", "1x1", "7x7_stem", "grouped_3x3", "tiny_fan_in"])
def test_authors_numbers(backend, golden, case):
    names = ("weight", "gain", "out", "grad_out", "grad_weight", "grad_gain")
    weight, gain, out, grad_out, *grads = (torch.from_numpy(golden[f"ws/{case}/{name}"]) for name in names)
    inputs = weight.requires_grad_(), gain.requires_grad_()
    actual = weight_standardize(*inputs, eps=1e-4, backend=backend)
    assert_results(*inputs, out, grad_out, grads)  # theirs within the rounding of float32 of ours in float64,
    assert_results(*inputs, actual, grad_out, torch.autograd.grad(actual, inputs, grad_out))  # and so are ours


def assert_timm_agrees(monkeypatch, conv, inputs, **options):
    with monkeypatch.context() as patch:  # then the convolution returns the weight that it convolves with
        patch.setattr(torch.nn.functional, "conv2d", lambda x, weight, *rest: weight)
        expected = conv(None)
    actual = weight_standardize(*inputs, eps=conv.eps, eps_form="add", **options)
    grad = randn(actual.shape, torch.float64)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_timm_scaled_std_conv(backend, monkeypatch):
    from timm.layers import ScaledStdConv2d

    for groups, eps in itertools.product((1, 2), (1e-6, 1e-5, 1e-2)):
        conv = ScaledStdConv2d(6, 8, 3, groups=groups, gamma=1.7139588594436646, eps=eps).double()
        torch.nn.init.normal_(conv.gain)
        assert_timm_agrees(monkeypatch, conv, [conv.weight, conv.gain], scale=1.7139588594436646, backend=backend)


def test_timm_std_conv(backend, monkeypatch):
    from timm.layers import StdConv2d

    conv = StdConv2d(6, 8, 3, eps=1e-4).double()
    assert_timm_agrees(monkeypatch, conv, [conv.weight], scale=math.sqrt(54), backend=backend)  # not over sqrt(fan_in)


def samples():
    """Lists of weights and gains, with the layouts and the empty tensors that decide about strides."""
    plain = [randn((5, 4, 3, 3)), randn((6, 3, 1, 1), layout="channels_last"), randn((4, 5), torch.bfloat16)]
    strange = [randn((5, 4, 3, 3), layout="transposed"), randn((3, 4, 2, 3, 3), layout="offset_channels_last")]
    return [
        (plain, [randn(5), randn((6, 1, 1, 1)), randn(4, torch.bfloat16)]),
        (strange, []),
        ([randn((0, 4, 3, 3)), randn((6, 1, 3, 3), layout="channels_last")], [randn(0), randn(6)]),
    ]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("backend", available("weight_standardize"))
def test_opcheck_and_fake_tensors(backend, dtype, memory_format):
    def forward(weights, gains):
        return weight_standardize_many(weights, gains, dtype=dtype, memory_format=memory_format, backend=backend)

    for weights, gains in samples():
        scales, outs = [0.5 + i for i in range(len(weights))], forward(weights, gains)
        backward_args = outs, weights, gains, scales, 1e-5, "add", backend
        assert_fake_is_real(forward, weights, gains)
        assert_fake_is_real(OPS.weight_standardize_backward, *backward_args)
        torch.library.opcheck(OPS.weight_standardize_backward.default, backward_args)
        tracked = [x.requires_grad_() for x in weights], [x.requires_grad_() for x in gains]
        args = (*tracked, scales, 1e-4, "clamp", dtype, FORMATS[memory_format], backend)
        torch.library.opcheck(OPS.weight_standardize.default, args)


@pytest.mark.parametrize("eps_form", ["clamp", "add"])
@pytest.mark.parametrize("size", [1e-3, 1.0])  # N * var below and above eps
@pytest.mark.parametrize("backend", available("weight_standardize"))
def test_gradcheck(backend, eps_form, size):
    inputs = [size * randn((3, 2, 2, 2), torch.float64, layout) for layout in ("contiguous", "channels_last")]
    inputs = [x.requires_grad_() for x in (*inputs, randn(3, torch.float64), randn((3, 1, 1, 1), torch.float64))]

    def function(*inputs):
        options = {"eps_form": eps_form, "memory_format": torch.channels_last, "backend": backend}
        return weight_standardize_many(inputs[:2], inputs[2:], scales=[0.7, 1.3], **options)

    assert_differentiable_twice(function, inputs, eps=1e-6 * size)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(compiler, dynamic):
    def function(first, second, gain):
        options = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
        return weight_standardize_many([first * 2, second], [gain, None], scales=[1.5, 0.5], **options)

    inputs = [
        [x.requires_grad_() for x in (randn((units, 4, 3, 3)), randn((6, units), torch.float64), randn(units))]
        for units in (5, 7)
    ]
    assert_compiled_is_eager(function, *inputs, compiler=compiler, dynamic=dynamic)


def test_same_bits_for_any_number_of_threads_and_in_every_run(backend):
    inputs = [randn((7, 30_000)), randn((300, 64, 3, 3), layout="channels_last"), randn((3, 100_001), torch.bfloat16)]
    inputs = [x.requires_grad_() for x in inputs]

    def function(*weights):
        return weight_standardize_many(weights, memory_format=torch.contiguous_format, backend=backend)

    assert_same_for_any_threads(function, inputs)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
def test_any_shape_dtype_and_strides(target, data):
    torch.manual_seed(data.draw(st.integers(0, 999), label="seed"))
    weights, gains = [], []
    for _ in range(data.draw(st.integers(1, 3), label="weights")):
        units, *fan_in = data.draw(shapes(target, 2, 5, side=9))
        shape = (units, *(max(1, size) for size in fan_in))
        assume(math.prod(shape[1:]) > 1)
        dtype, shift = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([0.0, 0.0, 1.0, -100.0]))
        sizes = [1.0, 1.0, 1e-25, 1e-3, 1e4]
        if dtype != torch.float64:  # where the reference cannot tell deviations of equal weights of 1e15 from rounding
            sizes.append(1e15)
        size = data.draw(st.sampled_from(sizes))
        weights.append(data.draw(tensors(shape, dtype, size, shift, SPECIALS, read_only=True)))
        gains.append(data.draw(st.none() | tensors(shape[:1], dtype)))
    with serving(target) as backend:
        check(
            weights,
            gains,
            scales=[data.draw(FACTORS) for _ in weights],
            eps=data.draw(st.sampled_from([1e-4, 1e-5, 1.0])),
            eps_form=data.draw(st.sampled_from(["clamp", "add"])),
            grad_layout=data.draw(st.sampled_from(list(LAYOUTS))),
            dtype=data.draw(st.sampled_from([None, *DTYPES])),
            memory_format=data.draw(st.sampled_from(list(FORMATS))),
            backend=backend,
        )


W, G = torch.ones(3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("weights", "gains", "options", "error", "message"),
    [
        ([W, W.int()], [], {}, TypeError, r"weights\[1\].*torch.int32"),
        ([W.to_sparse()], [], {}, TypeError, r"weights\[0\].*sparse"),
        ([[1.0]], [], {}, TypeError, r"weights\[0\].*list"),
        (torch.ones(2, 3, 3), [], {}, TypeError, "weights.*tensor"),
        ([G], [], {}, ValueError, r"weights\[0\].*\(3,\)"),
        ([W, torch.ones(3, 1, 1, 1)], [], {}, ValueError, r"weights\[1\].*fan_in of 1"),
        ([W, W.to("meta")], [], {}, ValueError, r"weights\[1\].*meta"),
        ([W, W], [G], {}, ValueError, r"gains.*2.*got 1"),
        ([W], [None, None], {}, ValueError, r"gains.*1.*got 2"),
        ([W], [torch.ones(4)], {}, ValueError, r"gains\[0\].*\(3\).*\(4,\)"),
        ([W], [G.double()], {}, TypeError, r"gains\[0\].*float32.*float64"),
        ([W], [G.to("meta")], {}, ValueError, r"gains\[0\].*meta"),
        ([W], [G.to_sparse()], {}, TypeError, r"gains\[0\].*sparse"),
        ([W], [1.0], {}, TypeError, r"gains\[0\].*float"),
        ([W], [], {"scales": [1.0, 2.0]}, ValueError, "scales.*1.*got 2"),
        ([W], [], {"scales": [NAN]}, ValueError, r"scales\[0\].*nan"),
        ([W], [], {"eps": -1e-5}, ValueError, "eps.*-1e-05"),
        ([W], [], {"eps": INFINITY}, ValueError, "eps.*inf"),
        ([W], [], {"eps_form": "max"}, ValueError, "eps_form.*clamp.*add.*'max'"),
        ([W], [], {"dtype": torch.int8}, TypeError, "dtype.*torch.int8"),
        ([W], [], {"memory_format": "channels_last"}, ValueError, "memory_format.*channels_last"),
        ([W], [], {"backend": "tpu"}, ValueError, "backend.*'tpu'"),
        ([W], [], {"backend": "cuda"}, ValueError, "'cuda' cannot serve weight.*does not run on cpu"),
    ][: None if "cuda" not in TARGETS else -1],  # the emulator of CUDA serves tensors of the CPU
)
def test_bad_argument_is_named_before_any_kernel_runs(weights, gains, options, error, message):
    with backends.recording() as record, pytest.raises(error, match=message):
        weight_standardize_many(weights, gains, **options)
    assert record == []
