"""What is meant to be reached, on a GPU (device times on an H200), on the host and in memory, and whether it was."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from benchmarks.results import NOT_MEASURED, Results, Timing


@dataclass(frozen=True)
class Goal:
    """Time, share of the measured memory bandwidth, or memory that our first contestant should reach in a case.

    Memory is a share of what another contestant, ``against``, needs. ``machine``: with a GPU, or with a CPU alone.
    """

    bench: str
    case: str
    at_most_us: float | None = None
    at_least_bandwidth: float | None = None
    at_most_memory: float | None = None
    against: str = ""
    machine: Literal["GPU", "CPU"] = "GPU"

    def __str__(self) -> str:
        if self.at_most_us is not None:
            return f"at most {self.at_most_us:.0f} us"
        if self.at_most_memory is not None:
            return f"at most {self.at_most_memory:.2f}x the memory of {self.against}"
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
        ours = timings[0]
        if self.at_most_us is not None:
            return f"{1e3 * ours.median_ms:.1f} us", 1e3 * ours.median_ms <= self.at_most_us
        if self.at_most_memory is not None:
            theirs = next((one.peak_bytes for one in timings if one.contestant == self.against), None)
            if ours.peak_bytes is None or not theirs:
                return None
            share = ours.peak_bytes / theirs
            text = f"{ours.peak_bytes / 1e6:.0f} MB, {share:.3f}x the {theirs / 1e6:.0f} MB"
            return text, share <= self.at_most_memory
        fraction = ours.bandwidth_fraction or 0.0
        return f"{fraction:.1%}", fraction >= (self.at_least_bandwidth or 0.0)


# What is timed of a call that ends in a launch, on a GPU and without one.
ON_GPU = "host time"
STUBBED = "host time, launch stubbed"
TWIN = "BatchNorm twin"

GOALS = (
    Goal("agc", "NF-ResNet-50, none clipped", at_most_us=55),
    Goal("agc", "NF-ResNet-50, all clipped", at_most_us=78),
    Goal("agc", "NFNet-F0, none clipped", at_most_us=145),
    Goal("agc", "NFNet-F0, all clipped", at_most_us=210),
    Goal("agc", "NFNet-F6, none clipped", at_most_us=880),
    Goal("agc", "NFNet-F6, all clipped", at_most_us=1320),
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
    Goal("step", "training step, batch 8 at 224, float32", at_most_memory=0.75, against=TWIN, machine="CPU"),
    Goal("step", "training step, batch 128 at 224, bfloat16 autocast", at_most_memory=0.75, against=TWIN),
)


def goal_for(results: Results, bench: str, case: str) -> Goal | None:
    """The goal of a case on the machine of some results, where it has one."""
    return next((goal for goal in goals_of(results) if (goal.bench, goal.case) == (bench, case)), None)


def goals_of(results: Results) -> list[Goal]:
    """The goals for a machine like that of some results."""
    machine = "GPU" if results.environment.gpu else "CPU"
    return [goal for goal in GOALS if goal.machine == machine]


def measured(goal: Goal, results: Results) -> Sequence[Timing]:
    """The timings of the goal's case, ours first."""
    return results.cases(goal.bench).get(goal.case, ())


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
