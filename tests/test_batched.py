"""BatchedWeightStandardization: one launch per group, and nothing else changes, not one bit of value or gradient."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import nfnets_kernels as nfk
from nfnets_kernels.models import NFResNet
from nfnets_kernels.modules import BatchedWeightStandardization
from nfnets_kernels.modules.batched import GROUPS, release
from nfnets_kernels.modules.standardized import Standardized

from .helpers import assert_same, channels_last
from .module_helpers import on_one_thread, perturb, results, standardizations

one_thread = pytest.fixture(on_one_thread, autouse=True)
LAUNCHES = {"stage": 4, "model": 1}


class Net(nn.Module):
    """Stem, two stages and head, any of which a checkpoint may run; `reached` counts calls and may raise."""

    def __init__(self, use_reentrant=None, stages=nn.Sequential):
        super().__init__()
        conv = nfk.WSConv2d
        self.stem = conv(3, 8, 3, 2)
        first = nn.Sequential(conv(8, 8, 3, groups=2), nn.ReLU(), conv(8, 6, 1))
        second = nn.Sequential(conv(6, 6, 3, bias=False), nn.ReLU(), nfk.ScaledStdConv2d(6, 6, 3, eps=1e-4, stride=2))
        second[-1].eps_form = "clamp"
        self.stages = nn.Sequential(first, second) if stages is nn.Sequential else nn.ModuleList([first, second])
        self.head = nfk.WSLinear(6, 4)
        self.use_reentrant = use_reentrant

    def forward(self, x, scale=1.0):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x) if self.use_reentrant is None else checkpoint(stage, x, use_reentrant=self.use_reentrant)
        return scale * self.head(x.mean((2, 3)))


def image(**options):
    return torch.randn(2, 3, 20, 18, **options)


def layers(model):
    return [module for module in model.modules() if isinstance(module, Standardized)]


def assert_holds_nothing(model):
    assert all(layer._held is None for layer in layers(model))


def gradients(function, model, x):
    """As `results`, by backward(): a reentrant checkpoint has no other."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = function(x)
    out.square().sum().backward()
    return {"output": out.detach(), "input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_as_alone(model, group, x, run=lambda model: model):
    """Owned or not, the same bits; returns the owned model and its launches."""
    owned = copy.deepcopy(model)
    BatchedWeightStandardization(owned, group)
    expected = gradients(run(model), model, x)
    assert_same(gradients(run(owned), owned, x), expected)
    assert_holds_nothing(owned)
    return owned, standardizations(owned, x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last input"])
@pytest.mark.parametrize("stages", [nn.Sequential, nn.ModuleList])
@pytest.mark.parametrize("group", GROUPS)
def test_one_launch_per_group_and_the_same_bits(group, stages, layout):
    model, x = perturb(Net(stages=stages)), image()
    model = model.to(memory_format=torch.channels_last) if layout == "channels_last" else model
    x = x if layout == "contiguous" else channels_last(x)
    assert standardizations(model, x) == 6
    assert assert_as_alone(model, group, x)[1] == LAUNCHES[group]


@pytest.mark.parametrize("group", GROUPS)
def test_autocast_and_keyword_arguments(group):
    model, x = perturb(Net()), image()
    expected = results(lambda x: model(x=x, scale=2.0), model, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected_low = results(model, model, x)
    BatchedWeightStandardization(model, group)
    assert_same(results(lambda x: model(x=x, scale=2.0), model, x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(model, model, x), expected_low)
        assert standardizations(model, x) == LAUNCHES[group]


class Inside(nn.Module):
    """Runs its convolution in another mode than its own."""

    def __init__(self, mode):
        super().__init__()
        self.conv = nfk.WSConv2d(3, 4, 3)
        self.mode = mode

    def forward(self, x):
        with self.mode():
            return self.conv(x.float())


MODES = {
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_in_another_mode_than_the_model_computes_as_alone(mode):
    model, x = Inside(MODES[mode]), image()
    owned = copy.deepcopy(model)
    BatchedWeightStandardization(owned, "model")
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "no autocast"), torch.set_grad_enabled(mode != "grad"):
        expected, actual = model(x), owned(x)
    assert_same(actual, expected)
    assert actual.requires_grad == expected.requires_grad == (mode != "no grad")
    if mode != "no grad":
        grads = [
            torch.autograd.grad(out.float().sum(), [*m.parameters()]) for out, m in ((actual, owned), (expected, model))
        ]
        assert_same(*grads)


class ToFloat64(nn.Module):
    def forward(self, x):
        return x.double()


def test_layers_that_differ_get_a_launch_for_each_kind():
    kinds = [{}, {"eps": 1e-3}, {"eps_form": "add"}, {}]
    model = nn.Sequential(*(nn.Sequential(nfk.WSLinear(4, 4, **kind)) for kind in kinds), ToFloat64())
    model.append(nfk.WSLinear(4, 4, dtype=torch.float64))
    x = torch.randn(3, 4)
    assert assert_as_alone(perturb(model), "model", x)[1] == 4
    assert assert_as_alone(perturb(model), "stage", x)[1] == 5


@pytest.mark.parametrize("group", GROUPS)
def test_a_list_that_the_model_calls_entry_by_entry(group):
    class Iterates(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nfk.WSLinear(4, 4), nfk.WSLinear(4, 4))  # is itself never called

        def forward(self, x):
            for part in self.body:
                x = part(x)
            return x

    assert assert_as_alone(perturb(Iterates()), group, torch.randn(3, 4))[1] == (2 if group == "stage" else 1)


@pytest.mark.parametrize("group", GROUPS)
def test_a_layer_used_twice_is_standardized_once(group):
    conv = nfk.WSConv2d(3, 3, 3, padding=1, dtype=torch.float64)
    model, x = perturb(nn.Sequential(nn.Sequential(conv, nn.ReLU(), conv))), image(dtype=torch.float64)
    expected = gradients(model, model, x)
    BatchedWeightStandardization(model, group)
    actual = gradients(model, model, x)
    assert_same(actual["output"], expected["output"])
    torch.testing.assert_close(actual, expected)  # the weight's gradients are added before the op and not after
    assert standardizations(model, x) == 1


@pytest.mark.parametrize("group", GROUPS)
def test_eval_mode_keeps_weights_as_ever(group):
    model, x = perturb(Net()).eval(), image()
    with torch.no_grad():
        expected = model(x)
        BatchedWeightStandardization(model, group)
        assert standardizations(lambda: assert_same(model(x), expected)) == 0
        model.stem.weight.mul_(torch.linspace(0.5, 2, 3))
        assert standardizations(lambda: model(x)) == 1
    assert standardizations(model, x) == LAUNCHES[group]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_nothing_is_held_after_an_exception(group, error):
    model, x = perturb(Net()), image()
    expected = results(model, model, x)
    BatchedWeightStandardization(model, group)
    handle = model.head.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(error("planted")))
    with pytest.raises(error, match="planted"):
        model(x)
    assert_holds_nothing(model)
    handle.remove()
    assert_same(results(model, model, x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("group", GROUPS)
def test_copies_are_owned_and_can_be_released(group, copied):
    model, x = perturb(Net()), image()
    expected = results(model, model, x)
    owner = BatchedWeightStandardization(model, group)
    inner, copies = model.stages[0][1], []
    handle = inner.register_forward_hook(lambda *_: copies.append(copied(model.stages[0][0])))
    model(x)
    handle.remove()
    assert copies[0]._held is None  # although the copied layer held its weight
    other = copied(model)
    assert standardizations(other, x) == LAUNCHES[group]
    assert_same(results(other, other, x), expected)
    owner.remove()
    assert standardizations(model, x) == 6 and standardizations(other, x) == LAUNCHES[group]
    release(other)
    assert standardizations(other, x) == 6
    for module in [*other.modules(), *model.modules()]:
        assert not (module._forward_pre_hooks or module._forward_hooks or module._forward_hooks_always_called)
        assert not module._forward_pre_hooks_with_kwargs
    assert_same(results(other, other, x), expected)
    assert other.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_checkpointed_stages_have_the_same_gradients(group, use_reentrant):
    model, x = perturb(Net(use_reentrant)), image()
    expected = gradients(lambda x: Net.forward(model, x), model, x)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    assert_same(gradients(plain, plain, x), expected)
    owned, _ = assert_as_alone(model, group, x)
    owned.use_reentrant = None
    assert_same(gradients(owned, owned, x), expected)


def test_a_model_that_is_checkpointed_itself_and_saved_tensor_hooks():
    model, x = perturb(Net()), image()
    for group in GROUPS:
        assert_as_alone(model, group, x, lambda model: lambda x: checkpoint(model, x, use_reentrant=False))
        owned, _ = assert_as_alone(model, group, x)
        with torch.autograd.graph.save_on_cpu():
            assert standardizations(owned, x) == LAUNCHES[group]


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # each weight held and let go
@pytest.mark.parametrize("group", GROUPS)
def test_compiles_and_exports(group):
    torch.compiler.reset()
    model, x = perturb(Net()), image()
    expected = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), model, x)
    torch.compiler.reset()
    BatchedWeightStandardization(model, group)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(gradients(compiled, model, x), expected)
    assert standardizations(compiled, x) == LAUNCHES[group]
    assert_holds_nothing(model)
    for strict in (False, True):
        exported = torch.export.export(model, (x,), strict=strict)
        nodes = [node for node in exported.graph.nodes if "weight_standardize" in str(node.target)]
        assert len(nodes) == LAUNCHES[group]
        assert_same(exported.module()(x), model(x))


def test_a_compiled_checkpoint_of_an_owned_model():
    torch.compiler.reset()
    model, x = perturb(Net(use_reentrant=False)), image()
    expected = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), model, x)
    owned, _ = assert_as_alone(model, "model", x)
    assert_same(gradients(torch.compile(owned, fullgraph=True, backend="aot_eager"), owned, x), expected)


@pytest.mark.parametrize("group", GROUPS)
def test_weights_that_hooks_and_parametrizations_make(group):
    model, x = perturb(Net()), image()
    owned = copy.deepcopy(model)
    for m in (model, owned):
        prune.l1_unstructured(m.stages[0][0], "weight", 0.5)
        parametrize.register_parametrization(m.stages[0][2], "weight", nn.Softplus())
    BatchedWeightStandardization(owned, group)
    for _ in range(2):
        assert_same(results(owned, owned, x), results(model, model, x))
        with torch.no_grad():
            for m in (model, owned):
                m.stages[0][0].weight_orig.mul_(torch.linspace(0.5, 2, 3))


@pytest.mark.parametrize("group", GROUPS)
def test_late_stages_have_their_gradients_first_only_by_stage(group):
    model, events = Net(), []
    BatchedWeightStandardization(model, group)
    model.head.weight.register_post_accumulate_grad_hook(lambda _: events.append("head's gradient"))
    model.stem.register_full_backward_hook(lambda *_: events.append("backward in stem"))
    model(image().requires_grad_()).sum().backward()
    order = ["head's gradient", "backward in stem"]
    assert events == (order if group == "stage" else order[::-1])


@pytest.mark.parametrize("group", GROUPS)
def test_distributed_data_parallel(group, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = perturb(Net()), image()
        expected = gradients(model, model, x)
        BatchedWeightStandardization(model, group)
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-4)
        for _ in range(2):
            assert_same(gradients(wrapped, model, x), expected)
        assert standardizations(wrapped, x) == LAUNCHES[group]
    finally:
        torch.distributed.destroy_process_group()


def test_layers_that_are_not_called_get_zeros():
    model = Net()
    model.unused = nfk.WSConv2d(3, 4, 3)
    BatchedWeightStandardization(model, "model")
    model(image()).sum().backward()
    assert model.stem.weight.grad.any() and not model.unused.weight.grad.any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_our_networks_take_what_their_owner_prepared(checkpointing):
    model = perturb(NFResNet((1, 2, 1, 1), 1, num_classes=4, use_se=True))
    model.set_grad_checkpointing(checkpointing)
    assert standardizations(model, image()) == 5
    owned, launches = assert_as_alone(model, "model", image())
    assert launches == 1
    handle = owned.blocks[0].conv0.register_forward_hook(lambda *_: None)
    assert standardizations(owned, image()) == 1
    handle.remove()
    with pytest.raises(ValueError, match="group must be 'model': NFResNet"):
        BatchedWeightStandardization(model, "stage")
    inside = nn.ModuleDict({"backbone": model})
    inside.forward = lambda x: inside["backbone"](x)
    BatchedWeightStandardization(inside, "stage")
    assert standardizations(inside, image()) == 1


def test_alpha_and_skip_gain_are_folded():
    model, x = perturb(NFResNet((1, 1, 1, 1), 1, num_classes=4)), image()
    BatchedWeightStandardization(model, "model")
    block = model.blocks[0]
    seen = {}
    block.conv2.register_forward_pre_hook(
        lambda conv, args, kwargs: seen.update(kwargs, held=conv.held(block.skip_gain, block.alpha)), with_kwargs=True
    )
    model(x)
    assert seen["prepared"][0] is seen["held"][0]  # without its bias, which the residual op adds
    assert block.conv2.held(block.skip_gain, block.alpha) is None


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [(nfk.WSConv2d, {}, TypeError, "model must be a module, got type"),
     (nn.Linear(2, 2), {}, ValueError, "model must hold standardized layers.*Linear"),
     (Net(), {"group": "block"}, ValueError, "group must be one of")],
    ids=["type", "nothing", "group"],
)  # fmt: skip
def test_bad_arguments_are_named(model, options, error, match):
    with pytest.raises(error, match=match):
        BatchedWeightStandardization(model, **options)


@pytest.mark.parametrize("part", ["", "stages", "stages.0"])
def test_a_model_has_one_owner(part):
    model = Net()
    owner = BatchedWeightStandardization(model.get_submodule(part))
    for group in GROUPS:
        with pytest.raises(ValueError, match="owned already"):
            BatchedWeightStandardization(model, group)
    owner.remove()
    assert BatchedWeightStandardization(model).group == "stage"
