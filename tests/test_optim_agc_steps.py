"""`nfk.AGC` over many steps: what it remembers of the first never makes a later one differ from `nfk.agc_`."""

import math

import pytest
import torch
from torch import Tensor, nn

import nfnets_kernels as nfk
from nfnets_kernels import AGC

from .agc_cases import (
    ALL,
    KERNELS,
    Net,
    assert_clips_as_agc_does,
    changed,
    loss,
    parameter,
    random_pair,
    using,
    with_gradients,
    without_exchange_api,
)


@pytest.fixture(params=[False, True], ids=["", "Python"], autouse=True)
def snapshots_in_python(request, monkeypatch) -> None:
    """Every step also as it is where torch is older than 2.11."""
    if request.param:
        without_exchange_api(monkeypatch)


BAD_OPTIONS = [("clip_factor", -1.0), ("eps", math.nan), ("norm_type", 0.0), ("rule", "lamb"), ("backend", "tpu")]


@pytest.mark.parametrize("options", [
    {},
    {"clip_factor": 0.02, "eps": 1e-2, "norm_type": 1.0, "rule": "deepmind"},
    {"clip_factor": 0.02, "backend": "reference"},
    {"norm_type": math.inf, "backend": "cpu"},
], ids=str)  # fmt: skip
def test_every_step_gives_what_agc_gives(options):
    model = Net()
    agc = AGC(model, **options)
    for _ in range(4):
        model.zero_grad()
        loss(model).backward()
        with nfk.backend.recording() as record:
            assert_clips_as_agc_does(agc, list(model.parameters()), **options)
        assert record == [("agc", options.get("backend", "cpu"))] * 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_serves_every_step(kernel):
    parameters = [parameter(*random_pair(shape)) for shape in ((70, 700), (300,), (4, 5, 3, 3))]
    with using(kernel) as backend:
        agc = AGC(parameters, backend=backend)
        for _ in range(3):
            for p in parameters:
                p.grad = random_pair(p.shape)[1]
            assert_clips_as_agc_does(agc, parameters, backend=backend)


def test_from_the_second_step_on_nothing_is_checked_again(monkeypatch):
    model = with_gradients()
    agc = AGC(model)
    agc.clip_()
    monkeypatch.setattr(nfk.ops.agc, "with_gradients", None)
    model.zero_grad()
    loss(model).backward()
    assert changed(model, agc) == ALL


def test_a_scheduled_clip_factor_needs_no_checking_again(monkeypatch):
    model = with_gradients()
    agc = AGC(model)
    agc.clip_()
    with monkeypatch.context() as patch:
        patch.setattr(nfk.ops.agc, "with_gradients", None)
        for agc.clip_factor in (0.02, 0.03, 0.04):
            model.zero_grad()
            loss(model).backward()
            assert changed(model, agc) == ALL
    model.zero_grad()
    loss(model).backward()
    assert_clips_as_agc_does(agc, list(model.parameters()), clip_factor=0.04)


def test_gradients_may_come_and_go():
    model = Net()
    agc = AGC(model)
    agc.clip_()
    assert changed(model, agc) == set()
    model.stem.requires_grad_(False)
    for set_to_none in (True, False, True):
        loss(model).backward()
        assert changed(model, agc) == ALL - {"stem.weight", "stem.bias"}
        model.zero_grad(set_to_none=set_to_none)
    model.stem.requires_grad_(True)
    loss(model).backward()
    assert changed(model, agc) == ALL


@pytest.mark.parametrize("name, value", [("clip_factor", 0.003), ("eps", 9.0), ("norm_type", 1.0), ("norm_type", 3.0),
                                         ("rule", "deepmind"), ("backend", "reference")])  # fmt: skip
def test_options_may_be_set_between_steps(name, value):
    parameters = [parameter(*random_pair(shape)) for shape in ((5, 1, 1, 1), (6, 35))]
    agc = AGC(parameters)
    agc.clip_()
    setattr(agc, name, value)
    with nfk.backend.recording() as record:
        for _ in range(2):
            for p in parameters:
                p.grad = 100 * random_pair(p.shape)[1]
            assert_clips_as_agc_does(agc, parameters, **{name: value})
    assert record == [("agc", value if name == "backend" else "cpu")] * 4


@pytest.mark.parametrize("name, value", BAD_OPTIONS)
def test_bad_options_set_between_steps_are_refused(name, value):
    p = parameter(*random_pair((6, 35)))
    agc = AGC([p])
    agc.clip_()
    p.grad = torch.ones(6, 35)
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        setattr(agc, name, value)
        agc.clip_()
    assert (p.grad == 1.0).all()


def other_dtype_at_the_same_address(p: nn.Parameter) -> None:
    with torch.no_grad():
        half = p.detach().flatten().half()
        memory = p.data.flatten().view(torch.half)
        memory[: half.numel()] = half
        p.data = memory[: half.numel()].view(p.shape)


SWAPS = {
    "dtype": lambda p: setattr(p, "data", p.data.bfloat16()),
    "double": lambda p: setattr(p, "data", p.data.double()),
    "memory format": lambda p: setattr(p, "data", p.data.contiguous(memory_format=torch.channels_last)),
    "memory": lambda p: setattr(p, "data", 3 * p.data),
    "values": lambda p: p.data.mul_(3),
    "transposed in place": lambda p: setattr(p, "data", p.data.transpose(0, 1)),
    "other shape, same memory": lambda p: setattr(p, "data", p.data.view(36, 1, 1, 1)),
    "shorter, same memory": lambda p: setattr(p, "data", p.data[:3]),
    "gaps, same start": lambda p: setattr(p, "data", p.data[:, :3]),
    "other dtype, same memory": other_dtype_at_the_same_address,
}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("rule", ["timm", "deepmind"])
def test_it_follows_parameters_whose_data_is_swapped(swap, rule):
    parameters = [parameter(*random_pair((6, 6, 1, 1))) for _ in range(3)]
    agc = AGC(parameters, rule=rule)
    agc.clip_()
    for p in parameters[:2]:
        p.grad = None
        SWAPS[swap](p)
    for _ in range(2):
        for p in parameters:
            p.grad = random_pair(p.shape, p.dtype)[1].contiguous()
        assert_clips_as_agc_does(agc, parameters, rule=rule)


@pytest.mark.parametrize("move", [
    lambda model: model.to(torch.bfloat16),
    lambda model: model.double(),
    lambda model: model.to(memory_format=torch.channels_last),
    lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}),
])  # fmt: skip
def test_it_follows_a_model_that_moves(move):
    model = with_gradients()
    agc = AGC(model)
    agc.clip_()
    move(model)
    for _ in range(2):
        model.zero_grad()
        loss(model).backward()
        assert_clips_as_agc_does(agc, list(model.parameters()))


@pytest.mark.parametrize("width", [256, 512])
def test_it_follows_a_model_that_is_moved_twice_between_two_steps(width):
    """The memory that the first move frees may be the second's: same address, other dtype."""
    model = nn.Linear(width, width, bias=False)
    agc = AGC(model)
    for first, second in (
        (torch.float64, torch.float16),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
    ):
        model.weight.grad = torch.randn_like(model.weight)
        agc.clip_()
        model.to(first).to(second)
        model.weight.grad = torch.randn_like(model.weight)
        assert_clips_as_agc_does(agc, [model.weight])


def make_sparse(p: nn.Parameter) -> None:
    p.grad = torch.ones(p.shape).to_sparse()


def make_expanded(p: nn.Parameter) -> None:
    p.grad = torch.ones(p.shape[1:]).expand(p.shape)


def reshape(p: nn.Parameter) -> None:
    p.data = torch.ones(4, 9)


def reshape_in_place(p: nn.Parameter) -> None:
    p.data = p.data.view(4, 9)


@pytest.mark.parametrize("spoil, error, message", [
    (make_sparse, TypeError, r"parameters\[1\].grad must be a dense"),
    (make_expanded, ValueError, r"parameters\[1\].grad may hold one element twice"),
    (reshape, ValueError, r"parameters\[1\].grad must have the shape \(4, 9\)"),
    (reshape_in_place, ValueError, r"parameters\[1\].grad must have the shape \(4, 9\)"),
])  # fmt: skip
def test_what_cannot_be_clipped_in_a_later_step_is_named_and_nothing_is_written(spoil, error, message):
    parameters = [parameter(torch.ones(6, 6), torch.ones(6, 6)) for _ in range(3)]
    agc = AGC(parameters)
    agc.clip_()
    for p in parameters:
        p.grad = torch.full((6, 6), 7.0)
    spoil(parameters[1])
    with pytest.raises(error, match=message):
        agc.clip_()
    assert (parameters[0].grad == 7.0).all()
    assert (parameters[2].grad == 7.0).all()


@pytest.mark.parametrize("view", ["transposed", "every second", "channels_last"])
def test_gradients_may_change_their_layout(view):
    p = parameter(*random_pair((6, 6, 2, 2)))
    agc = AGC([p])
    agc.clip_()
    for _ in range(2):
        grad = random_pair((6, 6, 2, 2))[1]
        p.grad = {
            "transposed": grad.transpose(0, 1),
            "every second": torch.stack([grad, grad], dim=-1)[..., 0],
            "channels_last": grad.contiguous(memory_format=torch.channels_last),
        }[view]
        assert_clips_as_agc_does(agc, [p])
        p.grad = random_pair((6, 6, 2, 2))[1]
        assert_clips_as_agc_does(agc, [p])


def test_gradients_may_change_their_dtype():
    p = parameter(*random_pair((6, 35)))
    p.grad_dtype = None
    agc = AGC([p])
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16, torch.float64, torch.float16):
        p.grad = random_pair((6, 35), dtype)[1]
        assert_clips_as_agc_does(agc, [p])


def test_every_step_bumps_the_version_of_the_gradients_alone():
    model = Net()
    agc = AGC(model)
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        loss(model).backward()
        weights, grads = ([q._version for q in qs] for qs in (model.parameters(), [p.grad for p in model.parameters()]))
        agc.clip_()
        assert [p._version for p in model.parameters()] == weights
        assert all(p.grad._version > old for p, old in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_into_one_graph(compiler):
    model = with_gradients()
    agc = AGC(model, exclude=["fc"])

    def double_clipped() -> Tensor:
        agc.clip_()
        return model.stem.weight.grad * 2

    torch._dynamo.reset()
    compiled = torch.compile(double_clipped, fullgraph=True, backend=compiler)
    for _ in range(2):
        model.zero_grad()
        loss(model).backward()
        before = model.stem.weight.grad.clone()
        doubled = compiled()
        assert torch.equal(doubled, 2 * model.stem.weight.grad)
        model.stem.weight.grad = before
        nfk.agc_(model.stem.weight)
        assert torch.equal(doubled, 2 * model.stem.weight.grad)


def test_a_training_loop_that_explodes_without_clipping_learns_with_it():
    def train(clip: bool) -> float:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        agc = AGC(model, clip_factor=0.05, exclude=["fc"]) if clip else None
        for _ in range(25):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            nn.utils.clip_grad_value_(model.fc.parameters(), 0.1)
            if agc is not None:
                before = [p.detach().clone() for p in model.parameters()]
                agc.clip_()
                for p, old in zip(model.parameters(), before, strict=True):
                    assert torch.equal(p, old), "clipping touched a parameter"
            optimizer.step()
        return value.item() / 100

    assert not train(clip=False) < math.log(5)
    assert train(clip=True) < 0.5 * math.log(5)
