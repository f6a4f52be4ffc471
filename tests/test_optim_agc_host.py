"""What lets `nfk.AGC` skip its checks: a snapshot of how parameters and gradients lie, which notices every change."""

import ctypes
import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nfnets_kernels as nfk
from nfnets_kernels import AGC
from nfnets_kernels.ops.snapshot import snapshot_of

from .agc_cases import Net, assert_clips_as_agc_does, loss, parameter, random_pair, without_exchange_api

API = "__dlpack_c_exchange_api__"
SHAPE = (6, 6, 2, 2)

needs_the_api = pytest.mark.skipif(not hasattr(Tensor, API), reason="this torch does not describe its tensors")


@pytest.fixture(params=["Python", pytest.param("compiled", marks=needs_the_api)], autouse=True)
def kind(request, monkeypatch) -> str:
    if request.param == "Python":
        without_exchange_api(monkeypatch)
    return request.param


class Grown(Tensor):
    pass


def parameters_with_gradients() -> list[nn.Parameter]:
    """The third has no gradient, as a frozen one."""
    parameters = [parameter(*random_pair(SHAPE)) for _ in range(4)]
    parameters[2].grad = None
    for p in parameters:
        p.grad_dtype = None  # gradients may be of any
    return parameters


def test_it_is_of_the_kind_that_torch_allows(kind):
    module = type(snapshot_of(parameters_with_gradients())).__module__
    assert module == {"Python": "nfnets_kernels.ops.snapshot", "compiled": "nfnets_kernels._C"}[kind]


def test_it_gives_the_gradients_and_where_they_lie():
    parameters = parameters_with_gradients()
    snapshot = snapshot_of(parameters)
    for _ in range(2):
        for p in parameters[:2]:
            p.grad = random_pair(SHAPE)[1]
        grads, addresses = snapshot.gradients(parameters)
        expected = [parameters[i].grad for i in (0, 1, 3)]
        assert len(grads) == 3
        assert all(grad is other for grad, other in zip(grads, expected, strict=True))
        assert list(addresses) == [grad.data_ptr() for grad in expected]


def test_scalars_and_views_are_described():
    memory = torch.arange(8.0)
    parameters = [parameter(torch.tensor(1.0), torch.tensor(2.0)), parameter(memory[1:3], memory[5:7])]
    grads, addresses = snapshot_of(parameters).gradients(parameters)
    assert list(addresses) == [grads[0].data_ptr(), memory.data_ptr() + 20]


def requires_no_grad(p: nn.Parameter) -> None:
    p.requires_grad_(False)


def other_values(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(2)


def in_the_graph(p: nn.Parameter) -> None:
    p.grad = (p * 2).detach().requires_grad_()


@pytest.mark.parametrize("change", [requires_no_grad, other_values, in_the_graph])
def test_what_no_kernel_sees_is_no_change(change):
    parameters = parameters_with_gradients()
    snapshot = snapshot_of(parameters)
    change(parameters[1])
    assert snapshot.gradients(parameters) is not None


def with_data(make: Callable[[Tensor], Tensor]) -> Callable[[nn.Parameter], None]:
    return lambda p: setattr(p, "data", make(p.data))


def with_grad(make: Callable[[Tensor], Any]) -> Callable[[nn.Parameter], None]:
    return lambda p: setattr(p, "grad", make(p.grad))


def of_other_shape(shape: tuple[int, ...]) -> Callable[[nn.Parameter], None]:
    def change(p: nn.Parameter) -> None:
        memory = p.data
        p.data = torch.ones(shape)
        p.grad = torch.ones(shape)
        p.data = memory

    return change


def on_meta(p: nn.Parameter) -> None:
    torch.utils.swap_tensors(p, parameter(torch.ones(SHAPE, device="meta"), torch.ones(SHAPE, device="meta")))


CHANGES = {
    "memory": with_data(torch.clone),
    "dtype": with_data(Tensor.double),
    "dtype of twice the size, same memory": with_data(lambda data: data.view(torch.float64)),
    "strides": with_data(lambda data: data.transpose(0, 1)),
    "memory format": with_data(lambda data: data.contiguous(memory_format=torch.channels_last)),
    "shape": with_data(lambda data: data.view(6, 6, 4)),
    "last size": with_data(lambda data: data[..., :1]),
    "start": with_data(lambda data: data.as_strided(SHAPE, (20, 4, 2, 1), 1)),
    "device": on_meta,
    "type": lambda p: setattr(p, "__class__", Grown),
    "gradient: none": with_grad(lambda grad: None),
    "gradient: strides": with_grad(lambda grad: grad.transpose(0, 1)),
    "gradient: memory format": with_grad(lambda grad: grad.contiguous(memory_format=torch.channels_last)),
    "gradient: expanded": with_grad(lambda grad: grad[:1].expand(SHAPE)),
    "gradient: dtype": with_grad(Tensor.double),
    "gradient: bfloat16": with_grad(Tensor.bfloat16),
    "gradient: sparse": with_grad(Tensor.to_sparse),
    "gradient: parameter": with_grad(lambda grad: nn.Parameter(grad)),
    "gradient: subclass": with_grad(lambda grad: grad.as_subclass(Grown)),
    "gradient: its data": lambda p: setattr(p.grad, "data", p.grad.data.double()),
    "gradient: shape": of_other_shape((6, 6, 4)),
    "gradient: one size": of_other_shape((6, 6, 2, 1)),
    "gradient: empty": of_other_shape((0, 6, 2, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("i", [0, 3])
def test_every_change_of_a_tensor_is_noticed(change, i):
    parameters = parameters_with_gradients()
    snapshot = snapshot_of(parameters)
    CHANGES[change](parameters[i])
    assert snapshot.gradients(parameters) is None
    assert sys.exc_info() == (None, None, None)


@pytest.mark.parametrize("of", ["parameter", "gradient"])
def test_another_dtype_of_that_size_in_the_same_memory_is_noticed(of):
    p = parameter(*random_pair(SHAPE, torch.bfloat16))
    snapshot = snapshot_of([p])
    tensor = p if of == "parameter" else p.grad
    tensor.data = tensor.data.view(torch.float16)
    assert snapshot.gradients([p]) is None


def test_a_gradient_where_none_was_is_noticed():
    parameters = parameters_with_gradients()
    snapshot = snapshot_of(parameters)
    parameters[2].grad = torch.ones(SHAPE)
    assert snapshot.gradients(parameters) is None
    parameters[2].grad = None
    assert snapshot.gradients(parameters) is not None


@pytest.mark.parametrize("change", [
    lambda ps: ps[:-1],
    lambda ps: [*ps, parameter(*random_pair(SHAPE))],
    lambda ps: [ps[1], ps[0], *ps[2:]],
    lambda ps: [parameter(ps[0].data, ps[0].grad), *ps[1:]],
    lambda ps: [*ps[:2], nn.Parameter(torch.ones(SHAPE)), ps[3]],
    lambda ps: [*ps[:2], None, ps[3]],
    lambda ps: [],
], ids=["fewer", "more", "swapped", "same memory", "without gradient", "None", "empty"])  # fmt: skip
def test_other_parameters_are_noticed(change):
    parameters = parameters_with_gradients()
    assert snapshot_of(parameters).gradients(change(parameters)) is None


def test_references_do_not_pile_up():
    parameters = parameters_with_gradients()
    snapshot = snapshot_of(parameters)
    others = [*parameters[:3], parameter(*random_pair(SHAPE))]
    sparse = parameter(torch.ones(3), torch.ones(3))
    of_sparse = snapshot_of([sparse])
    sparse.grad = torch.ones(3).to_sparse()
    held = [*parameters, *others, *[parameters[i].grad for i in (0, 1, 3)], sparse, sparse.grad]
    before = [sys.getrefcount(x) for x in held]
    for _ in range(1000):
        assert snapshot.gradients(parameters) is not None
        assert snapshot.gradients(others) is None
    for _ in range(20):  # torch collects a C++ stack trace for each of these
        assert of_sparse.gradients([sparse]) is None
    for _ in range(100):
        snapshot_of(parameters)
    assert [sys.getrefcount(x) for x in held] == before


def test_gradients_live_no_longer_than_their_step():
    model = Net()
    agc = AGC(model)
    for _ in range(3):
        loss(model).backward()
        agc.clip_()
        last = weakref.ref(model.stem.weight.grad)
        model.zero_grad()
    assert last() is None


def _unchanged(model: nn.Module, grad: Tensor) -> Tensor:
    return grad


def test_a_model_that_owns_its_clipping_is_collected():
    model = Net()
    model.agc = AGC(model)
    model.stem.weight.register_hook(functools.partial(_unchanged, model))  # parameter -> hook -> model
    for _ in range(2):
        model.zero_grad()
        loss(model).backward()
        model.agc.clip_()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_frozen_parameters_are_no_change(monkeypatch):
    model = Net()
    model.stem.requires_grad_(False)
    agc = AGC(model)
    for step in range(3):
        model.zero_grad()
        loss(model).backward()
        agc.clip_()
        if step == 0:
            monkeypatch.setattr(nfk.ops.agc, "with_gradients", None)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("cpu")])
def test_modes(mode):
    parameters = [parameter(*random_pair(SHAPE)) for _ in range(3)]
    agc = AGC(parameters)
    for _ in range(3):
        with mode():
            for p in parameters:
                p.grad = random_pair(SHAPE)[1]
            assert_clips_as_agc_does(agc, parameters)


def test_two_threads_clip_two_models():
    failures: list[BaseException] = []

    def train(size: int) -> None:
        try:
            parameters = [parameter(*random_pair((size, 50))) for _ in range(20)]
            agc = AGC(parameters)
            for _ in range(50):
                for p in parameters:
                    p.grad = random_pair((size, 50))[1]
                assert_clips_as_agc_does(agc, parameters)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(size,)) for size in (40, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Header(ctypes.Structure):
    """The stable beginning of DLPack's exchange API."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p)]


def capsule_of(header: Header, name: bytes = b"dlpack_exchange_api") -> Any:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(ctypes.addressof(header), name, None)


@needs_the_api
def test_of_a_newer_api_the_version_that_is_known_is_used(monkeypatch):
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    name = b"dlpack_exchange_api"
    parameters = parameters_with_gradients()
    monkeypatch.undo()
    known = Header(3, 0, ctypes.addressof(older := Header(2, 0, address(getattr(Tensor, API), name))))
    assert older.major == 2
    unknown = Header(2, 0, None)
    for api, module in [
        (capsule_of(known), "nfnets_kernels._C"),
        (capsule_of(unknown), "nfnets_kernels.ops.snapshot"),
        (capsule_of(known, b"another_api"), "nfnets_kernels.ops.snapshot"),
        (3, "nfnets_kernels.ops.snapshot"),
    ]:
        monkeypatch.setattr(Tensor, API, api)
        snapshot = snapshot_of(parameters)
        assert type(snapshot).__module__ == module
        assert len(snapshot.gradients(parameters)[0]) == 3
