"""What is meant to be reached, on a GPU (device times on an H200), on the host and in memory, and whether it was."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from benchmarks.results import NOT_MEASURED, Results, Timing


@dataclass(frozen=True)
class Goal:
    """Time, share of the measured memory bandwidth, or memory that our first contestant should reach in a case.

    Memory is a share of what another contestant, ``against``, needs, and speed a multiple of its own. ``machine``: with
    a GPU, or with a CPU alone. ``contestant``: another one than the first.
    """

    bench: str
    case: str
    at_most_us: float | None = None
    at_least_bandwidth: float | None = None
    at_most_memory: float | None = None
    at_least_speed: float | None = None
    against: str = ""
    contestant: str = ""
    machine: Literal["GPU", "CPU"] = "GPU"

    def __str__(self) -> str:
        if self.at_most_us is not None:
            return f"at most {self.at_most_us:.0f} us"
        if self.at_most_memory is not None:
            return f"at most {self.at_most_memory:.2f}x the memory of {self.against}"
        if self.at_least_speed is not None:
            return f"at least {self.at_least_speed:.2f}x as fast as {self.against}"
        return f"at least {self.at_least_bandwidth:.0%} of bandwidth"

    def verdict(self, timings: Sequence[Timing]) -> str:
        """Whether the timings of the case meet the goal, in words."""
        reached = self._reached(timings)
        if reached is None:
            return NOT_MEASURED
        what, met = reached
        return f"goal {'met' if met else 'missed'}: {what}, {self}"

    def _reached(self, timings: Sequence[Timing]) -> tuple[str, bool] | None:
        """What was reached, and whether that is enough."""
        if not timings:
            return None
        named = {one.contestant: one for one in timings}
        ours = named.get(self.contestant) if self.contestant else timings[0]
        theirs = named.get(self.against)
        if ours is None or (self.against and theirs is None):
            return None
        if self.at_most_us is not None:
            return f"{1e3 * ours.median_ms:.1f} us", 1e3 * ours.median_ms <= self.at_most_us
        if theirs is not None and self.at_least_speed is not None:
            speed = theirs.median_ms / ours.median_ms
            return f"{speed:.2f}x", speed >= self.at_least_speed
        if theirs is not None and self.at_most_memory is not None:
            if ours.peak_bytes is None or not theirs.peak_bytes:
                return None
            share = ours.peak_bytes / theirs.peak_bytes
            text = f"{ours.peak_bytes / 1e6:.0f} MB, {share:.3f}x the {theirs.peak_bytes / 1e6:.0f} MB"
            return text, share <= self.at_most_memory
        fraction = ours.floor_fraction or 0.0
        return f"{fraction:.1%}", fraction >= (self.at_least_bandwidth or 0.0)


# What is timed of a call that ends in a launch, on a GPU and without one.
ON_GPU = "host time"
STUBBED = "host time, launch stubbed"

# The networks of the benchmarks of whole networks.
TWIN = "BatchNorm twin"
TIMM = "timm nf_resnet50"
TORCHVISION = "torchvision resnet50"
RESNETV2 = "timm resnetv2_50"
TIMM_F0 = "timm dm_nfnet_f0"
COMPILED = "{}, torch.compile"
ACCELERATED = "{}, accelerated"

# The steps of SGD with clipping in passes of their own.
SEPARATE = "AGC.clip_ + SGD(fused)"
TIMM_SEPARATE = "timm AGC + SGD"


def compiled_case(case: str) -> str:
    """The case in which networks are compared with what torch.compile makes of them."""
    return f"{case}, with torch.compile"


STEP, INFERENCE = "training step, batch 8 at 224, float32", "inference, batch 8 at 224, float32"
GPU_STEP = "training step, batch 256 at 224, bfloat16 autocast"
F0_STEP, GPU_F0_STEP = (
    f"NFNet-F0, batch {how}, training step" for how in ("8 at 192, float32", "256 at 192, bfloat16 autocast")
)

GOALS = (
    Goal("agc", "NF-ResNet-50, none clipped", at_most_us=55),
    Goal("agc", "NF-ResNet-50, all clipped", at_most_us=78),
    Goal("agc", "NFNet-F0, none clipped", at_most_us=145),
    Goal("agc", "NFNet-F0, all clipped", at_most_us=210),
    Goal("agc", "NFNet-F6, none clipped", at_most_us=880),
    Goal("agc", "NFNet-F6, all clipped", at_most_us=1320),
    *(
        Goal(
            "agc",
            f"{model}, {share} clipped",
            at_least_speed=0.97,
            against="AGC.clip_",
            contestant="AGC.clip_, statistics",
            machine="CPU",
        )
        for model, share in product(("NF-ResNet-50", "NFNet-F0"), ("none", "all"))
    ),
    Goal("sgd_agc", "NF-ResNet-50, all clipped", at_least_speed=1.3, against=SEPARATE, machine="CPU"),
    Goal("sgd_agc", "NF-ResNet-50, all clipped", at_least_speed=8.0, against=TIMM_SEPARATE, machine="CPU"),
    Goal("sgd_agc", "NF-ResNet-50, all clipped, with average", at_most_us=195),
    Goal("sgd_agc", "NFNet-F0, all clipped, with average", at_most_us=520),
    Goal("weight_standardize", "NF-ResNet-50, float32 to bfloat16, forward", at_most_us=42),
    Goal("weight_standardize", "NF-ResNet-50, float32 to bfloat16, backward", at_most_us=70),
    Goal("weight_standardize", "NFNet-F0, float32 to bfloat16, forward", at_most_us=110),
    Goal("weight_standardize", "NFNet-F0, float32 to bfloat16, backward", at_most_us=185),
    *(
        Goal("host", f"AGC.clip_ of 161 parameters, {grads} gradients; {ON_GPU}", at_most_us=30)
        for grads in ("same", "new")
    ),
    *(
        Goal("host", f"AGC.clip_ of 161 parameters, {grads} gradients; {STUBBED}", at_most_us=40, machine="CPU")
        for grads in ("same", "new")
    ),
    *(
        Goal("scaled_activation", f"{name} {dtype}, {direction}", at_least_bandwidth=share)
        for name, dtype, (direction, share) in product(
            ("gelu", "relu"), ("float32", "bfloat16"), (("forward", 0.92), ("backward", 0.90))
        )
    ),
    *(
        Goal("residual", f"{layout} {dtype}, {direction}", at_least_bandwidth=0.88)
        for layout, dtype, direction in product(("NHWC", "NCHW"), ("float32", "bfloat16"), ("forward", "backward"))
    ),
    # Without BatchNorm a block keeps no second copy of its convolutions' outputs for the backward pass.
    Goal("step", STEP, at_most_memory=0.75, against=TWIN, machine="CPU"),
    Goal("step", STEP, at_least_speed=1.15, against=TWIN, machine="CPU"),
    Goal("step", STEP, at_least_speed=1.3, against=TIMM, machine="CPU"),
    Goal("step", INFERENCE, at_least_speed=1.25, against=TIMM, machine="CPU"),
    Goal("step", INFERENCE, at_least_speed=1.0, against=TORCHVISION, machine="CPU"),
    Goal("models", F0_STEP, at_least_speed=1.2, against=TIMM_F0, contestant=ACCELERATED.format(TIMM_F0), machine="CPU"),
    Goal("step", GPU_STEP, at_most_us=256 / 10_500 * 1e6),
    Goal("step", GPU_STEP, at_most_memory=0.75, against=TWIN),
    Goal("step", GPU_STEP, at_least_speed=1.5, against=TWIN),
    Goal("step", GPU_STEP, at_least_speed=1.7, against=TIMM),
    Goal("step", compiled_case(GPU_STEP), at_least_speed=1.25, against=COMPILED.format(TWIN)),
    Goal("step", compiled_case(GPU_STEP), at_least_speed=1.15, against=COMPILED.format(TIMM)),
    Goal("models", GPU_F0_STEP, at_least_speed=1.8, against=TIMM_F0),
    Goal("models", compiled_case(GPU_F0_STEP), at_least_speed=1.2, against=COMPILED.format(TIMM_F0)),
)


def verdicts(results: Results, bench: str, case: str, timings: Sequence[Timing]) -> str:
    """Whether the goals of a case on the machine of some results are met, in words; empty where it has none."""
    return "; ".join(goal.verdict(timings) for goal in goals_of(results) if (goal.bench, goal.case) == (bench, case))


def goals_of(results: Results) -> list[Goal]:
    """The goals for a machine like that of some results."""
    machine = "GPU" if results.environment.gpu else "CPU"
    return [goal for goal in GOALS if goal.machine == machine]


def measured(goal: Goal, results: Results) -> Sequence[Timing]:
    """The timings of the goal's case, ours first."""
    return results.cases(goal.bench).get(goal.case, ())


def own_goal_rows(results: Results) -> list[list[str]]:
    """``goal_rows`` of the goals for the machine of some results alone."""
    return [row for row in goal_rows([results]) if row[0] != "-"]


def goal_rows(all_results: Iterable[Results]) -> list[list[str]]:
    """Machine, work, goal and verdict of every goal on every machine; where there is none, that it is not measured."""
    rows: list[tuple[str, Goal, Sequence[Timing]]] = [
        (results.environment.machine, goal, measured(goal, results))
        for results in all_results
        for goal in goals_of(results)
    ]
    reached = {goal for _, goal, _ in rows}
    rows += [("-", goal, ()) for goal in GOALS if goal not in reached]
    return [
        [machine, f"{goal.bench}: {goal.case}", str(goal), goal.verdict(timings)] for machine, goal, timings in rows
    ]
