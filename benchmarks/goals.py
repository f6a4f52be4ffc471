"""What the kernels are meant to reach on a GPU, and whether they did."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from benchmarks.results import NOT_MEASURED, Results, Timing


@dataclass(frozen=True)
class Goal:
    """Device time, or share of the measured memory bandwidth, that our first contestant should reach in a case."""

    bench: str
    case: str
    at_most_us: float | None = None
    at_least_bandwidth: float | None = None

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


GOALS = (
    Goal("agc", "NF-ResNet-50, none clipped", at_most_us=60),
    Goal("agc", "NF-ResNet-50, all clipped", at_most_us=85),
    Goal("agc", "NFNet-F0, none clipped", at_most_us=150),
    Goal("agc", "NFNet-F0, all clipped", at_most_us=215),
    Goal("weight_standardize", "float32 to bfloat16, forward", at_most_us=45),
    Goal("weight_standardize", "float32 to bfloat16, backward", at_most_us=75),
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


def goal_for(bench: str, case: str) -> Goal | None:
    """The goal of a case, where it has one."""
    return next((goal for goal in GOALS if (goal.bench, goal.case) == (bench, case)), None)


def measured(goal: Goal, results: Results) -> Timing | None:
    """Our first contestant's timing on a GPU in the goal's case."""
    timings = results.cases(goal.bench).get(goal.case)
    return timings[0] if timings and results.environment.gpu else None


def goal_rows(all_results: Iterable[Results]) -> list[list[str]]:
    """GPU, work, goal and verdict for every goal and GPU; with no GPU at all, what has yet to be measured."""
    gpus = [results for results in all_results if results.environment.gpu]
    rows: list[tuple[str, Goal, Timing | None]] = [("-", goal, None) for goal in GOALS]
    if gpus:
        rows = [(results.environment.machine, goal, measured(goal, results)) for results in gpus for goal in GOALS]
    return [[machine, f"{goal.bench}: {goal.case}", str(goal), goal.verdict(timing)] for machine, goal, timing in rows]
