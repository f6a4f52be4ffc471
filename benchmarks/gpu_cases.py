"""Random arguments for every op: each backend against the reference in float64, and CUDA graphs against eager calls.

``python -m benchmarks.gpu_cases --help``. The same arguments come from the same seed on every machine.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice

import torch
from torch import Tensor, nn

import nfnets_kernels as nfk
from benchmarks.clocks import captured, side_stream
from benchmarks.gpu_draw import Case, Draw
from nfnets_kernels import backend as backends
from tests.tolerances import assert_accurate

# What has kernels for which ops, said once more: here a backend that serves none of them any longer is missed.
KERNELS = {"cuda": ("agc", "sgd_agc", "weight_standardize"), "triton": backends.OPS, "reference": backends.OPS}
MOST_FAILURES = 20

# Checks a case on those of the named backends that serve it, and gives their names.
Check = Callable[[Case, Sequence[str]], Sequence[str]]


@dataclass
class Tally:
    """What was checked: cases, how many failed, and how often each backend ran each op without failing."""

    cases: int = 0
    failures: int = 0
    runs: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        by_op: dict[str, list[str]] = {}
        for (op, backend), times in self.runs.items():
            by_op.setdefault(op, []).append(f"{backend} {times}")
        lines = [f"{op}: {', '.join(backends)} cases right" for op, backends in by_op.items()]
        return "\n".join([*lines, f"{self.failures} of {self.cases} cases failed"])

    def missing(self, chosen: Sequence[str], expected: Sequence[str]) -> list[str]:
        """The ops that never ran right on an expected backend that has a kernel for them."""
        pairs = [(op, backend) for backend in expected for op in chosen if op in KERNELS[backend]]
        return [f"{op} on {backend}" for op, backend in pairs if not self.runs[op, backend]]


def serving(case: Case, names: Sequence[str]) -> list[str]:
    """Those of the named backends that can serve the case where its tensors are."""
    device = case.inputs[0].device.type
    return [name for name in names if backends.unavailable(case.op, name, device, case.variant) is None]


def check_backends(case: Case, names: Sequence[str]) -> Sequence[str]:
    """Raises AssertionError unless every backend that can serve the case is as accurate as its dtype allows."""
    expected = case.results([x.cpu().double() for x in case.inputs], "reference")
    served = serving(case, names)
    for backend in served:
        with backends.recording() as executed:
            results = case.results(case.inputs, backend)
        assert set(executed) == {(case.op, backend)}, f"{backend} was asked for, and {set(executed)} ran"
        for index, (actual, exact, terms) in enumerate(zip(results, expected, case.terms, strict=True)):
            check_result(case, f"{backend}, result {index}", actual.cpu(), exact, terms)
    return served


def check_result(case: Case, what: str, actual: Tensor, expected: Tensor, terms: int) -> None:
    """One output or gradient."""
    largest = expected.abs().max().item()
    magnitude = max(largest, case.sum_size) if expected.ndim < case.inputs[0].ndim else largest
    try:
        assert_accurate(actual, expected, unit_length=terms, ulps=4.0, magnitude=magnitude)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def check_graph(case: Case, names: Sequence[str]) -> Sequence[str]:
    """Raises AssertionError unless CUDA graphs of the case follow what its inputs hold when they are replayed."""
    served = serving(case, names)
    for backend in served:
        for _ in range(2):  # what is compiled, allocated or collected once is then there
            case.results(case.inputs, backend)
        replay = captured(partial(case.results, case.inputs, backend))
        for _ in range(2):
            for x in case.inputs:
                x.copy_(torch.randn_like(x))
            torch.testing.assert_close(replay(), case.results(case.inputs, backend), rtol=0, atol=0, equal_nan=True)
    return served


def planned(case: Case) -> Case:
    """The clipping of an `agc` case by an `AGC` that keeps what it collected, of gradients that stay where they are."""
    half = len(case.inputs) // 2
    parameters = [nn.Parameter(weight) for weight in case.inputs[:half]]
    for parameter, grad in zip(parameters, case.inputs[half:], strict=True):
        parameter.grad_dtype = None  # it may be of another than the parameter's
        parameter.grad = torch.empty_like(grad)

    @cache
    def clipping(backend: str) -> nfk.AGC:
        return nfk.AGC(parameters, backend=backend)

    def run(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_copy_(grads, list(inputs[half:]))
        clipping(backend).clip_()
        return [grad.clone() for grad in grads]

    return Case("agc", {"by": "AGC.clip_"}, case.inputs, [], run, case.terms)


def graph_cases(cases: Iterator[Case]) -> Iterator[Case]:
    """The cases, those of `agc` by `AGC` as well."""
    for case in cases:
        yield case
        if case.op == "agc":
            yield planned(case)


def run_checks(check: Check, cases: Iterator[Case], names: Sequence[str], seconds: float) -> Tally:
    """Check cases until their end or that of the time, which no op's first one waits for, and print which fail."""
    start, tally, ops = time.monotonic(), Tally(), set[str]()
    for case in cases:
        if (time.monotonic() - start > seconds and case.op in ops) or tally.failures == MOST_FAILURES:
            break
        ops.add(case.op)
        try:
            tally.runs.update((case.op, backend) for backend in check(case, names))
        except Exception as error:
            tally.failures += 1
            print(f"failed: {case}\n  {type(error).__name__}: {error}", flush=True)
        tally.cases += 1
    return tally


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_cases", description=__doc__)
    parser.add_argument("check", choices=("compare", "graphs"), help="backends with float64, or CUDA graphs with calls")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--ops", nargs="+", choices=backends.OPS, default=backends.OPS, metavar="OP", help="these only")
    parser.add_argument("--backends", nargs="+", choices=backends.BACKENDS[1:], metavar="NAME", help="these only")
    parser.add_argument("--expect", nargs="+", choices=KERNELS, default=(), metavar="NAME",
                        help="fail if one of these backends never ran an op that it has a kernel for")  # fmt: skip
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="at most so many")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="start none after so long")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser.parse_args()


def main() -> int:
    """Command line; 1 if a case failed or an expected backend never ran."""
    arguments = parse_arguments()
    with side_stream(arguments.device):
        cases = islice(Draw(arguments.device, arguments.seed).cases(arguments.ops), arguments.cases)
        if arguments.check == "graphs":
            # The reference is torch's own kernels, whose graphs are torch's affair.
            names = arguments.backends or ("cuda", "triton")
            tally = run_checks(check_graph, graph_cases(cases), names, arguments.seconds)
        else:
            names = arguments.backends or backends.BACKENDS[1:]
            tally = run_checks(check_backends, cases, names, arguments.seconds)
    print(tally)
    missing = tally.missing(arguments.ops, arguments.expect)
    if missing:
        print(f"never ran right: {', '.join(missing)}")
    return int(tally.failures > 0 or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
