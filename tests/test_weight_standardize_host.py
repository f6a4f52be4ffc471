"""The way of `weight_standardize_many` past torch's dispatcher: for plain tensors alone, and with nothing to see it."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nfnets_kernels import backend as backends
from nfnets_kernels import ops
from nfnets_kernels.functional import weight_standardize, weight_standardize_many

from .agc_cases import without_exchange_api
from .helpers import DTYPES, LAYOUTS, assert_same, randn

OP = torch.ops.nfnets_kernels.weight_standardize.default
BACKWARD = torch.ops.nfnets_kernels.weight_standardize_backward.default
DENSE = ["contiguous", "channels_last", "offset", "offset_channels_last"]
needs_the_api = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="torch 2.10 does not describe its tensors"
)


class Subclass(Tensor):
    pass


class Seen(TorchDispatchMode):
    """The ops that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def layers(layout="contiguous", dtype=torch.float32):
    shapes = [(5, 6, 3, 3), (8, 2, 3, 3), (7, 9, 1, 1), (4, 5, 3), (4, 9), (3, 4, 2, 3, 3)]
    weights = [nn.Parameter(randn(shape, dtype, layout)) for shape in shapes]
    gains = [nn.Parameter(randn(shape[:1] if i % 2 else (shape[0], 1, 1, 1), dtype)) for i, shape in enumerate(shapes)]
    return weights, gains


def through_the_dispatcher(weights, gains, dtype=None):
    return OP(weights, gains, [0.5 + i for i in range(len(weights))], 1e-4, "clamp", dtype, "channels_last", "auto")


def as_users_call(weights, gains, dtype=None):
    scales = [0.5 + i for i in range(len(weights))]
    return weight_standardize_many(weights, gains, scales=scales, dtype=dtype, memory_format=torch.channels_last)


def gradients(function, weights, gains, **options):
    """Outputs and gradients, all of them with one backward pass."""
    outs = function(weights, gains, **options)
    grad_outs = [torch.linspace(-1, 1, out.numel()).to(out.dtype).reshape(out.shape) for out in outs]
    return [*outs, *torch.autograd.grad(outs, [*weights, *gains], grad_outs)]


def is_eager(outs):
    names = {type(out.grad_fn).__name__ for out in outs}
    assert len(names) == 1
    return names == {"_WeightStandardizeBackward"}


@needs_the_api
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", DENSE)
def test_plain_tensors_go_past_the_dispatcher_with_the_same_bits(layout, dtype):
    weights, gains = layers(layout, dtype)
    for out_dtype, some in ((None, gains), (torch.bfloat16, [])):
        expected = gradients(through_the_dispatcher, weights, some, dtype=out_dtype)
        actual = gradients(as_users_call, weights, some, dtype=out_dtype)
        assert is_eager(actual[: len(weights)]) and not is_eager(expected[: len(weights)])
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)
            assert a.stride() == b.stride()


@needs_the_api
@pytest.mark.parametrize("layout", DENSE)
def test_plain_tensors_are_read_in_cpp_forward_and_backward(layout, monkeypatch):
    weights, gains = layers(layout)
    expected = gradients(as_users_call, weights, gains)
    for name in ("_rows", "_check_each"):
        monkeypatch.setattr(ops.weight_standardize, name, None)
    with backends.recording() as record:
        assert_same(gradients(as_users_call, weights, gains), expected)
    assert record == [("weight_standardize", "cpu")] * 2


@pytest.mark.parametrize("api", [None, 3])
def test_without_an_exchange_api_that_is_known(api, monkeypatch):
    weights, gains = layers()
    expected = gradients(as_users_call, weights, gains)
    without_exchange_api(monkeypatch)
    monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", api, raising=False)
    assert_same(gradients(as_users_call, weights, gains), expected)
    assert not is_eager(as_users_call(weights, gains))


def test_a_sequence_that_is_no_list_and_scales_that_are_no_floats():
    weights, gains = layers()
    expected = weight_standardize_many(weights, gains, scales=[2.0] * len(weights))
    assert_same(weight_standardize_many(tuple(weights), tuple(gains), scales=[2] * len(weights)), expected)


@needs_the_api
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_any_gradient_of_the_output(grad_layout):
    weight, gain = randn((5, 6, 3, 3)).requires_grad_(), randn(5).requires_grad_()
    grad = randn((5, 6, 3, 3), layout=grad_layout)
    for x in (grad, torch._neg_view(-grad), grad.as_subclass(Subclass)):
        actual, expected = (
            torch.autograd.grad(function([weight], [gain])[0], [weight, gain], x)
            for function in (as_users_call, through_the_dispatcher)
        )
        assert_same(actual, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda w, g: (w.as_subclass(Subclass), g),
        lambda w, g: (w, g.as_subclass(Subclass)),
        lambda w, g: (torch._neg_view(-w), g),
        lambda w, g: (w, torch._neg_view(-g)),
        lambda w, g: (LAYOUTS["every_second"](w), g),
        lambda w, g: (LAYOUTS["transposed"](w), g),
        lambda w, g: (w, LAYOUTS["every_second"](g)),
        lambda w, g: (w, g[:1].expand(g.shape)),
    ],
    ids=["weight's type", "gain's type", "weight is_neg", "gain is_neg", "gaps", "order", "gain's gaps", "expanded"],
)
def test_what_is_not_plain_goes_through_the_dispatcher(change):
    others, other_gains = layers()
    with torch.no_grad():
        weight, gain = change(randn((5, 6, 3, 3)), randn(5))
    weights, gains = [*others, weight.requires_grad_()], [*other_gains, gain.requires_grad_()]
    outs = as_users_call(weights, gains)
    assert not any(type(out.grad_fn).__name__ == "_WeightStandardizeBackward" for out in outs)
    alone = weight_standardize(
        weight.as_subclass(Tensor).clone(memory_format=torch.contiguous_format).resolve_neg(),
        gain.as_subclass(Tensor).contiguous().resolve_neg(),
        scale=0.5 + len(others),
        memory_format=torch.channels_last,
    )
    assert_same(outs[-1].as_subclass(Tensor), alone)


@pytest.mark.parametrize(
    "context",
    [
        Seen,
        SeenFunctions,
        lambda: FlopCounterMode(display=False),
        forward_ad.dual_level,
        lambda: torch.device("cpu"),
    ],
    ids=["dispatch", "function", "flops", "dual_level", "device"],
)
def test_modes_see_the_ops(context):
    weights, gains = layers()
    expected = gradients(as_users_call, weights, gains)
    with context() as mode:
        outs = as_users_call(weights, gains)
        actual = gradients(as_users_call, weights, gains)
    assert not is_eager(outs)
    assert_same(actual, expected)
    if context is Seen:
        assert OP in mode.ops and BACKWARD in mode.ops
    if context is SeenFunctions:
        assert OP in mode.ops


def test_a_mode_around_the_backward_pass_alone_sees_the_op():
    weights, gains = layers()
    outs = as_users_call(weights, gains)
    with Seen() as mode:
        torch.autograd.grad(outs, weights, [torch.ones_like(out) for out in outs])
    assert BACKWARD in mode.ops


def test_fake_tensors():
    with FakeTensorMode() as mode:
        weights, gains = [torch.empty(5, 6, 3, 3, requires_grad=True)], [torch.empty(5)]
        inside = as_users_call(weights, gains)
    for outs in (inside, as_users_call(weights, gains)):
        assert outs[0].fake_mode is mode and not is_eager(outs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not is_eager(as_users_call(*layers()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_graphs_hold_the_ops():
    weights, gains = layers()
    traced = make_fx(lambda weights, gains: gradients(as_users_call, weights, gains))(weights, gains)
    targets = [node.target for node in traced.graph.nodes]
    assert OP in targets and BACKWARD in targets
    plain = [weight.detach() for weight in weights]
    script = torch.jit.trace(lambda *weights: tuple(as_users_call(weights, [])), plain)
    assert "nfnets_kernels::weight_standardize" in str(script.graph)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "transform",
    [
        lambda function, x: torch.func.vmap(function)(x),
        lambda function, x: torch.func.grad(lambda x: function(x[0]).sum())(x),
        lambda function, x: torch.func.jvp(function, (x[0],), (x[0],)),
        lambda function, x: torch.func.functionalize(function)(x[0]),
        lambda function, x: torch.func.jacrev(function)(x[0]),
        lambda function, x: torch.autograd.functional.jacobian(function, x[0], vectorize=True),
    ],
    ids=["vmap", "grad", "jvp", "functionalize", "jacrev", "is_grads_batched"],
)
def test_transforms_do_as_without(transform):
    x = randn((3, 3, 4, 5))

    def outcome(function):
        try:
            return transform(lambda weight: function([weight], [])[0], x)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    expected = outcome(through_the_dispatcher)
    actual = outcome(as_users_call)
    assert actual == expected if isinstance(expected, str) else assert_same(actual, expected) is None


def test_second_derivatives():
    weights, gains = layers(dtype=torch.float64)

    def second(function):
        outs = function(weights, gains)
        first = torch.autograd.grad(sum(out.square().sum() for out in outs), weights, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), [*weights, *gains])

    assert_same(second(as_users_call), second(through_the_dispatcher))


@needs_the_api
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant):
    weights, gains = layers()

    def checkpointed(weights, gains):
        call = lambda *tensors: tuple(as_users_call(tensors[: len(weights)], tensors[len(weights) :]))  # noqa: E731
        return checkpoint(call, *weights, *gains, use_reentrant=use_reentrant)

    def all_at_once(function):
        outs = function(weights, gains)
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
        grads = [p.grad for p in (*weights, *gains)]
        for p in (*weights, *gains):
            p.grad = None
        return grads

    assert_same(all_at_once(checkpointed), all_at_once(through_the_dispatcher))


@needs_the_api
def test_hooks_on_saved_tensors_see_each_once_and_may_replace_them():
    weights, gains = layers()
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach().clone().numpy()

    def unpack(array):
        unpacked.append(array)
        return torch.from_numpy(array)

    expected = gradients(through_the_dispatcher, weights, gains)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        outs = as_users_call(weights, gains)
        assert is_eager(outs)
        assert [id(tensor) for tensor in packed] == [id(tensor) for tensor in (*weights, *gains)]
        assert_same(gradients(as_users_call, weights, gains), expected)
    assert len(unpacked) == len(weights) + len(gains)


def test_a_weight_that_changes_before_the_backward_pass_is_noticed():
    weights, gains = layers()
    outs = as_users_call(weights, gains)
    with torch.no_grad():
        weights[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outs[0].sum(), weights[0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    weights, gains = layers()
    with context():
        outs, expected = as_users_call(weights, gains), through_the_dispatcher(weights, gains)
    assert all(not out.requires_grad and out.is_inference() == expected[0].is_inference() for out in outs)
    assert_same(outs, expected)
    with context():
        made = [weight.clone() for weight in weights]
    assert_same(as_users_call(made, []), as_users_call([weight.detach() for weight in weights], []))
    refused = pytest.raises(RuntimeError, match="Inference tensors cannot be saved")
    with refused if context is torch.inference_mode else contextlib.nullcontext():
        as_users_call(made, gains)


def test_only_what_requires_a_gradient_gets_one():
    weights, gains = layers()
    weights[0].requires_grad_(False)
    outs = as_users_call(weights, [gain.detach() for gain in gains])
    assert all(out.requires_grad for out in outs)  # as of the op: they share a node
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    assert weights[0].grad is None and all(weight.grad is not None for weight in weights[1:])


@needs_the_api
def test_each_result_has_memory_of_its_own():
    weights, gains = layers()
    results = gradients(as_users_call, weights, gains)
    storages = [result.untyped_storage() for result in results]
    assert len({storage.data_ptr() for storage in storages}) == len(results)
    assert all(s.nbytes() == r.numel() * r.element_size() for s, r in zip(storages, results, strict=True))


def test_wrappers_that_outlived_their_transform():
    kept = []
    torch.func.grad(lambda x: (kept.append(x * 1.0), x.sum())[1])(torch.ones(3, 4, 5))
    (dead,) = kept
    with torch.no_grad():
        assert_same(as_users_call([dead], []), through_the_dispatcher([dead], []))
    weight = randn((3, 4, 5)).requires_grad_()
    grads = [
        torch.autograd.grad(function([weight], [])[0], weight, dead)[0]
        for function in (as_users_call, through_the_dispatcher)
    ]
    assert_same(*grads)


def test_tensors_without_memory():
    weight = torch.ones(3, 4, 5)
    weight.untyped_storage().resize_(0)  # as FSDP leaves a parameter between its uses
    zeros = torch._efficientzerotensor((3, 4, 5))
    for tensor in (torch._to_functional_tensor(torch.ones(3, 4, 5)), zeros, torch.empty(3, 4, 5, device="meta")):
        assert ops.weight_standardize._read([tensor], [], [1.0], [], [], []) is None
    assert ops.weight_standardize._read([weight], [], [1.0], [], [], []) is None


def test_a_copied_model_computes_and_trains():
    weights, gains = layers()
    others, other_gains = copy.deepcopy((weights, gains))
    assert_same(gradients(as_users_call, others, other_gains), gradients(as_users_call, weights, gains))
