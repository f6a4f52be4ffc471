"""What the kernels are meant to reach, on a GPU (device times on an H200) and on the host, and whether they did."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal

from benchmarks.results import NOT_MEASURED, Results, Timing


@dataclass(frozen=True)
class Goal:
    """Time, or share of the measured memory bandwidth, that our first contestant should reach in a case.

    ``machine``: with a GPU, or with a CPU alone.
    """

    bench: str
    case: str
    at_most_us: float | None = None
    at_least_bandwidth: float | None = None
    machine: Literal["GPU", "CPU"] = "GPU"

    def __str__(self) -> str:
        if self.at_most_us is not None:
            return f"at most {self.at_most_us:.0f} us"
        return f"at least {self.at_least_bandwidth:.0%} of bandwidth"

    def verdict(self, timing: Timing | None) -> str:
        """Whether a timing meets the goal, in words."""
        if timing is None:
            return NOT_MEASURED
        if self.at_most_us is not None:
            reached, met = f"{1e3 * timing.median_ms:.1f} us", 1e3 * timing.median_ms <= self.at_most_us
        else:
            fraction = timing.bandwidth_fraction or 0.0
            reached, met = f"{fraction:.1%}", fraction >= (self.at_least_bandwidth or 0.0)
        return f"goal {'met' if met else 'missed'}: {reached}, {self}"


# What is timed of a call that ends in a launch, on a GPU and without one.
ON_GPU = "host time"
STUBBED = "host time, launch stubbed"

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
)


def goal_for(results: Results, bench: str, case: str) -> Goal | None:
    """The goal of a case on the machine of some results, where it has one."""
    return next((goal for goal in goals_of(results) if (goal.bench, goal.case) == (bench, case)), None)


def goals_of(results: Results) -> list[Goal]:
    """The goals for a machine like that of some results."""
    machine = "GPU" if results.environment.gpu else "CPU"
    return [goal for goal in GOALS if goal.machine == machine]


def measured(goal: Goal, results: Results) -> Timing | None:
    """Our first contestant's timing in the goal's case."""
    timings = results.cases(goal.bench).get(goal.case)
    return timings[0] if timings else None


def goal_rows(all_results: Iterable[Results]) -> list[list[str]]:
    """Machine, work, goal and verdict of every goal on every machine; where there is none, that it is not measured."""
    rows = [
        (results.environment.machine, goal, measured(goal, results))
        for results in all_results
        for goal in goals_of(results)
    ]
    reached = {goal for _, goal, _ in rows}
    rows += [("-", goal, None) for goal in GOALS if goal not in reached]
    return [[machine, f"{goal.bench}: {goal.case}", str(goal), goal.verdict(timing)] for machine, goal, timing in rows]
