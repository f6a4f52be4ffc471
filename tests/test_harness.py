"""The harness of the benchmarks: order of calls, caches, rotations, ceilings, and figures that it refuses to report."""

import contextlib
import json
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.progress import Progress

from benchmarks import ceilings, checks, clocks, harness
from benchmarks.checks import BenchmarkError
from benchmarks.clocks import Rotation, copies_to_rotate, interleave, turns
from benchmarks.environment import Environment, cpu_clocks
from benchmarks.harness import Comparison, Contestant, Point, Session, Settings
from benchmarks.results import Incident, Results
from nfnets_kernels import functional

SETTINGS = Settings(device="cpu", quick=True, seed=0, rounds=3, batch_size=1, image_size=32)
X = torch.linspace(-1, 1, 8)


@pytest.fixture
def session(tmp_path, monkeypatch):
    """One whose ceilings are 1 GB/s and 1 GFLOP/s, and whose eviction is told."""
    monkeypatch.setattr(harness, "measure_bandwidth", lambda device, clock: dict.fromkeys(("read", "copy"), 1e9))
    monkeypatch.setattr(harness, "measure_matmul", lambda device, clock: {"float32": 1e9})
    monkeypatch.setattr(clocks, "eviction_bytes", lambda device: 1 << 12)
    with Progress(disable=True) as progress:
        yield Session(SETTINGS, Results(Environment.record("cpu", keeps_memory=False)), tmp_path, progress)


def ours() -> torch.Tensor:
    return functional.scaled_activation(X, "relu")


def eager() -> torch.Tensor:
    return X.relu() * functional.gamma("relu")


def check(name: str, value: object) -> None:
    checks.assert_close(name, value, eager(), 1e-6)


OURS = Contestant("ours", ours, "ours", ["scaled_activation"])
EAGER = Contestant("eager", eager)


def comparison(*contestants: Contestant, **options) -> Comparison:
    return Comparison("scaled_activation", "case", contestants, check, **options)


def test_contestants_take_turns_after_what_precedes_them():
    told = []
    samples = interleave(
        [lambda: told.append("a"), lambda: told.append("b")],
        rounds=2,
        clock=clocks.wall_clock,
        before=lambda: told.append("before"),
        advance=lambda: told.append("round"),
    )
    assert told == ["before", "a", "before", "b", "round"] * 2
    assert [len(times) for times in samples] == [2, 2]


def scripted(session: Session, *seconds: float) -> None:
    """A clock that tells these times; the first two are those of the warm-up."""
    times = iter([0.0, 0.0, *seconds])

    def clock(run) -> float:
        run()
        return next(times)

    session.clock = clock


def test_percentiles_and_the_floor(session):
    scripted(session, 0.03, 0.01, 0.02)
    session.compare(comparison(OURS, traffic={"copy": 4_000_000}, operations={"float32": 1_000_000}))
    (timing,) = session.results.timings
    assert (timing.p20_ms, timing.median_ms, timing.p80_ms) == pytest.approx((14, 20, 26))
    assert (timing.floor_ms, timing.bound, timing.rounds) == (4.0, "memory", 3)
    assert timing.floor_fraction == pytest.approx(0.2)


def test_times_are_told_as_multiples_of_ours(session):
    times = iter([0.0] * 4 + [0.01, 0.03] * 3)
    session.clock = lambda run: (run(), next(times))[1]
    session.compare(comparison(OURS, EAGER))
    assert [one.relative_time for one in session.results.timings] == pytest.approx([1.0, 3.0])


@pytest.mark.parametrize(
    "traffic, operations, expected",
    [
        ({}, {}, (None, None)),
        ({"read": 2_000_000, "copy": 1_000_000}, {}, (3e-3, "memory")),
        ({"read": 1_000_000}, {"float32": 2_000_000}, (2e-3, "matmul")),
    ],
)
def test_the_floor_is_the_longer_of_moving_and_computing(session, traffic, operations, expected):
    seconds, bound = ceilings.floor(traffic, operations, session.results)
    assert (seconds, bound) == (pytest.approx(expected[0]) if expected[0] else None, expected[1])


def wrong() -> torch.Tensor:
    return ours() * 1.001


@pytest.mark.parametrize(
    "contestant, reason",
    [
        (replace(OURS, run=wrong), "ours: differs from the reference by"),
        (replace(OURS, ops=["agc"]), "ours: did not run ['agc']"),
        (replace(EAGER, run=ours), "eager: ran ['scaled_activation'] of nfnets_kernels, so it is no peer"),
        (replace(OURS, run=lambda: functional.scaled_activation(X, "relu", backend="reference")), "instead of cpu"),
        (replace(OURS, run=lambda: ours().fill_(float("nan"))), "ours: differs from the reference by nan"),
    ],
)
def test_a_comparison_with_a_wrong_contestant_has_no_figures(session, contestant, reason):
    session.compare(comparison(OURS, contestant))
    assert session.results.timings == []
    (incident,) = session.results.incidents
    assert incident.kind == "failed"
    assert reason in incident.reason
    assert Results.load(session.folder).incidents == [incident]


def test_what_another_call_shows_to_be_wrong_is_refused_too(session):
    session.compare(comparison(replace(OURS, verified_by=wrong)))
    assert session.results.timings == []
    session.compare(comparison(replace(OURS, run=ours, verified_by=eager)))
    assert len(session.results.timings) == 1


@pytest.mark.parametrize("cache, evictions", [("cold", 5 * 2), ("in step", 0)])
def test_data_is_evicted_before_each_call_or_left_as_the_setup_left_it(session, cache, evictions):
    told = []
    session.evict = lambda: told.append("evict")
    session.compare(comparison(OURS, EAGER, setup=lambda: told.append("setup"), cache=cache))
    assert told.count("evict") == evictions  # two rounds of warm-up, three that are timed, of two contestants
    assert all(second == "evict" for first, second in pairwise(told[2:]) if cache == "cold" and first == "setup")
    assert {one.cache for one in session.results.timings} == {cache}


def test_an_eviction_writes_more_than_the_cache_holds():
    assert clocks.Eviction("cpu").buffer.nbytes == clocks.cache_bytes("cpu")
    assert clocks.cache_bytes("cpu") >= 1 << 15


def test_contestants_rotate_through_data_that_the_others_have_not_just_used(session):
    used = []

    def rotation(name: str, turn) -> Rotation:
        return Rotation([lambda i=i: (used.append((name, i)), ours())[1] for i in range(5)], turn)

    session.evict = lambda: pytest.fail("a rotation needs no eviction")
    turn = turns(5)
    contestants = [replace(OURS, run=rotation("a", turn)), replace(OURS, name="b", run=rotation("b", turn))]
    session.compare(comparison(*contestants))
    # Each in its first call, and then on everything once, before they take turns.
    assert used[:12] == [("a", 0), *(("a", i) for i in range(5)), ("b", 1), *(("b", i) for i in range(5))]
    assert used[12:] == [("ab"[k % 2], (k + 2) % 5) for k in range(2 * 5)]
    assert len(Rotation([ours] * 3, turns(3)).all()) == 3


@pytest.mark.parametrize("nbytes, copies", [(1, 4097), (1000, 6), (4095, 3), (4096, 1), (1 << 20, 1)])
def test_a_rotation_is_larger_than_the_cache(nbytes, copies, monkeypatch):
    monkeypatch.setattr(clocks, "eviction_bytes", lambda device: 4096)
    assert copies_to_rotate(nbytes, "cpu") == copies


def test_a_rotation_in_a_graph_is_shared_out_over_its_calls(session, monkeypatch):
    monkeypatch.setattr(Settings, "on_gpu", True)
    monkeypatch.setattr(harness, "peak_memory", lambda run: 0)
    monkeypatch.setattr(harness, "host_clock", clocks.wall_clock)
    monkeypatch.setattr(harness, "captured", lambda run, pool: run)
    scripted(session, 0.04, 0.04, 0.04)
    session.compare(comparison(replace(OURS, run=Rotation([ours] * 4, turns(4)))))
    (timing,) = session.results.timings
    assert timing.method == "graph"
    assert timing.median_ms == pytest.approx(10)


def test_a_contestant_that_is_to_be_a_graph_is_nothing_else(session, monkeypatch):
    def captured(run, pool):
        raise RuntimeError("not captured: no")

    monkeypatch.setattr(Settings, "on_gpu", True)
    monkeypatch.setattr(harness, "peak_memory", lambda run: 0)
    monkeypatch.setattr(harness, "host_clock", clocks.wall_clock)
    monkeypatch.setattr(harness, "captured", captured)
    session.compare(comparison(OURS, replace(EAGER, graphed=True), graphed=False))
    assert [one.contestant for one in session.results.timings] == ["ours"]
    assert [one.reason for one in session.results.incidents if one.kind == "skipped"] == ["eager: not captured: no"]


@pytest.mark.parametrize("error, raised", [(ValueError("no"), RuntimeError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_an_interruption_of_a_capture_is_no_failure_of_it(error, raised, monkeypatch):
    """A capture that something ends early raises in turn when it ends."""

    @contextlib.contextmanager
    def graph(*arguments, **options):
        try:
            yield
        finally:
            raise RuntimeError("capture ended")

    def run():
        raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(raised, match="not captured: no" if raised is RuntimeError else None):
        clocks.captured(run)


def test_compiling_is_told_apart(session):
    first = iter([0.05])

    def compiles() -> torch.Tensor:
        time.sleep(next(first, 0.0))
        return eager()

    scripted(session, *[0.01] * 8)
    session.compare(comparison(OURS, replace(EAGER, run=compiles, compiled=True)))
    without, with_compiler = session.results.timings
    assert without.compile_s is None
    assert with_compiler.compile_s >= 0.05
    assert with_compiler.median_ms == pytest.approx(10)


def test_an_optional_contestant_that_cannot_run_is_left_out_with_the_reason(session):
    def broken() -> None:
        raise OSError("no compiler\nanywhere")

    session.compare(comparison(OURS, replace(EAGER, run=broken, optional=True)))
    assert [one.contestant for one in session.results.timings] == ["ours"]
    assert session.results.incidents[0].reason == "eager: no compiler"
    with pytest.raises(OSError):
        session.compare(comparison(replace(EAGER, run=broken)))


def test_sweeps_are_in_ascending_order(session):
    for at in (5.0, 1.0, 20.0):
        session.compare(comparison(OURS, EAGER, point=Point("relu: elements", at)))
    session.compare(comparison(OURS))
    loaded = Results.load(session.folder)
    assert loaded == session.results
    assert {name: [one.at for one in timings] for name, timings in loaded.sweeps()["relu: elements"].items()} == {
        "ours": [1.0, 5.0, 20.0],
        "eager": [1.0, 5.0, 20.0],
    }


def test_a_run_goes_on_where_another_was_cut_off(session):
    session.compare(comparison(OURS))
    session.results.timings.append(replace(session.results.timings[0], bench="distributed"))
    session.report_incident(Incident("scaled_activation", "case", "disturbed", "kept"))
    session.report_incident(Incident("scaled_activation", "another case", "failed", "measured again"))
    results = Results(session.results.environment)
    results.resume(session.folder)
    assert results.timings == session.results.timings[:1]
    reasons = [one.reason for one in results.incidents]
    assert "kept" in reasons and "measured again" not in reasons
    with Progress(disable=True) as progress:
        resumed = Session(SETTINGS, results, session.folder, progress)
        resumed.compare(comparison(replace(OURS, run=lambda: pytest.fail("it was measured"))))
        resumed.compare(replace(comparison(OURS), case="another case"))
    assert [one.case for one in Results.load(session.folder).timings] == ["case", "another case"]


def test_a_run_goes_on_with_nothing_and_not_with_other_code(session, tmp_path):
    results = Results(session.results.environment)
    results.resume(tmp_path / "not there yet")
    assert results == Results(session.results.environment)
    session.compare(comparison(OURS))
    other = Results(replace(results.environment, commit="another"))
    with pytest.raises(ValueError, match=r"measured with commit \w+, and now it is another"):
        other.resume(session.folder)


def test_results_are_replaced_whole(session, monkeypatch):
    session.compare(comparison(OURS))
    before = (session.folder / "results.json").read_text()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.compare(comparison(EAGER))
    assert (session.folder / "results.json").read_text() == before


def test_ceilings_are_positive_and_cover_what_is_counted(monkeypatch):
    monkeypatch.setattr(ceilings, "eviction_bytes", lambda device: 1 << 12)
    monkeypatch.setattr(ceilings, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "CPU_SIDE", 64)
    bandwidth = ceilings.measure_bandwidth("cpu", clocks.wall_clock)
    matmul = ceilings.measure_matmul("cpu", clocks.wall_clock)
    assert set(bandwidth) == {"read", "copy", "update"}
    assert set(matmul) == {"float32", "bfloat16", "float16"}
    assert all(rate > 0 for rate in (*bandwidth.values(), *matmul.values()))


def test_a_ceiling_is_the_20th_percentile_and_reading_the_fastest_kernel(monkeypatch):
    monkeypatch.setattr(ceilings, "eviction_bytes", lambda device: 4000)
    monkeypatch.setattr(ceilings, "BANDWIDTH_BYTES", 4000)
    monkeypatch.setattr(ceilings, "CPU_SIDE", 10)
    # A sum, a maximum, a product of two tensors, a copy, an update; most rounds are slow.
    fast = [4.0, 8.0, 2.0, 1.0, 16.0]
    seconds = iter(fast * 4 + [5 * each for each in fast] * (ceilings.ROUNDS - 4))
    rates = ceilings.measure_bandwidth("cpu", lambda run: (run(), next(seconds))[1])
    assert rates == {"read": 8000 / 2.0, "copy": 8000 / 1.0, "update": 8000 / 16.0}
    times = iter([3.0, 2.0, 1.0] * ceilings.ROUNDS)
    assert ceilings.measure_matmul("cpu", lambda run: next(times)) == {
        "float32": 2000 / 3.0, "bfloat16": 2000 / 2.0, "float16": 2000 / 1.0
    }  # fmt: skip


def test_the_machine_is_recorded_as_it_is_found():
    environment = Environment.record("cpu", keeps_memory=True)
    assert environment.clocks == cpu_clocks()
    assert environment.torch == torch.__version__
    assert len(environment.commit) in (0, 7, 40)  # "unknown" outside a repository
    assert environment.cache_bytes == clocks.cache_bytes("cpu")


def test_different_shapes_and_counts_are_no_match():
    with pytest.raises(BenchmarkError, match=r"x: shape \(2,\) instead of \(3,\)"):
        checks.assert_close("x", torch.ones(2), torch.ones(3), 1.0)
    with pytest.raises(BenchmarkError, match="x: 1 tensors instead of 2"):
        checks.assert_all_close("x", [X], [X, X], 1.0)
    with pytest.raises(BenchmarkError, match=r"x\[1\]: differs"):
        checks.assert_all_close("x", [X, X], [X, -X], 1.0)
