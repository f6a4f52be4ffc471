"""`ModelEMA`: timm's ModelEmaV2 is the oracle."""

import copy
import io

import pytest
import timm
import torch
from timm.utils import ModelEmaV2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import nfnets_kernels as nfk
from nfnets_kernels.optim.ema import ModelEMA

from .module_helpers import on_one_thread
from .tolerances import relative_bound

one_thread = pytest.fixture(on_one_thread, autouse=True)

UPDATES = 20


def small(dtype=torch.float32) -> nn.Module:
    """Parameters and buffers of two dtypes, one of them integer, and one tensor under two names."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nfk.WSConv2d(4, 4, 1)).to(dtype)
    model.register_parameter("table", nn.Parameter(torch.randn(5, dtype=torch.float64)))
    return model


def nf_resnet() -> nn.Module:
    return nfk.models.NFResNet((1, 1, 1, 1), 1, num_classes=3)


@torch.no_grad()
def train(model: nn.Module) -> None:
    """What a step and a forward pass do to a model, at any size of step."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor))
        else:
            tensor.add_(1)


def assert_same_average(ema: nn.Module, expected: nn.Module, updates: int = UPDATES) -> None:
    """Each update of either rounds some three times, relative to tensors whose elements reach `updates`."""
    expected_state = expected.state_dict()
    assert ema.state_dict().keys() == expected_state.keys()
    for name, tensor in ema.state_dict().items():
        if tensor.is_floating_point():
            atol = updates * relative_bound(tensor.dtype, ulps=3.0) * float(expected_state[name].abs().max())
            torch.testing.assert_close(tensor, expected_state[name], rtol=0, atol=atol)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("make", [small, nf_resnet, lambda: timm.create_model("test_nfnet", num_classes=3)])
def test_the_average_is_timms(make, decay):
    model = make()
    ema, expected = ModelEMA(model, decay), ModelEmaV2(model, decay)
    for _ in range(UPDATES):
        train(model)
        ema.update(model)
        expected.update(model)
    assert not ema.module.training
    assert_same_average(ema, expected)
    ema.set(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(ema.module.state_dict()[name], tensor), name


def test_integer_buffers_are_the_models():
    model = small()
    ema = ModelEMA(model)
    for _ in range(3):
        train(model)
        ema.update(model)
    assert ema.module[1].num_batches_tracked == model[1].num_batches_tracked == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_models_average_is_in_float32(dtype):
    """The oracle averages what the model is, widened: in 16 bits it would not move."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    ema, expected = ModelEMA(model, 0.9999), ModelEmaV2(copy.deepcopy(model).float(), 0.9999)
    for _ in range(UPDATES):
        train(model)
        ema.update(model)
        expected.update(copy.deepcopy(model).float())
    assert_same_average(ema, expected)
    assert {tensor.dtype for tensor in ema.state_dict().values()} == {torch.float32, torch.int64}
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert ema(torch.randn(1, 3, 8, 8)).dtype == torch.float32


def test_a_tied_parameter_is_averaged_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    ema = ModelEMA(model, 0.5)
    before = model[0].weight.detach().clone()
    train(model)
    ema.update(model)
    assert ema.module[1].weight is ema.module[0].weight
    torch.testing.assert_close(ema.module[0].weight, (before + model[0].weight) / 2)


def test_averages_go_where_the_device_argument_says():
    model = small()
    ema = ModelEMA(model, device="meta")
    train(model)
    ema.update(model)
    assert {tensor.device.type for tensor in ema.state_dict().values()} == {"meta"}


def test_the_models_gradients_hooks_and_mode_are_left_alone():
    model = small().train()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    before = {name: (p, p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    ema = ModelEMA(model, 0.5)
    ema.update(model)
    assert model.training
    for name, p in model.named_parameters():
        parameter, value, grad = before[name]
        assert p is parameter
        assert torch.equal(p, value)
        assert p.grad is grad
    assert all(p.grad is None for p in ema.parameters())


def test_evaluation_sees_each_update():
    """Standardized convolutions keep their weight in eval mode, as long as nothing changes it."""
    model = nf_resnet()
    ema = ModelEMA(model, 0.5)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for update in (ema.update, ema.update, ema.set):
            before = ema(x)
            assert torch.equal(ema.module(x), before)
            train(model)
            update(model)
            after = ema(x)
            assert not torch.equal(after, before)
            assert torch.equal(copy.deepcopy(ema.module)(x), after)  # which has kept nothing


def test_checkpoints_load_both_ways_and_the_average_goes_on():
    model = small()
    ema, theirs = ModelEMA(model, 0.9), ModelEmaV2(model, 0.9)
    train(model)
    ema.update(model)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    resumed, copied = ModelEMA(small(), 0.9), copy.deepcopy(ema)
    resumed.load_state_dict(torch.load(file))
    theirs.load_state_dict(ema.state_dict())
    resumed.load_state_dict(theirs.state_dict())
    train(model)
    for average in (ema, resumed, copied):
        average.update(model)
    for name, tensor in ema.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
        assert torch.equal(copied.state_dict()[name], tensor), name


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_are_looked_into(process_group):
    model = nf_resnet()
    compiled = torch.compile(model, backend="eager")
    wrappers = [compiled, nn.DataParallel(model), DistributedDataParallel(compiled)]
    plain, *others = [ModelEMA(each, 0.5) for each in (model, *wrappers)]
    mixed = ModelEMA(model, 0.5)
    train(model)
    plain.update(model)
    mixed.update(wrappers[-1])
    for ema, wrapper in zip(others, wrappers, strict=True):
        ema.update(wrapper)
    for ema in (mixed, *others):
        assert ema.state_dict().keys() == plain.state_dict().keys()
        for name, tensor in ema.state_dict().items():
            assert torch.equal(tensor, plain.state_dict()[name]), name


def test_the_decay_may_change():
    model = small()
    ema = ModelEMA(model)
    train(model)
    ema.decay = 0.0
    ema.update(model)
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_lies_between_0_and_1(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got"):
        ModelEMA(small(), decay)


def test_model_is_a_module():
    with pytest.raises(TypeError, match="model must be a module, got list"):
        ModelEMA([])


@pytest.mark.parametrize("change", [lambda model: model.append(nn.Linear(1, 1)), lambda model: model.pop(0),
                                    lambda model: model.__setitem__(0, nn.Conv2d(3, 1, 3))])  # fmt: skip
@pytest.mark.parametrize("method", ["update", "set"])
def test_another_model_is_refused(change, method):
    """A shape that broadcasts too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    ema = ModelEMA(model, 0.5)
    before = copy.deepcopy(ema.state_dict())
    change(model)
    train(model)
    with pytest.raises(ValueError, match=r"model must have the average's parameters and buffers; .* differs"):
        getattr(ema, method)(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in ema.state_dict().items())
