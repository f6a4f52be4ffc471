"""The few figures by which a machine is told in short, chosen by a fixed list, and what they say in sentences."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import product

from benchmarks.goals import RESNETV2, TORCHVISION, TWIN, own_goal_rows
from benchmarks.report.duels import Duel, fastest
from benchmarks.report.machines import Machine
from benchmarks.report.notes import trainings_outcome
from benchmarks.report.tables import DUELS, Table, duel_row, milliseconds, speed_up
from benchmarks.results import BENCHES, NOT_MEASURED, Results, Timing

# The same for all machines, whatever the figures turn out to be: the first case that matches. Every op stands here with
# the work of a training step, mixed precision included, whether it wins or loses.
HEADLINES = (
    ("agc", "NF-ResNet-50, all clipped"),
    ("agc", "NFNet-F0, none clipped"),
    ("sgd_agc", "NF-ResNet-50, all clipped"),
    ("weight_standardize", "NF-ResNet-50, float32 to bfloat16, forward + backward"),
    ("scaled_activation", "gelu bfloat16, forward + backward"),
    ("scaled_activation", "relu bfloat16, forward + backward"),
    ("residual", "NHWC bfloat16, forward + backward"),
    ("in_step", "NF-ResNet-50, clipping and SGD after backward"),
    ("step", "training step, batch *, float32*"),
    ("step", "training step, batch *, bfloat16 autocast"),
    ("step", "inference, batch *, float32*"),
    ("step", "inference, batch *, bfloat16 autocast"),
    ("models", "NFNet-F0, batch *, training step"),
)
TELL_THEIR_BENCH = ("step", "models")
BATCH_NORM = (TWIN, TORCHVISION, RESNETV2)


def headline_table(results: Results) -> Table:
    """Ours against the strongest peer in the cases of ``HEADLINES``."""
    rows = []
    for bench, pattern in HEADLINES:
        found = ((case, timings) for case, timings in results.cases(bench).items() if fnmatchcase(case, pattern))
        case, timings = next(found, (pattern.replace("*", "..."), []))
        rows.append(duel_row(work(bench, case), Duel.of(timings)))
    return Table(DUELS, rows)


def work(bench: str, case: str) -> str:
    """A case in words that need no title above them."""
    return case[0].upper() + case[1:] if bench in TELL_THEIR_BENCH else f"{BENCHES[bench]}: {case}"


def sentences(machine: Machine) -> list[str]:
    """What the figures of a machine say, good or bad: against BatchNorm at its strongest, of training, of goals."""
    results = machine.results
    found = [*batch_norm_sentences(results), *goal_sentences(results)]
    if results.trainings:
        found.append(f"{BENCHES['convergence']}: {lower(trainings_outcome(results))}")
    found += [f"{', '.join(titles)}: measured at {line}." for line, titles in machine.others().items()]
    if missing := machine.unmeasured():
        found.append(f"{capital(NOT_MEASURED)}: {'; '.join(missing)}.")
    return found


def batch_norm_sentences(results: Results) -> Iterator[str]:
    """A training step in its fastest form against that of BatchNorm networks in theirs, by batch and precision.

    The forms (eager, compiled, in a CUDA graph, of either memory format) may be of several cases.
    """
    steps: dict[str, list[Timing]] = {}
    for case, timings in results.cases("step").items():
        if found := re.match(r"training step, batch \d+ at \d+, (float32|bfloat16|float16)", case):
            steps.setdefault(found[0], []).extend(timings)
    for name in steps or ("training step",):
        timings = steps.get(name, [])
        ours = fastest([one for one in timings if one.role == "ours"])
        theirs = fastest([one for one in timings if one.contestant.startswith(BATCH_NORM)])
        if ours is None or theirs is None:
            yield f"{capital(name)}: against BatchNorm {NOT_MEASURED}."
            continue
        factor = theirs.median_ms / ours.median_ms
        yield (
            f"{capital(name)}: {ours.contestant}, our fastest form, takes {milliseconds(ours.median_ms)} ms, BatchNorm "
            f"in its strongest form ({theirs.contestant}) {milliseconds(theirs.median_ms)} ms: "
            f"{factor:.2f} times as fast{'' if round(factor, 2) >= 1 else ', that is slower'}."
        )


def goal_sentences(results: Results) -> Iterator[str]:
    """How many goals for a machine are met, and which are missed."""
    own = own_goal_rows(results)
    met, missed = ([row for row in own if row[-1].startswith(f"goal {how}")] for how in ("met", "missed"))
    unknown = len(own) - len(met) - len(missed)
    yield f"Goals for such a machine: {len(met)} met, {len(missed)} missed, {unknown} {NOT_MEASURED}."
    for _, case, goal, verdict in missed:
        reached = verdict.removeprefix("goal missed: ").removesuffix(f", {goal}")
        yield f"Missed: {work(*case.split(': ', 1))}: {reached}, where the goal is {goal}."


def capital(text: str) -> str:
    """With a capital letter."""
    return text[:1].upper() + text[1:]


def lower(text: str) -> str:
    """Without one."""
    return text[:1].lower() + text[1:]


def unmeasured_kinds(machines: Sequence[Machine]) -> list[str]:
    """That no CPU, or no GPU, was measured."""
    there = {"GPU" if machine.results.environment.gpu else "CPU" for machine in machines}
    return [f"{kind}: {NOT_MEASURED}." for kind in ("CPU", "GPU") if kind not in there]


def across_machines(machines: Sequence[Machine]) -> Table:
    """Ours, the strongest peer and the speed-up in every case that several machines have, a column per machine.

    Points of sweeps, of which there are dozens, are left to the plots.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for bench, machine in product((bench for bench in BENCHES if bench != "scaling"), machines):
        for case, timings in machine.results.cases(bench).items():
            duel = Duel.of(timings)
            if duel and duel.peer:
                times = f"{milliseconds(duel.ours.median_ms)} / {milliseconds(duel.peer.median_ms)} ms"
                text = f"{times}: {speed_up(duel)}, {duel.peer.contestant}"
                cells.setdefault((bench, case), {})[machine.slug] = text
    shared = [key for key, by_machine in cells.items() if len(by_machine) > 1]
    rows = [[work(*key), *(cells[key].get(machine.slug, "-") for machine in machines)] for key in shared]
    return Table(["Work", *(machine.name for machine in machines)], rows)
