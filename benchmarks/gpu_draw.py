"""Random arguments for every op, the same from the same seed on every machine."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor

import nfnets_kernels as nfk
from nfnets_kernels import backend as backends
from nfnets_kernels import ops
from nfnets_kernels.reference.agc import is_one_unit
from nfnets_kernels.reference.scaled_activation import function_key
from nfnets_kernels.reference.sgd_agc import Hyperparameters
from nfnets_kernels.reference.weight_standardize import accumulation_dtype

Card = TypeVar("Card")
Shape = tuple[int, ...]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 2, 3, 7, 8, 16, 33, 64)
ACTIVATIONS = ("gelu", "relu", "silu", "sigmoid", "softplus", "tanh")
# Of units: both sides of where the CUDA kernels go from a thread to a warp, a block and memory. The float32 of a warp's
# registers are 1,152 and of a block's 4,608; of 16-bit types it is twice as many.
LENGTHS = (1, 2, 31, 32, 33, 147, 576, 1023, 1152, 1153, 2304, 4608, 4609, 9216, 9217, 100_000)
# The same for weights, whose fan-in has dims to permute where it is no prime. None is so short that next to nothing is
# left of a gradient without its two projections.
FAN_INS = (
    (31, 1, 1), (32, 1, 1), (33, 1, 1), (3, 7, 7), (64, 3, 3), (93, 11, 1), (128, 3, 3), (1153, 1, 1), (256, 3, 3),
    (512, 3, 3), (419, 11, 1), (1024, 3, 3), (709, 13, 1), (4000, 5, 5),
)  # fmt: skip
# Elements of a tensor of several units, so that the reference on the CPU keeps pace.
MOST_ELEMENTS = 1 << 18
# Tensors of a call. A kernel's arguments hold 1,022 rows of `agc` and 454 of `weight_standardize`.
COUNTS = (1, 3, 7, 12, 12, 1100)
CROWD = 100
SHORT_LENGTHS = (1, 31, 33, 147)
SHORT_FAN_INS = ((31, 1, 1), (3, 3, 3), (3, 7, 7))


@dataclass(frozen=True)
class Case:
    """An op with drawn arguments; ``run`` takes its inputs and a backend and returns its outputs.

    ``terms`` are what the longest sum behind each result adds up. A result of fewer dims than the inputs is such a sum,
    of terms that cancel down from about ``sum_size``.
    """

    op: str
    arguments: Mapping[str, object]
    inputs: list[Tensor]
    cotangents: list[Tensor]
    run: Callable[[Sequence[Tensor], str], Sequence[Tensor]]
    terms: Sequence[int]
    sum_size: float = 1.0
    variant: str | None = None

    def __str__(self) -> str:
        shown = [f"{tuple(x.shape)} {x.dtype} {x.stride()} +{x.storage_offset()}" for x in self.inputs[:24]]
        more = f" and {len(self.inputs) - len(shown)} more" if len(self.inputs) > len(shown) else ""
        return f"{self.op} {self.arguments} of {', '.join(shown)}{more}"

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
        self.decks: dict[Any, list[Any]] = {}

    def deal(self, cards: Sequence[Card]) -> Card:
        """One of the cards, none for a second time before all of them were dealt."""
        deck = self.decks.setdefault(cards, [])
        if not deck:
            deck += self.random.sample(cards, len(cards))
        return deck.pop()

    def tensor(self, *shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        """Normal values; 4-d tensors in either memory format, and some misaligned for wide accesses."""
        x = (torch.randn(shape, generator=self.generator, dtype=torch.float64) * size).to(self.device, dtype)
        if x.ndim == 4 and self.random.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        return duplicate(x, offset=self.random.choice((0, 0, 1)))

    def kinds(self, dtypes: Sequence[torch.dtype], size: int) -> list[torch.dtype]:
        """Those that a call's tensors mix: one in a crowd, which fills a table; else two, as Triton compiles each."""
        return [self.random.choice(dtypes) for _ in range(1 if size > CROWD else 2)]

    def units(self, length: int) -> int:
        """How many units of that length a tensor has."""
        return min(self.random.choice(SIZES), max(MOST_ELEMENTS // length, 1))

    def agc_shape(self, lengths: Sequence[int]) -> Shape:
        """The shape of a parameter whose units are of a dealt length."""
        length = self.deal(lengths)
        units = self.units(length)
        if length == 1:
            return self.random.choice(((), (1,), (units, 1), (units, 1, 1, 1), (1025, 1, 1, 1)))
        shapes: list[Shape] = [(length,), (units, length)]
        if length % 9 == 0:
            shapes += [(units, length // 9, 3, 3)] * 2
        return self.random.choice(shapes)

    def parameters(self, size: int) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and gradients."""
        pick = self.random.choice
        shapes = [self.agc_shape(SHORT_LENGTHS if size > CROWD else LENGTHS) for _ in range(size)]
        # float64 meets itself alone: what it is mixed with is accumulated in float32.
        pairs = [(a, a if a == torch.float64 else pick(DTYPES[:3])) for a in self.kinds(DTYPES, size)]
        pairs = [pick(pairs) for _ in shapes]
        weights = [self.tensor(*shape, dtype=dtypes[0], size=10 ** self.random.uniform(-3, 1))
                   for shape, dtypes in zip(shapes, pairs, strict=True)]  # fmt: skip
        grads = [self.tensor(*shape, dtype=dtypes[1], size=10 ** self.random.uniform(-3, 1))
                 for shape, dtypes in zip(shapes, pairs, strict=True)]  # fmt: skip
        return weights, grads

    def agc(self) -> Case:
        """Parameters and gradients, with their options."""
        pick, size = self.random.choice, self.deal(COUNTS)
        weights, grads = self.parameters(size)
        clip_factor, eps = 10 ** self.random.uniform(-3, 0), pick((0.0, 1e-3, 1e-1))
        norm_type, rule = pick((1.0, 2.0, 2.0, 3.0, math.inf)), pick(ops.agc.RULES)

        def run(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
            clipped = [duplicate(grad, int(grad.storage_offset())) for grad in inputs[size:]]
            ops.agc.agc_(inputs[:size], clipped, clip_factor, eps, norm_type, rule, backend)
            return clipped

        arguments = {"clip_factor": clip_factor, "eps": eps, "norm_type": norm_type, "rule": rule}
        return Case("agc", arguments, weights + grads, [], run, [unit_length(weight, rule) for weight in weights])

    def sgd_agc(self) -> Case:
        """Parameters, gradients, momentum and averages, with the hyperparameters of one group."""
        pick, size = self.random.choice, self.deal(COUNTS)
        weights, grads = self.parameters(size)
        momenta = [self.tensor(*weight.shape, dtype=weight.dtype) for weight in weights]
        averages = [self.tensor(*weight.shape, dtype=accumulation_dtype(weight.dtype)) for weight in weights]
        momentum, rule = pick((0.0, 0.9)), pick(ops.agc.RULES)
        clip_factor = pick((None, 10 ** self.random.uniform(-3, 0)))
        hyper = Hyperparameters(
            0.1, momentum, 0.0, pick((0.0, 1e-2)), momentum > 0 and pick((False, True)), pick((False, True)),
            clip_factor, pick((0.0, 1e-3)), 0.9,
        )  # fmt: skip
        # Averages are of the weights as they are stored, which the reference in float64 does not round.
        averaged = pick((False, True)) and all(weight.dtype not in DTYPES[1:3] for weight in weights)

        def run(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
            copies = [duplicate(x, int(x.storage_offset())) for x in inputs]
            stepped, grads, momenta, averages = (copies[i * size : (i + 1) * size] for i in range(4))
            momenta, averages = momenta if momentum else [], averages if averaged else []
            ops.sgd_agc.sgd_agc_(stepped, grads, momenta, averages, [], None, None, None, *hyper, rule, backend)
            return [*stepped, *momenta, *averages]

        terms = [unit_length(weight, rule) for weight in weights] * (1 + (momentum > 0) + averaged)
        inputs = weights + grads + momenta + averages
        return Case("sgd_agc", {**hyper._asdict(), "rule": rule}, inputs, [], run, terms)

    def weight_standardize(self) -> Case:
        """Weights with gains into one output dtype, None for each weight's own; float64 throughout or not at all."""
        pick, size = self.random.choice, self.deal(COUNTS)
        fan_ins = [self.deal(SHORT_FAN_INS if size > CROWD else FAN_INS) for _ in range(size)]
        shapes = [(self.units(math.prod(fan_in)), *fan_in) for fan_in in fan_ins]
        kinds = pick((self.kinds(DTYPES[:3], size), self.kinds(DTYPES[:3], size), [torch.float64]))
        dtypes = [pick(kinds) for _ in shapes]
        out_dtype = None if torch.float64 in kinds else pick((None, *DTYPES[:3]))
        memory_format = pick((torch.preserve_format, torch.contiguous_format, torch.channels_last))
        weights = [self.tensor(*shape, dtype=dtype, size=10 ** self.random.uniform(-2, 0))
                   for shape, dtype in zip(shapes, dtypes, strict=True)]  # fmt: skip
        gains = [self.tensor(shape[0], dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        scales = [self.random.uniform(0.2, 2.0) for _ in shapes]
        eps, eps_form = pick((1e-4, 1e-6)), pick(ops.weight_standardize.EPS_FORMS)

        def run(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
            exact = inputs[0].dtype == torch.float64
            return nfk.functional.weight_standardize_many(
                inputs[:size], inputs[size:], scales=scales, eps=eps, eps_form=eps_form,
                dtype=None if exact else out_dtype, memory_format=memory_format, backend=backend,
            )  # fmt: skip

        cotangents = [self.tensor(*weight.shape, dtype=out_dtype or weight.dtype) for weight in weights]
        arguments = {"dtype": out_dtype, "memory_format": memory_format, "eps": eps, "eps_form": eps_form}
        terms = [math.prod(fan_in) for fan_in in fan_ins] * 3  # of outputs and both gradients
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
            [self.tensor(*out_shape, dtype=dtype)], run, [shape[1]] * 2, variant=function_key(name, approximate),
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

        arguments = {"factors": names, "alpha": alpha, "activation": activation}
        cotangents = [self.tensor(*shape, dtype=dtype) for _ in range(2)]
        size = math.prod(shape)
        terms = [size] * (2 + len(inputs))
        return Case("residual", arguments, inputs, cotangents, run, terms, math.sqrt(size), activation)

    def cases(self, chosen: Sequence[str] = backends.OPS) -> Iterator[Case]:
        """The chosen ops in turn, without end."""
        for index in count():
            yield getattr(self, chosen[index % len(chosen)])()


def duplicate(x: Tensor, offset: int) -> Tensor:
    """A copy of dense x that starts `offset` elements into its storage."""
    return x.new_empty(x.numel() + offset).as_strided(x.shape, x.stride(), offset).copy_(x)


def unit_length(weight: Tensor, rule: str) -> int:
    """Elements of a unit."""
    return math.prod(weight.shape if is_one_unit(weight.shape, rule) else weight.shape[1:])
