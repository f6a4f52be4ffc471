"""What the tests of the ops share: the backends to test, memory layouts, error bounds, fake and compiled tensors."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from nfnets_kernels import backend
from nfnets_kernels.ops.library import FLOAT_DTYPES, channels_last_format
from nfnets_kernels.reference.weight_standardize import accumulation_dtype

from .tolerances import assert_accurate, relative_bound

# The device whose kernels are tested: `NFK_TEST_DEVICE=cuda pytest` runs the same tests on a GPU.
DEVICE = os.environ.get("NFK_TEST_DEVICE", "cpu")
DTYPES = FLOAT_DTYPES
INFINITY = float("inf")
NAN = float("nan")

# What torch itself calls each function of ops.scaled_activation.
MODULES = {
    "identity": nn.Identity(),
    "celu": nn.CELU(),
    "elu": nn.ELU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "glu": nn.GLU(dim=1),
    "leaky_relu": nn.LeakyReLU(),
    "log_sigmoid": nn.LogSigmoid(),
    "log_softmax": nn.LogSoftmax(dim=1),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "selu": nn.SELU(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "softsign": nn.Softsign(),
    "softplus": nn.Softplus(),
    "tanh": nn.Tanh(),
}
ELEMENTWISE = [key for key in MODULES if key not in ("glu", "log_softmax")]
# f(x) is of the order of x near 0 too: the kernels keep that relative accuracy.
PROPORTIONAL = ("identity", "leaky_relu", "relu", "gelu", "gelu_tanh", "silu")


def named(key: str) -> tuple[str, str]:
    """The arguments name and approximate of a key of MODULES."""
    return ("gelu", "tanh") if key == "gelu_tanh" else (key, "none")


def value_size(x: Tensor, key: str) -> Tensor:
    """Size of the terms that cancel in each f(x)."""
    if key in PROPORTIONAL or x.numel() == 0:
        return x.abs()
    return 1.0 + torch.where(x.isfinite(), x, 0.0).abs().max()


def derivative_size(x: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    """Size of the terms that cancel in each f'(x), and in the float64 reference where that is all dtype has."""
    if key == "gelu_tanh" and dtype == torch.float64:
        return 1.0 + x.abs().clamp(max=8.0) ** 3  # torch's 1 - tanh(z)^2, times x z'
    if key == "silu" and dtype == torch.float64:
        return 1.0 + x.abs().clamp(max=40.0)  # torch's 1 - sigmoid(x), times x
    return torch.ones_like(x) if key in ELEMENTWISE else 1.0 + x.abs().max()


def instruction_sets() -> list[str]:
    """The instruction sets that this build has and this CPU runs."""
    offered = []
    assert backend.extension is not None, "nfnets_kernels._C is not built"
    for isa in ("baseline", "avx2", "avx512"):
        with contextlib.suppress(ValueError):
            backend.extension.select_isa(isa)
            offered.append(isa)
    backend.extension.select_isa("auto")
    return offered


def available(op: str, variant: str | None = None) -> list[str]:
    """The backends that serve an op on tensors of DEVICE."""
    return [name for name in backend.BACKENDS[1:] if backend.unavailable(op, name, DEVICE, variant) is None]


def targets(op: str, variant: str | None = None) -> list[str]:
    """The backends that serve an op on tensors of DEVICE, "cpu" once per instruction set: "cpu:avx2"."""
    isas = [f"cpu:{isa}" for isa in instruction_sets()]
    return [target for name in available(op, variant) for target in (isas if name == "cpu" else [name])]


def sized(size: int, small: int, target: str) -> int:
    """The size of a test's data, small where Triton's interpreter takes milliseconds per program."""
    return small if target == "triton" and backend.TRITON_INTERPRETED else size


@contextlib.contextmanager
def serving(target: str) -> Iterator[str]:
    """Selects the target's instruction set inside the `with` block, and yields the name of its backend."""
    name, _, isa = target.partition(":")
    try:
        if isa:
            backend.extension.select_isa(isa)
        yield name
    finally:
        backend.extension.select_isa("auto")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def offset(x: Tensor) -> Tensor:
    """A copy of dense x that starts one element into its storage: misaligned for vector loads."""
    return x.new_empty(x.numel() + 1).as_strided(x.shape, x.stride(), 1).copy_(x)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=channels_last_format(x))


# Copies with the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": channels_last,
    "offset": lambda x: offset(x.contiguous()),
    "offset_channels_last": lambda x: offset(channels_last(x)),
    "every_second": lambda x: torch.stack([x, torch.full_like(x, NAN)], dim=-1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1),
}


def randn(
    shape: Any, dtype: torch.dtype = torch.float32, layout: str | Callable[[Tensor], Tensor] = "contiguous"
) -> Tensor:
    """Normal numbers, laid out by one of LAYOUTS or by its name."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    lay_out = LAYOUTS[layout] if isinstance(layout, str) else layout
    return lay_out(torch.randn(shape, dtype=torch.float64).to(dtype)) if shape else torch.randn(()).to(dtype)


@contextlib.contextmanager
def nothing_else_written(*tensors: Tensor) -> Iterator[None]:
    """The `with` block leaves alone what lies beside the elements of these tensors in their memory."""
    beside = []
    for x in tensors:
        memory = x.detach().new_empty(0).set_(x.untyped_storage())
        outside = torch.ones(memory.shape, dtype=torch.bool)
        outside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
        beside.append((memory, outside, memory[outside]))
    yield
    for memory, outside, before in beside:
        torch.testing.assert_close(memory[outside], before, rtol=0, atol=0, equal_nan=True)


def assert_rounded_once(
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor,
    *,
    unit_length: int = 1,
    computed_in: torch.dtype | None = None,
) -> None:
    """`assert_accurate` for a result computed in its accumulation dtype and then rounded once.

    Args:
        actual: the result.
        expected: the reference in float64.
        magnitude: size of the terms of the accumulation dtype that cancel in each element.
        unit_length: as in `assert_accurate`.
        computed_in: the accumulation dtype; default that of actual's dtype.
    """
    computed_in = computed_in or accumulation_dtype(actual.dtype)
    if actual.dtype == torch.float64 and computed_in == torch.float32:
        torch.testing.assert_close(actual.float().double(), actual.detach(), rtol=0, atol=0, equal_nan=True)
        actual = actual.float()
    accumulated = relative_bound(computed_in, unit_length) / relative_bound(actual.dtype, unit_length, ulps=1.0)
    assert_accurate(actual, expected, unit_length=unit_length, ulps=1.0, magnitude=magnitude * accumulated)


def assert_same(actual: Any, expected: Any) -> None:
    """Bit for bit the same tensors, in the same dtypes and strides."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)


def assert_fake_is_real(function: Callable[..., Any], *args: Any) -> None:
    """On fake and on meta tensors the function returns the shapes, dtypes and strides that it really returns."""

    def layouts(results: Any) -> list[Any]:
        return [(x.shape, x.dtype, x.stride()) for x in tree_leaves(results)]

    def on_meta(x: Any) -> Any:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x

    real = layouts(function(*args))
    with FakeTensorMode() as mode:
        fake = function(*tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, args))
    assert layouts(fake) == real
    assert layouts(function(*tree_map(on_meta, args))) == real


def assert_differentiable_twice(function: Callable[..., Any], inputs: list[Tensor], eps: float = 1e-6) -> None:
    """gradcheck and gradgradcheck, on one thread: the tensors are tiny."""
    with threads(1):
        assert torch.autograd.gradcheck(function, inputs, eps=eps)
        assert torch.autograd.gradgradcheck(function, inputs, eps=eps)


def outputs_and_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """What the function returns for inputs, and the gradients of inputs for cotangents laid out as the outputs."""
    outputs = tree_leaves(function(*inputs))
    ramps = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape) for x in outputs]
    cotangents = [torch.empty_like(x).copy_(ramp) for x, ramp in zip(outputs, ramps, strict=True)]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, inputs, cotangents))


def assert_same_for_any_threads(function: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Outputs and gradients are the same, bit for bit, on 1 and 2 threads and from run to run."""
    runs = []
    for count in (1, 2, 2, 1):
        with threads(count):
            runs.append(outputs_and_gradients(function, inputs))
    for run in runs[1:]:
        assert_same(run, runs[0])


def assert_compiled_is_eager(
    function: Callable[..., Any], *input_lists: list[Tensor], compiler: str = "aot_eager", dynamic: bool | None = None
) -> None:
    """The compiled function, without graph breaks, returns and differentiates as the eager one for all lists of inputs.

    Bit for bit, but where inductor generates code for the arithmetic around the ops.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=dynamic)
    compare = torch.testing.assert_close if compiler == "inductor" else assert_same
    for inputs in input_lists:
        compare(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs))
