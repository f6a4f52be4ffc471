"""The forms in which a network's step is run, eager, compiled, in a CUDA graph, and the check that they do the same."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

import nfnets_kernels as nfk
from benchmarks import training
from benchmarks.checks import assert_close
from benchmarks.harness import Comparison, Settings
from benchmarks.training import Batch, Network

GRAPHED = "{}, CUDA graph"

# Of a loss or a whole gradient, relative to its norm: float32's sums in another order through 50 layers; bfloat16's
# eight bits after every layer, of which a compiler saves some; TF32, cuDNN's choice for float32, has ten, as float16.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
TF32_TOLERANCE = 2e-2


def graphed(network: Network) -> Network:
    """The whole step in a CUDA graph."""
    return replace(network, name=GRAPHED.format(network.name), graphed=True)


def all_forms(network: Network, settings: Settings, compile_too: bool) -> list[Network]:
    """A network in all forms that this machine can run, eager first; compiling takes a minute each."""
    forms = [network, *([training.compiled(network, settings.compile_mode_of_networks)] if compile_too else [])]
    return [*forms, *map(graphed, forms)] if settings.on_gpu else forms


@contextmanager
def by_reference() -> Iterator[None]:
    """The package's ops run as plain PyTorch, whatever backend is asked for."""
    with mock.patch.object(nfk.backend, "serving", lambda *args, **kwargs: "reference"):
        yield


def check_form(name: str, network: Network, eager: Network, batch: Batch) -> None:
    """Raise ``BenchmarkError`` unless a form of a network computes what it should.

    Ours must have the gradients of the reference. A compiled peer must have the loss of its eager form: its gradients
    cannot be compared, since BatchNorm amplifies what bfloat16 rounds to half the gradient in small batches.
    """
    if not network.compiled:  # one that is would be compiled anew
        batch = batch.few()
    tf32 = batch.images.is_cuda and batch.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCES[batch.dtype]
    if network.role == "ours":
        torch.manual_seed(0)  # of stochastic depth
        with by_reference():
            expected = batch.gradients(eager)
        torch.manual_seed(0)
        assert_close(f"{name}: gradients", batch.gradients(network), expected, tolerance)
    elif network.compiled:
        assert_close(f"{name}: loss", batch.loss(network.model), batch.loss(eager.model), tolerance)


def verified(comparison: Comparison, forms: Mapping[str, tuple[Network, Network]], batch: Batch) -> Comparison:
    """A comparison of steps that also checks every form, given with the eager one by the name of its contestant."""

    def check(name: str, value: object) -> None:
        comparison.check(name, value)
        if name in forms:  # and not a replay
            check_form(name, *forms[name], batch)

    return replace(comparison, check=check)
