"""The figures of one run, and their JSON and CSV form."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from benchmarks.environment import Environment

BENCHES = {
    "agc": "Adaptive gradient clipping",
    "sgd_agc": "Clipping, SGD and average in one pass",
    "weight_standardize": "Weight standardization",
    "scaled_activation": "Scaled activations",
    "residual": "Residual epilogue",
    "host": "Host time of one call",
    "in_step": "Optimizer and weights within a training step",
    "step": "Training step and inference",
    "profile": "Where a training step's time goes",
    "models": "Networks at the size they are trained at",
    "scaling": "Cost as networks, batches and threads grow",
    "distributed": "Data parallel training step in two processes",
    "convergence": "Training on handwritten digits",
}

Role = Literal["ours", "peer", "ceiling"]
Method = Literal["calls", "graph", "host"]
Cache = Literal["cold", "in step"]
NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Timing:
    """How long one contestant took for one case.

    ``relative_time`` is its median over ours: 3.0 means that ours is three times as fast. ``floor_ms`` is what the work
    takes at the ceilings measured in the same process: its unavoidable bytes (``traffic_bytes``) at the bandwidth of
    their kinds of access, or its multiply-adds at the rate of matrix products, whichever is more (``bound``).

    ``cache``: a call found its data evicted from the last-level cache ("cold"), or as what precedes it in a training
    step had left it ("in step").

    On a GPU the times are those of the device, for plain calls or for replays of a CUDA graph, or those of the host
    until a plain call returns (``method``); ``host_ms`` is the latter beside the former. ``peak_bytes``, where it was
    measured, is the memory that a call needs at most. ``compile_s`` is what the first call of a compiled contestant
    took. ``sweep`` and ``at``: what was varied over several cases, and its value in this one.
    """

    bench: str
    case: str
    contestant: str
    role: Role
    backend: str
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    relative_time: float
    floor_ms: float | None = None
    bound: Literal["memory", "matmul"] | None = None
    traffic_bytes: int = 0
    method: Method = "calls"
    cache: Cache = "in step"
    host_ms: float | None = None
    peak_bytes: int | None = None
    compile_s: float | None = None
    sweep: str = ""
    at: float | None = None

    @property
    def floor_fraction(self) -> float | None:
        """The share of the ceiling that was reached; above 1 in a cache, or where torch's own kernels are slower."""
        return None if self.floor_ms is None or self.role == "ceiling" else self.floor_ms / self.median_ms


@dataclass(frozen=True)
class Training:
    """One network's training run: test accuracy in percent and mean training loss after every epoch.

    ``diverged``: the loss became infinite or NaN, which ended the run and is not in ``train_loss``, or the accuracy was
    in the end that of guessing. Older results have no batch size: it was 32, the learning rate 0.3.
    """

    contestant: str
    role: Role
    backend: str
    seed: int
    seconds: float
    test_accuracy: list[float]
    train_loss: list[float]
    batch_size: int = 32
    learning_rate: float = 0.3
    diverged: bool = False


@dataclass(frozen=True)
class ModelFigures:
    """What is known of a network besides its times, which are timings of the bench "models" under the same name.

    They are those of the cases ``training_case`` and ``inference_case``. ``multiply_adds`` are an image's. ``accuracy``
    is the ImageNet top-1 accuracy in percent that ``source`` publishes, None where there is none to cite.
    """

    contestant: str
    role: Role
    case: str
    batch_size: int
    image_size: int
    parameters: int
    multiply_adds: int
    accuracy: float | None
    source: str

    @property
    def architecture(self) -> str:
        """What several libraries may offer."""
        return self.case.split(",")[0]

    @property
    def training_case(self) -> str:
        """The case in which its training step is timed."""
        return f"{self.case}, training step"

    @property
    def inference_case(self) -> str:
        """The case in which its inference is timed."""
        return f"{self.case}, inference"


@dataclass(frozen=True)
class Kernel:
    """Everything of one name that one training step runs: kernels on a GPU; on a CPU operators, without what they call.

    ``updating``: it belongs to gradient clipping and the optimizer, not to the forward and backward pass.
    """

    name: str
    updating: bool
    ms: float
    launches: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a network's training step goes.

    ``step_ms`` is a step's median time while nobody watches; ``steps`` others were watched, and ``kernels`` are their
    mean. ``batch_norm``: the network has BatchNorm layers.
    """

    case: str
    contestant: str
    role: Role
    backend: str
    batch_norm: bool
    steps: int
    step_ms: float
    kernels: list[Kernel]

    @property
    def gap_ms(self) -> float:
        """What is left of a step outside all kernels: a GPU waits for its host, or a CPU runs Python."""
        return max(0.0, self.step_ms - sum(kernel.ms for kernel in self.kernels))


@dataclass(frozen=True)
class Incident:
    """A figure that is missing or, if disturbed, not to be trusted, and why."""

    bench: str
    case: str
    kind: Literal["failed", "skipped", "disturbed"]
    reason: str


@dataclass
class Results:
    """Everything one run of the benchmarks measured.

    The ceilings: ``bandwidth`` in bytes per second by kind of access, ``matmul`` in operations per second by dtype, a
    multiply-add being two.
    """

    environment: Environment
    bandwidth: dict[str, float] = field(default_factory=dict)
    matmul: dict[str, float] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    models: list[ModelFigures] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)

    def cases(self, bench: str) -> dict[str, list[Timing]]:
        """The timings of one bench by case, in the order in which they were measured."""
        grouped: dict[str, list[Timing]] = {}
        for timing in self.timings:
            if timing.bench == bench:
                grouped.setdefault(timing.case, []).append(timing)
        return grouped

    def sweeps(self) -> dict[str, dict[str, list[Timing]]]:
        """The timings over which something was varied, by sweep and contestant, each in ascending order."""
        grouped: dict[str, dict[str, list[Timing]]] = {}
        for timing in self.timings:
            if timing.at is not None:
                grouped.setdefault(timing.sweep, {}).setdefault(timing.contestant, []).append(timing)
        for timings in (one for contestants in grouped.values() for one in contestants.values()):
            timings.sort(key=lambda timing: timing.at or 0.0)
        return grouped

    def trained(self) -> dict[int, dict[str, list[Training]]]:
        """The training runs by batch size and contestant: one per seed."""
        grouped: dict[int, dict[str, list[Training]]] = {}
        for training in self.trainings:
            grouped.setdefault(training.batch_size, {}).setdefault(training.contestant, []).append(training)
        return grouped

    def profiled(self) -> dict[str, list[Profile]]:
        """The profiles by case."""
        grouped: dict[str, list[Profile]] = {}
        for profile in self.profiles:
            grouped.setdefault(profile.case, []).append(profile)
        return grouped

    def times(self, model: ModelFigures) -> tuple[Timing | None, Timing | None]:
        """How long a network took for a training step and for inference, where that was measured."""
        timings = {(one.case, one.contestant): one for one in self.timings if one.bench == "models"}
        training, inference = ((case, model.contestant) for case in (model.training_case, model.inference_case))
        return timings.get(training), timings.get(inference)

    def resume(self, folder: Path) -> None:
        """Take over the comparisons that a run of the same code on the same machine has finished in a folder, if any.

        Training runs, and what is measured in processes of its own, are not taken over. ``ValueError`` where the
        figures are of other code or of another machine.
        """
        if not (folder / "results.json").exists():
            return
        earlier = Results.load(folder)
        for name in ("commit", "dirty", "nfnets_kernels", "torch", "device", "gpu", "cpu", "threads"):
            before, now = getattr(earlier.environment, name), getattr(self.environment, name)
            if before != now:
                raise ValueError(f"{folder}: what is there was measured with {name} {before}, and now it is {now}")
        self.timings = [timing for timing in earlier.timings if timing.bench != "distributed"]
        self.models, self.profiles = earlier.models, earlier.profiles
        finished = {(timing.bench, timing.case) for timing in self.timings}
        self.incidents = [one for one in earlier.incidents if (one.bench, one.case) in finished]

    def save(self, folder: Path) -> None:
        """Write ``results.json``, ``results.csv`` with the timings and, where there are any, ``kernels.csv``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._save_csv(folder / "results.csv", [one.name for one in fields(Timing)], map(asdict, self.timings))
        if self.profiles:
            columns = ["case", "contestant", *(one.name for one in fields(Kernel))]
            kernels = (
                {"case": profile.case, "contestant": profile.contestant, **asdict(kernel)}
                for profile in self.profiles
                for kernel in profile.kernels
            )
            self._save_csv(folder / "kernels.csv", columns, kernels)
        # Whole or not at all: an interruption must not cost what was finished.
        partial = folder / "results.json.partial"
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        partial.replace(folder / "results.json")

    def _save_csv(self, path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
        # Every row names machine and versions, so that files of several machines can simply be concatenated.
        environment = {key: value for key, value in asdict(self.environment).items() if key != "command"}
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [*columns, *environment])
            writer.writeheader()
            writer.writerows({**row, **environment} for row in rows)

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what ``save`` wrote, given its folder or a JSON file alone."""
        stored = json.loads((path / "results.json" if path.is_dir() else path).read_text())
        return cls(
            environment=Environment(**stored["environment"]),
            bandwidth=stored["bandwidth"],
            matmul=stored.get("matmul", {}),  # older results have none
            timings=[Timing(**row) for row in stored["timings"]],
            trainings=[Training(**row) for row in stored["trainings"]],
            models=[ModelFigures(**row) for row in stored.get("models", [])],  # older results have none
            profiles=[
                Profile(**{**row, "kernels": [Kernel(**kernel) for kernel in row["kernels"]]})
                for row in stored.get("profiles", [])  # older results have none
            ],
            incidents=[Incident(**row) for row in stored["incidents"]],
        )
