"""Host time of one call: what it takes until it returns, with its kernels queued and not waited for.

On a GPU the calls are real. On a machine without one the CUDA kernels' launch is a stub that returns at once, of the
emulator that the tests run them in; all that comes before, up to the kernel's arguments, is what a GPU would be given.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product

import torch

import nfnets_kernels as nfk
from benchmarks import peers
from benchmarks.bench_agc import CLIP_FACTOR, EPS, make_params
from benchmarks.bench_weight_standardize import make_convolutions
from benchmarks.checks import BenchmarkError, assert_all_close
from benchmarks.goals import ON_GPU, STUBBED
from benchmarks.harness import Comparison, Contestant, Session
from benchmarks.results import Incident

BENCH = "host"
MODEL = "nf_resnet50"
Check = Callable[[str, object], None]


def run(session: Session) -> None:
    """Clipping with gradients that stay and that are new tensors at every step, and weight standardization."""
    if session.settings.on_gpu:
        compare_calls(session, "auto", ON_GPU, None)
        return
    try:
        with stubbed_launches() as launches:
            compare_calls(session, "cuda", STUBBED, launches)
    except (OSError, AssertionError) as error:  # no compiler, or none that builds it
        reason = f"the emulator of CUDA was not built: {str(error).splitlines()[0]}"
        session.report_incident(Incident(BENCH, STUBBED, "skipped", reason))


def compare_calls(session: Session, backend: str, timed: str, launches: Callable[[], int] | None) -> None:
    """All comparisons; `launches` counts those of a stub."""
    for calls, grads in session.track(list(product((clip_planned, clip, step), ("same", "new"))), BENCH):
        session.compare(calls(session, backend, f"{grads} gradients; {timed}", grads == "new", launches))
    session.compare(standardize(session, backend, timed, launches))


@contextmanager
def stubbed_launches() -> Iterator[Callable[[], int]]:
    """Backend "cuda" serves CPU tensors without doing anything; yields the number of launches so far."""
    from tests import emulator

    with emulator.serving() as controls:
        controls.emulator_set_stub(1)
        try:
            yield controls.emulator_launches
        finally:
            controls.emulator_set_stub(0)


def one_launch(launches: Callable[[], int]) -> Check:
    """Raises BenchmarkError unless there was one launch since the last call."""
    before = launches()

    def check(name: str, value: object) -> None:
        nonlocal before
        count, before = launches() - before, launches()
        if count != 1:
            raise BenchmarkError(f"{name}: {count} launches instead of one")

    return check


class Clipping:
    """The parameters of a model, whose gradients are restored before every call, in new tensors or in the same."""

    def __init__(self, session: Session, new: bool) -> None:
        self.params = make_params(MODEL, session.settings.device)
        self.grads = [param.grad for param in self.params if param.grad is not None]
        # A stub writes no gradient. Restoring them would sweep the CPU's caches, which a GPU's memory traffic does not.
        self.originals = [grad.clone() for grad in self.grads] if session.settings.on_gpu else []
        self.new = new

    def restore(self) -> None:
        """What precedes a call."""
        if self.originals:
            torch._foreach_copy_(self.grads, self.originals)
        if self.new:
            for param, grad in zip(self.params, self.grads, strict=True):
                param.grad = grad.view_as(grad)

    def check(self) -> Check:
        """That gradients are clipped as timm clips them."""
        peers.adaptive_clip_grad(self.params, CLIP_FACTOR, EPS)
        expected = [grad.clone() for grad in self.grads]
        return lambda name, value: assert_all_close(f"{name}: gradients", self.grads, expected, tolerance=1e-5)

    def peers(self, session: Session) -> list[Contestant]:
        """Others that queue kernels on a GPU; on a CPU they would compute."""
        if not session.settings.on_gpu:
            return []
        weights = [param.detach() for param in self.params]
        return [
            Contestant("timm adaptive_clip_grad", partial(peers.adaptive_clip_grad, self.params, CLIP_FACTOR, EPS)),
            Contestant("lean eager (foreach)", partial(peers.lean_agc_, weights, self.grads, CLIP_FACTOR, EPS)),
        ]


def clip_planned(
    session: Session, backend: str, case: str, new: bool, launches: Callable[[], int] | None
) -> Comparison:
    """`AGC.clip_`, which keeps what it collected."""
    clipping = Clipping(session, new)
    ours = nfk.AGC(clipping.params, CLIP_FACTOR, EPS, backend=backend).clip_
    return clipping_comparison(session, clipping, "AGC.clip_", ours, backend, case, launches)


def clip(session: Session, backend: str, case: str, new: bool, launches: Callable[[], int] | None) -> Comparison:
    """`agc_`, which collects it every time."""
    clipping = Clipping(session, new)
    ours = partial(nfk.agc_, clipping.params, CLIP_FACTOR, EPS, backend=backend)
    return clipping_comparison(session, clipping, "agc_", ours, backend, case, launches)


def step(session: Session, backend: str, case: str, new: bool, launches: Callable[[], int] | None) -> Comparison:
    """`SGD_AGC.step` of two parameter groups, which keeps what it collected."""
    clipping = Clipping(session, new)
    halves = [{"params": clipping.params[::2]}, {"params": clipping.params[1::2], "weight_decay": 0.0}]
    optimizer = nfk.optim.SGD_AGC(halves, lr=0.0, clip_factor=CLIP_FACTOR, eps=EPS, backend=backend)
    check = one_launch(launches) if launches else lambda name, value: None
    return Comparison(
        bench=BENCH,
        case=f"SGD_AGC.step of {len(clipping.params)} parameters, {case}",
        contestants=[Contestant("SGD_AGC.step", optimizer.step, "ours", ["sgd_agc"], backend=backend)],
        check=check,
        setup=clipping.restore,
        cache="in step",
        on_host=True,
    )


def clipping_comparison(
    session: Session,
    clipping: Clipping,
    name: str,
    ours: Callable[[], None],
    backend: str,
    case: str,
    launches: Callable[[], int] | None,
) -> Comparison:
    """One way to clip, on a GPU beside its peers."""
    return Comparison(
        bench=BENCH,
        case=f"{name} of {len(clipping.params)} parameters, {case}",
        contestants=[Contestant(name, ours, "ours", ["agc"], backend=backend), *clipping.peers(session)],
        check=one_launch(launches) if launches else clipping.check(),
        setup=clipping.restore,
        cache="in step",
        on_host=True,
    )


def standardize(session: Session, backend: str, timed: str, launches: Callable[[], int] | None) -> Comparison:
    """All convolutions' weights in one call."""
    convs = make_convolutions(MODEL, session.settings.device, torch.contiguous_format)
    weights, gains = ([x.detach() for x in tensors] for tensors in (convs.weights, convs.gains))

    def standardized(backend: str) -> list[torch.Tensor]:
        return nfk.functional.weight_standardize_many(
            weights, gains, scales=convs.scales, eps=convs.eps, eps_form="add", backend=backend
        )

    def as_the_reference(name: str, value: object) -> None:
        assert isinstance(value, list)
        assert_all_close(name, value, standardized("reference"), tolerance=1e-5)

    ours = partial(standardized, backend)
    return Comparison(
        bench=BENCH,
        case=f"weight_standardize_many of {len(weights)} convolutions; {timed}",
        contestants=[Contestant("weight_standardize_many", ours, "ours", ["weight_standardize"], backend=backend)],
        check=one_launch(launches) if launches else as_the_reference,
        cache="in step",
        on_host=True,
    )
