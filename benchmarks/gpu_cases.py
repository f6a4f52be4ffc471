"""Random arguments for every op: each backend against the reference in float64, and CUDA graphs against eager calls.

``python -m benchmarks.gpu_cases --help``. The same arguments come from the same seed on every machine.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

import nfnets_kernels as nfk
from benchmarks.clocks import captured, side_stream
from nfnets_kernels import backend as backends
from nfnets_kernels import ops
from nfnets_kernels.reference.scaled_activation import function_key
from tests.tolerances import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 2, 3, 7, 8, 16, 33, 64)
LENGTHS = (2, 9, 64, 255, 256, 576, 1000, 4608)
ACTIVATIONS = ("gelu", "relu", "silu", "sigmoid", "softplus", "tanh")
MOST_FAILURES = 20


@dataclass(frozen=True)
class Case:
    """An op with drawn arguments; ``run`` takes its inputs and a backend and returns its outputs.

    ``terms`` are what the longest sum adds up. A result of fewer dims than the inputs is such a sum, of terms that
    cancel down from about ``sum_size``.
    """

    op: str
    arguments: dict[str, object]
    inputs: list[Tensor]
    cotangents: list[Tensor]
    run: Callable[[Sequence[Tensor], str], Sequence[Tensor]]
    terms: int
    sum_size: float = 1.0
    variant: str | None = None

    def __str__(self) -> str:
        tensors = ", ".join(f"{tuple(x.shape)} {x.dtype} {x.stride()} +{x.storage_offset()}" for x in self.inputs)
        return f"{self.op} {self.arguments} of {tensors}"

    def results(self, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        """The outputs and, where the op is differentiable, the gradients of the inputs."""
        leaves = [x.detach().requires_grad_(bool(self.cotangents)) for x in inputs]
        outs = self.run(leaves, backend)
        if not self.cotangents:
            return list(outs)
        grads = [torch.empty_like(out).copy_(grad) for out, grad in zip(outs, self.cotangents, strict=True)]
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, grads)]


class Draw:
    """Random arguments for tensors on a device."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        """Normal values; 4-d tensors in either memory format, and some misaligned for wide accesses."""
        x = (torch.randn(shape, generator=self.generator, dtype=torch.float64) * size).to(self.device, dtype)
        if x.ndim == 4 and self.random.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        return duplicate(x, offset=self.random.choice((0, 0, 1)))

    def agc(self) -> Case:
        """Parameters and gradients of up to 12 shapes, with their options."""
        pick = self.random.choice
        shapes = [pick([(), (pick(LENGTHS),), (pick(SIZES), pick(LENGTHS)), (pick(SIZES), pick(SIZES), 3, 3),
                        (pick(SIZES), 1, 1, 1)]) for _ in range(self.random.randint(1, 12))]  # fmt: skip
        weights = [self.tensor(*shape, dtype=pick(DTYPES), size=10 ** self.random.uniform(-3, 1)) for shape in shapes]
        # float64 meets itself alone: what it is mixed with is accumulated in float32.
        dtypes = [weight.dtype if weight.dtype == torch.float64 else pick(DTYPES[:3]) for weight in weights]
        grads = [self.tensor(*shape, dtype=dtype, size=10 ** self.random.uniform(-3, 1))
                 for shape, dtype in zip(shapes, dtypes, strict=True)]  # fmt: skip
        clip_factor, eps = 10 ** self.random.uniform(-3, 0), pick((0.0, 1e-3, 1e-1))
        norm_type, rule = pick((1.0, 2.0, 2.0, 3.0, math.inf)), pick(ops.agc.RULES)

        def run(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
            clipped = [duplicate(grad, int(grad.storage_offset())) for grad in inputs[len(shapes) :]]
            ops.agc.agc_(inputs[: len(shapes)], clipped, clip_factor, eps, norm_type, rule, backend)
            return clipped

        arguments = {"clip_factor": clip_factor, "eps": eps, "norm_type": norm_type, "rule": rule}
        return Case("agc", arguments, weights + grads, [], run, max(map(math.prod, shapes)))

    def weight_standardize(self) -> Case:
        """Up to 8 weights of one dtype, with gains, into one output format.

        Not of so short a fan-in that next to nothing is left of a gradient without its two projections.
        """
        pick = self.random.choice
        dtype = pick(DTYPES)
        out_dtype = dtype if dtype == torch.float64 else pick((dtype, torch.float32, torch.bfloat16))
        memory_format = pick((torch.preserve_format, torch.contiguous_format, torch.channels_last))
        shapes = [
            (pick(SIZES), pick(SIZES[3:]), *pick(((1, 1), (3, 3), (7, 7)))) for _ in range(self.random.randint(1, 8))
        ]
        weights = [self.tensor(*shape, dtype=dtype, size=10 ** self.random.uniform(-2, 0)) for shape in shapes]
        gains = [self.tensor(shape[0], dtype=dtype) for shape in shapes]
        scales = [self.random.uniform(0.2, 2.0) for _ in shapes]
        eps, eps_form = pick((1e-4, 1e-6)), pick(ops.weight_standardize.EPS_FORMS)

        def run(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
            exact = inputs[0].dtype == torch.float64
            return nfk.functional.weight_standardize_many(
                inputs[: len(shapes)], inputs[len(shapes) :], scales=scales, eps=eps, eps_form=eps_form,
                dtype=None if exact else out_dtype, memory_format=memory_format, backend=backend,
            )  # fmt: skip

        cotangents = [self.tensor(*shape, dtype=out_dtype) for shape in shapes]
        arguments = {"dtype": out_dtype, "memory_format": memory_format, "eps": eps, "eps_form": eps_form}
        terms = max(math.prod(shape[1:]) for shape in shapes)
        return Case("weight_standardize", arguments, weights + gains, cotangents, run, terms)

    def scaled_activation(self) -> Case:
        """One activation of one tensor."""
        pick = self.random.choice
        name, approximate, dtype = pick(tuple(nfk.functional.GAMMA)), pick(("none", "tanh")), pick(DTYPES)
        shape = (pick(SIZES), 2 * pick(SIZES), pick(SIZES), pick(SIZES))
        out_shape = (shape[0], shape[1] // 2, *shape[2:]) if name == "glu" else shape

        def run(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
            return [nfk.functional.scaled_activation(inputs[0], name, approximate=approximate, backend=backend)]

        return Case(
            "scaled_activation", {"name": name, "approximate": approximate}, [self.tensor(*shape, dtype=dtype)],
            [self.tensor(*out_shape, dtype=dtype)], run, shape[1], variant=function_key(name, approximate),
        )  # fmt: skip

    def residual(self) -> Case:
        """A block's end with some of its factors."""
        pick = self.random.choice
        dtype, activation, alpha = pick(DTYPES), pick(ACTIVATIONS), pick((1.0, 0.2))
        shape = (pick(SIZES), pick(SIZES), pick(SIZES), pick(SIZES))
        factors = {"skip_gain": (), "se": shape[:2], "keep": shape[:1]}
        names = [name for name in factors if self.random.random() < 0.5]
        inputs = [self.tensor(*shape, dtype=dtype), self.tensor(*shape, dtype=dtype)]
        inputs += [self.tensor(*factors[name], dtype=dtype) for name in names]

        def run(inputs: Sequence[Tensor], backend: str) -> tuple[Tensor, Tensor]:
            given: dict[str, Any] = dict(zip(names, inputs[2:], strict=True))
            return nfk.functional.residual(
                inputs[0], inputs[1], alpha=alpha, activation=activation, scale=1.7, backend=backend, **given
            )

        terms = math.prod(shape)
        arguments = {"factors": names, "alpha": alpha, "activation": activation}
        cotangents = [self.tensor(*shape, dtype=dtype) for _ in range(2)]
        return Case("residual", arguments, inputs, cotangents, run, terms, math.sqrt(terms), activation)

    def cases(self) -> Iterator[Case]:
        """Every op in turn, without end."""
        for index in count():
            yield getattr(self, backends.OPS[index % len(backends.OPS)])()


def duplicate(x: Tensor, offset: int) -> Tensor:
    """A copy of dense x that starts `offset` elements into its storage."""
    return x.new_empty(x.numel() + offset).as_strided(x.shape, x.stride(), offset).copy_(x)


def check_backends(case: Case) -> None:
    """Raises AssertionError unless every backend that can serve the case is as accurate as its dtype allows."""
    expected = case.results([x.cpu().double() for x in case.inputs], "reference")
    device = case.inputs[0].device.type
    for backend in backends.BACKENDS[1:]:
        if backends.unavailable(case.op, backend, device, case.variant) is None:
            for index, (actual, exact) in enumerate(zip(case.results(case.inputs, backend), expected, strict=True)):
                check_result(case, f"{backend}, result {index}", actual.cpu(), exact)


def check_result(case: Case, what: str, actual: Tensor, expected: Tensor) -> None:
    """One output or gradient."""
    largest = expected.abs().max().item()
    magnitude = max(largest, case.sum_size) if expected.ndim < case.inputs[0].ndim else largest
    try:
        assert_accurate(actual, expected, unit_length=case.terms, ulps=4.0, magnitude=magnitude)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def check_graph(case: Case) -> None:
    """Raises AssertionError unless a CUDA graph of the case follows what its inputs hold when it is replayed."""
    for _ in range(2):  # what is compiled, allocated or collected once is then there
        case.results(case.inputs, "auto")
    replay = captured(lambda: case.results(case.inputs, "auto"))
    for _ in range(2):
        for x in case.inputs:
            x.copy_(torch.randn_like(x))
        torch.testing.assert_close(replay(), case.results(case.inputs, "auto"), rtol=0, atol=0, equal_nan=True)


def planned(case: Case) -> Case:
    """The clipping of an `agc` case by an `AGC` that keeps what it collected, of gradients that stay where they are."""
    half = len(case.inputs) // 2
    parameters = [nn.Parameter(weight) for weight in case.inputs[:half]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    clip = nfk.AGC(parameters).clip_

    def run(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_copy_(grads, list(inputs[half:]))
        clip()
        return [grad.clone() for grad in grads]

    return Case("agc", {"by": "AGC.clip_"}, case.inputs, [], run, case.terms)


def graph_cases(cases: Iterator[Case]) -> Iterator[Case]:
    """The cases, those of `agc` by `AGC` as well."""
    for case in cases:
        yield case
        if case.op == "agc":
            yield planned(case)


def run_checks(check: Callable[[Case], None], cases: Iterator[Case], seconds: float) -> int:
    """Check cases until their end or that of the time, print which fail, and return how many did."""
    start, done, failures = time.monotonic(), 0, 0
    for case in cases:
        try:
            check(case)
        except Exception as error:
            failures += 1
            print(f"failed: {case}\n  {type(error).__name__}: {error}", flush=True)
        done += 1
        if time.monotonic() - start > seconds or failures == MOST_FAILURES:
            break
    print(f"{failures} of {done} cases failed")
    return failures


def main() -> int:
    """Command line; 1 if a case failed."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_cases", description=__doc__)
    parser.add_argument("check", choices=("compare", "graphs"), help="backends with float64, or CUDA graphs with calls")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="at most so many")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="start none after so long")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    with side_stream(arguments.device):
        cases = islice(Draw(arguments.device, arguments.seed).cases(), arguments.cases)
        if arguments.check == "graphs":
            return int(run_checks(check_graph, graph_cases(cases), arguments.seconds) > 0)
        return int(run_checks(check_backends, cases, arguments.seconds) > 0)


if __name__ == "__main__":
    sys.exit(main())
