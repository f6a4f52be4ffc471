"""Compiles what the ops launch, for GPUs that need not be there: `python -m tests.triton_compile 0 2`.

A program of its own, since the tests' process has Triton's interpreter on. The arguments 0 and 2 ask for every second
job from the first on; a job is a case on a target. Prints a line of JSON per launch.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import nfnets_kernels as nfk
import nfnets_kernels.triton_kernels.launch as launching
from nfnets_kernels import backend
from nfnets_kernels.reference.scaled_activation import GAMMA

from .helpers import LAYOUTS, offset

TARGETS = (80, 90, 100)
FACTORS = ("skip_gain", "se", "keep")

_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+ +)?([a-z][\w.:]*)\s+(.+);", re.MULTILINE)
_NAME = re.compile(r"%\w+|_param_\d+")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


class Driver:
    """What Triton asks of a GPU before it launches. The device's number is its capability: Triton caches by device."""

    capability = 90

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def accesses(ptx: str, signature: dict[str, str]) -> dict[str, int]:
    """Bytes of the widest access to each tensor in global memory: {"ld x": 16, "st out": 4}.

    A tensor is a pointer among the kernel's parameters or, as "entry %rd7", one that a register took from the table
    "pointers". Addresses are followed back to it through the instructions that computed them.
    """
    parameters = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    # a 64-bit integer is the address of a scalar
    pointers = {
        f"_param_{i}": name for i, (name, kind) in enumerate(parameters) if kind.startswith("*") or kind == "i64"
    }
    sources: dict[str, set[str]] = defaultdict(set)
    loaded_from: dict[str, str] = {}
    found = []
    for operation, operands in _INSTRUCTION.findall(ptx):
        if operation.startswith(("ld.global", "st.global")):
            values, address = (_NAME.findall(part) for part in re.findall(r"\[.*?\]|[^\[\]]+", operands)[:2])
            if operation.startswith("st"):
                values, address = address, values
            else:
                loaded_from |= dict.fromkeys(values, address[0])
            vector = re.search(r"\.v(\d)", operation)
            width = int(vector[1] if vector else 1) * int(re.search(r"(\d+)$", operation)[1]) // 8
            found.append((operation[:2], address[0], width))
        elif names := _NAME.findall(operands):
            written = len(_NAME.findall(re.match(r"\{.*?\}|[^,]*", operands)[0]))
            for name in names[:written]:
                sources[name].update(names[written:])

    def tensor(address: str) -> str:
        reached, ahead = set(), [address]
        while ahead:
            name = ahead.pop()
            if name not in reached:
                reached.add(name)
                ahead += sources.get(name, ())
        entries = sorted(r for r in reached & loaded_from.keys() if tensor(loaded_from[r]).startswith("pointers"))
        return " ".join(["entry", *entries] if entries else sorted(pointers[p] for p in reached & pointers.keys()))

    widest: dict[str, int] = defaultdict(int)
    for kind, address, width in found:
        key = f"{kind} {tensor(address)}"
        widest[key] = max(widest[key], width)
    return dict(widest)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack, where registers spill to, and of other local memory."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = re.search(_RESOURCES, report)
    assert figures, report
    return dict(zip(("registers", "stack", "local"), map(int, figures.groups()), strict=True))


def weight_standardize(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    layout: str = "contiguous",
    gain: bool = False,
    out_format: torch.memory_format = torch.preserve_format,
    eps_form: str = "clamp",
) -> None:
    weights = [LAYOUTS[layout](torch.ones(shape, dtype=dtype)).requires_grad_() for shape in shapes]
    gains = [torch.ones(len(weight), dtype=dtype, requires_grad=True) for weight in weights if gain]
    outs = nfk.functional.weight_standardize_many(
        weights, gains, eps_form=eps_form, dtype=out_dtype, memory_format=out_format, backend="triton"
    )
    grads = [offset(torch.ones_like(x)) if layout == "offset" else torch.ones_like(x) for x in outs]
    torch.autograd.grad(outs, weights + gains, grads)


def agc(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    layout: str = "contiguous",
    norm: float = 2.0,
    counted: bool = False,
) -> None:
    weights, grads = ([LAYOUTS[layout](torch.ones(s, dtype=d)) for s in shapes] for d in (dtype, grad_dtype))
    statistics = statistics_of(shapes) if counted else None
    nfk.ops.agc.agc_(weights, grads, 0.01, 1e-3, norm, "timm", "triton", statistics)


def statistics_of(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    return [torch.zeros(shape[0] if len(shape) > 1 else 1, 3) for shape in shapes]


def sgd_agc(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    layout: str = "contiguous",
    states: bool = True,
    counted: bool = False,
    clip_factor: float | None = 0.01,
) -> None:
    """states: momentum buffers and averages."""
    accumulated = torch.promote_types(dtype, torch.float32)
    weights, grads, momentum_buffers, averages = (
        [LAYOUTS[layout](torch.ones(s, dtype=d)) for s in shapes] for d in (dtype, grad_dtype, dtype, accumulated)
    )
    if not states:
        momentum_buffers, averages = [], []
    statistics = statistics_of(shapes) if counted else []
    hyper = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 2e-5, "nesterov": True, "maximize": False}
    nfk.ops.sgd_agc.sgd_agc_(
        weights, grads, momentum_buffers, averages, statistics, *[torch.ones(())] * 3,
        *hyper.values(), clip_factor, 1e-3, 0.999, "timm", "triton",
    )  # fmt: skip


def scaled_activation(dtype: torch.dtype, name: str, layout: str = "contiguous", approximate: str = "none") -> None:
    x = LAYOUTS[layout](torch.ones(2, 32, 16, 16, dtype=dtype)).requires_grad_()
    out = nfk.functional.scaled_activation(x, name, approximate=approximate, backend="triton")
    torch.autograd.grad(out, x, LAYOUTS[layout](torch.ones_like(out)))


def bias_activation(dtype: torch.dtype, name: str, layout: str = "contiguous") -> None:
    x = LAYOUTS[layout](torch.ones(2, 32, 16, 16, dtype=dtype)).requires_grad_()
    bias = torch.ones(32, dtype=torch.float32, requires_grad=True)
    out = nfk.functional.scaled_activation(x, name, bias=bias, backend="triton")
    torch.autograd.grad(out, [x, bias], LAYOUTS[layout](torch.ones_like(out)))


def residual(dtype: torch.dtype, name: str, layout: str = "contiguous", factors: tuple[str, ...] = FACTORS) -> None:
    f, shortcut = (LAYOUTS[layout](torch.ones(2, 32, 16, 16, dtype=dtype)).requires_grad_() for _ in range(2))
    shapes = {"skip_gain": (), "se": (2, 32), "keep": (2,), "bias": (32,)}
    given = {factor: torch.ones(shapes[factor], dtype=dtype, requires_grad=True) for factor in factors}
    outs = nfk.functional.residual(f, shortcut, **given, activation=name, backend="triton")
    torch.autograd.grad(outs, [f, shortcut, *given.values()], [LAYOUTS[layout](torch.ones_like(x)) for x in outs])


@triton.jit
def every_third_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK) * 3
    tl.store(out + at, tl.load(x + at))


@triton.jit
def spilling_kernel(x, out, BLOCK: tl.constexpr):
    """Holds BLOCK values while it waits for another."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    for i in range(4):
        tl.store(out + at, values + tl.load(out + i))
    tl.store(out + at, values)


def launch_faulty(kernel: Any, block: int) -> None:
    x = torch.zeros(3 * block)
    launching.launch(kernel, 1, x.device, num_warps=1, x=x, out=torch.zeros(3 * block), BLOCK=block)


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
WIDE = [(64, 64, 1, 1)]
# The lengths and alignments of a network's units: single elements, 147 of the first convolution, all powers of two, 9/8
# of them.
MODEL = [
    (64,), (64, 1, 1, 1), (64, 3, 7, 7), (64, 64, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1), (128, 128, 3, 3),
    (256, 256, 3, 3), (512, 512, 3, 3), (512, 2048, 1, 1), (1000, 2048),
]  # fmt: skip
CONVOLUTIONS = MODEL[2:]

# "offset" tensors start one element behind a multiple of 16 bytes; the others start at one, and so do all their rows.
ALIGNED, MISALIGNED = ("contiguous", "channels_last"), "offset"
STREAMING: dict[str, Callable[..., None]] = {
    "weight_standardize float32": partial(weight_standardize, F32, F32, WIDE),
    "weight_standardize mixed": partial(weight_standardize, F32, BF16, WIDE),
    "weight_standardize bfloat16": partial(weight_standardize, BF16, BF16, WIDE),
    "agc float32": partial(agc, F32, F32, WIDE),
    "agc mixed": partial(agc, F32, BF16, WIDE),
    "agc bfloat16": partial(agc, BF16, BF16, WIDE),
    "sgd_agc float32": partial(sgd_agc, F32, F32, WIDE),
    "sgd_agc bfloat16": partial(sgd_agc, BF16, BF16, WIDE),
    "scaled_activation float32": partial(scaled_activation, F32, "gelu"),
    "scaled_activation bfloat16": partial(scaled_activation, BF16, "gelu"),
    "residual float32": partial(residual, F32, "gelu"),
    "residual bfloat16": partial(residual, BF16, "gelu"),
    "bias_activation float32": partial(bias_activation, F32, "relu"),
    "bias_activation bfloat16": partial(bias_activation, BF16, "gelu"),
    "residual bias float32": partial(residual, F32, "relu", factors=("bias",)),
    "residual bias bfloat16": partial(residual, BF16, "relu", factors=("bias",)),
}
CASES: dict[str, Callable[[], None]] = {
    **{
        f"{name}, {layout}": partial(run, layout=layout)
        for name, run in STREAMING.items()
        for layout in (*ALIGNED, MISALIGNED)
    },
    "weight_standardize model": partial(weight_standardize, F32, BF16, CONVOLUTIONS, gain=True),
    "weight_standardize channels_last": partial(
        weight_standardize, F32, BF16, CONVOLUTIONS[1:3], gain=True, out_format=torch.channels_last
    ),
    "weight_standardize float64": partial(weight_standardize, F64, F64, CONVOLUTIONS[:2], gain=True),
    "weight_standardize float16": partial(weight_standardize, F16, F16, CONVOLUTIONS[:2], eps_form="add"),
    "weight_standardize long": partial(weight_standardize, F32, F32, [(2, 50_000)]),
    "agc model": partial(agc, F32, F32, MODEL),
    "agc float64": partial(agc, F64, F64, MODEL[:4]),
    "agc float16": partial(agc, F16, F16, MODEL[:4]),
    "agc norm 1": partial(agc, F32, F32, WIDE, norm=1.0),
    "agc norm inf": partial(agc, F32, F32, WIDE, norm=float("inf")),
    "agc norm 3": partial(agc, F32, F32, WIDE, norm=3.0),
    "agc long": partial(agc, F32, F32, [(2, 50_000)]),
    "agc counted": partial(agc, F32, F32, [*MODEL[:3], (2, 50_000)], counted=True),
    "sgd_agc model": partial(sgd_agc, F32, F32, [*MODEL, (2, 50_000)], counted=True),
    "sgd_agc mixed": partial(sgd_agc, F32, BF16, MODEL[:3]),
    "sgd_agc float64": partial(sgd_agc, F64, F64, MODEL[:3]),
    "sgd_agc without states": partial(sgd_agc, F32, F32, WIDE, states=False),
    "sgd_agc without clipping": partial(sgd_agc, F32, F32, WIDE, clip_factor=None),
    **{f"scaled_activation {name}": partial(scaled_activation, F32, name) for name in GAMMA},
    "scaled_activation gelu_tanh": partial(scaled_activation, F32, "gelu", approximate="tanh"),
    "scaled_activation float64": partial(scaled_activation, F64, "gelu"),
    "scaled_activation float16": partial(scaled_activation, F16, "silu"),
    "residual no factor": partial(residual, BF16, "relu", factors=()),
    "residual every factor and bias": partial(residual, BF16, "gelu", factors=(*FACTORS, "bias")),
    "residual every factor and bias, float32 in channels_last": partial(
        residual, F32, "gelu", layout="channels_last", factors=(*FACTORS, "bias")
    ),
    "residual skip_gain": partial(residual, BF16, "relu", factors=("skip_gain",)),
    "residual float64": partial(residual, F64, "gelu"),
    "residual float16": partial(residual, F16, "silu"),
}
FAULTY = {
    "every third": partial(launch_faulty, every_third_kernel, 128),
    "spilling": partial(launch_faulty, spilling_kernel, 16384),
}

_found: list[dict[str, Any]] = []


def first_cause(error: BaseException) -> str:
    """Triton wraps an error once for every call on the way from the kernel to the line that it means."""
    return str(error) if error.__cause__ is None else first_cause(error.__cause__)


def compile_only(kernel: Any, grid: int, device: torch.device, *, num_warps: int = 4, **arguments: Any) -> None:
    """In place of `launch.launch`: compiles the kernel for these arguments as the launch would."""
    program = kernel.run(grid=(grid,), warmup=True, num_warps=num_warps, **arguments)
    figures = {"kernel": kernel.__name__, "accesses": accesses(program.asm["ptx"], program.src.signature)}
    _found.append(figures | resources(program.asm["cubin"]))


def main(first: int, step: int) -> None:
    driver.set_active(Driver())
    backend.TRITON_INTERPRETED = True  # lets Triton serve CPU tensors
    launching.launch = compile_only  # before the modules of the kernels import it
    jobs = list(itertools.product({**CASES, **FAULTY}.items(), TARGETS))
    for (case, run), driver.active.capability in jobs[first::step]:
        _found.clear()
        try:
            run()
        except Exception as error:  # the other cases are compiled all the same
            _found.append({"error": first_cause(error)})
        for figures in _found:
            print(json.dumps({"case": case, "capability": driver.active.capability, **figures}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
