"""The goals of the benchmarks: met, missed, and not measured yet."""

from dataclasses import replace

from benchmarks import goals
from benchmarks.report import documents, tables
from benchmarks.report.machines import Run, group
from benchmarks.results import Results, Timing

from .report_cases import environment


def timing(bench: str, case: str, median_ms: float, fraction: float) -> Timing:
    gpu = {"method": "graph", "host_ms": 0.01, "peak_bytes": 2_000_000}
    times = (median_ms, median_ms, median_ms, 1.0, fraction * median_ms, "memory")
    return Timing(bench, case, "ours", "ours", "triton", 5, *times, **gpu)


def test_goals_of_a_gpu_without_one_are_not_measured_yet():
    on_cpu = Results(environment(None), timings=[timing(goal.bench, goal.case, 1e-6, 1.0) for goal in goals.GOALS])
    # What memory and speed are compared with, and what else a goal is of.
    on_cpu.timings += [
        replace(timing(goal.bench, goal.case, 1e-6, 1.0), contestant=contestant)
        for goal in goals.GOALS
        for contestant in (goal.against, goal.contestant)
        if contestant
    ]
    of_gpu = sum(goal.machine == "GPU" for goal in goals.GOALS)
    for results, unknown in (([], len(goals.GOALS)), ([on_cpu], of_gpu)):
        rows = goals.goal_rows(results)
        assert len(rows) == len(goals.GOALS)
        assert [row[-1] for row in rows].count("not measured yet") == unknown
        assert documents.readme_section(group(map(Run, results))).endswith("GPU: not measured yet.")
    assert "goal met: 0.0 us, at most 40 us" in documents.summary(on_cpu)


def test_goals_are_met_or_missed_on_a_gpu():
    case, activation = "NF-ResNet-50, none clipped", "gelu float32, forward"
    timings = [timing("agc", case, 0.05, 0.9), timing("scaled_activation", activation, 0.2, 0.919)]
    results = Results(environment("Some GPU"), timings=timings)
    verdicts = {row[1]: row[-1] for row in goals.goal_rows([results]) if row[0] != "-"}
    met, missed = "goal met: 50.0 us, at most 55 us", "goal missed: 91.9%, at least 92% of bandwidth"
    assert verdicts[f"agc: {case}"] == met
    assert verdicts[f"scaled_activation: {activation}"] == missed
    assert verdicts["agc: NFNet-F0, none clipped"] == "not measured yet"
    assert met in documents.summary(results) and missed in documents.summary(results)
    in_short = documents.readme_section(group([Run(results)]))
    assert "Goals for such a machine: 1 met, 1 missed" in in_short
    assert f"Missed: Scaled activations: {activation}: 91.9%, where the goal is at least 92% of bandwidth." in in_short
    columns, rows = tables.table(results, "agc")
    assert {"Timed": "graph", "Host ms": "0.0100", "Peak MB": "2"}.items() <= dict(
        zip(columns, rows[0], strict=True)
    ).items()
