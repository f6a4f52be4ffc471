"""``python -m benchmarks report``, the places in README and docs that it fills, and what Ctrl-C leaves of a run."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from benchmarks import __main__
from benchmarks.environment import REPOSITORY
from benchmarks.report import command as report
from benchmarks.report import documents, headlines, places, tables
from benchmarks.report.machines import Run, group
from benchmarks.results import BENCHES, NOT_MEASURED, Results

from .report_cases import everything, machines


def test_the_command_reads_folders_and_files_and_writes_both_forms(tmp_path, monkeypatch, capsys):
    everything().save(tmp_path / "cpu")
    replace(everything("Some GPU"), models=[], trainings=[]).save(tmp_path / "gpu")
    alone = tmp_path / "some-gpu.json"
    (tmp_path / "gpu" / "results.json").rename(alone)
    command = ["benchmarks", "report", str(tmp_path / "cpu"), str(alone), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    assert __main__.main() == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## x, 1 thread" in text and "## Some GPU" in text
    assert "[summary.md](../cpu/summary.md)" in text and "[agc.png](../cpu/agc.png)" in text
    assert "Some GPU" in (tmp_path / "out" / "report.html").read_text()
    plots = {path.stem for path in (tmp_path / "cpu").glob("*.png")}
    assert plots == {"agc", "scaled_activation", "step", "profile", "models", "scaling", "convergence"}
    assert (tmp_path / "cpu" / "summary.md").read_text() == documents.summary(everything())


@pytest.mark.parametrize("content", [None, "{", '{"environment": {"of": "another version"}}'])
def test_what_is_no_result_is_named(content, tmp_path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path}: no results of this version of the benchmarks")):
        report.main([str(tmp_path), "--output", str(tmp_path)])


def test_readme_is_not_made_of_some_of_the_results(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--readme"])
    assert "name neither results nor --output" in capsys.readouterr().err


def repository(folder, readme: str, doc: str):
    (folder / "docs" / "ops").mkdir(parents=True)
    (folder / "benchmarks" / "results").mkdir(parents=True)
    (folder / "README.md").write_text(readme)
    (folder / "docs" / "ops" / "agc.md").write_text(doc)
    return folder


README = (
    "before\n<!-- benchmark-table:start -->\nold\n<!-- benchmark-table:end -->\nafter `<!-- benchmark-table:end -->`\n"
)
DOC = "# agc\n<!-- benchmark-table:agc:start -->\n<!-- benchmark-table:agc:end -->\nx\n"


def test_places_are_filled_and_a_changed_figure_is_noticed(tmp_path):
    root, before = repository(tmp_path, README, DOC), machines(everything())
    changed = places.update(before, root)
    assert changed == [root / "README.md", root / "docs" / "ops" / "agc.md", root / "benchmarks/results/README.md"]
    readme, doc = changed[0].read_text(), changed[1].read_text()
    assert readme.startswith("before\n<!-- benchmark-table:start -->\n**x, 1 thread; ")
    assert readme.endswith(
        "GPU: not measured yet.\n<!-- benchmark-table:end -->\nafter `<!-- benchmark-table:end -->`\n"
    )
    assert "old" not in readme and "| 12.0 ms |" in readme and "| 12.0 ms |" in doc
    assert places.stale(before, root) == places.update(before, root) == []

    changed[1].write_text(doc.replace("12.0 ms", "11.0 ms"))
    assert places.stale(before, root) == [changed[1]]
    results = everything()
    results.timings[0] = replace(results.timings[0], median_ms=13.0)
    assert places.stale(machines(results), root) == changed


@pytest.mark.parametrize("doc, message", [
    (DOC.replace(":agc:", ":adc:"), "no bench is called adc; there are all, agc, "),
    (DOC.replace("agc:end", "residual:end"), "every benchmark-table:start needs its benchmark-table:end"),
    (DOC.replace("<!-- benchmark-table:agc:end -->", ""), "every benchmark-table:start needs its benchmark-table:end"),
])  # fmt: skip
def test_wrong_markers_are_named(doc, message, tmp_path):
    with pytest.raises(ValueError, match=f"agc.md: {message}"):
        places.stale(machines(everything()), repository(tmp_path, README, doc))


def test_readme_docs_and_stored_results_agree():
    stored = group(Run.load(folder) for folder in places.stored_folders())
    assert stored
    outdated = [str(path.relative_to(REPOSITORY)) for path in places.stale(stored)]
    assert not outdated, f"{', '.join(outdated)}: not what the stored results say; `{places.COMMAND}` mends it"
    assert places.PLACE.search((REPOSITORY / "README.md").read_text())


def test_every_headline_is_measured_on_a_cpu():
    """A case that is renamed must not drop out of the README unnoticed."""
    for machine in group(Run.load(folder) for folder in places.stored_folders()):
        if machine.results.environment.gpu is None:
            rows = headlines.headline_table(machine.results).rows
            assert [row[0] for row in rows if row[1] == NOT_MEASURED] == []


INTERRUPTED = """
import sys, time
from benchmarks import __main__, bench_agc, bench_residual, harness
from benchmarks.harness import Comparison, Contestant

def endless(session):
    case = Contestant("asleep", lambda: time.sleep(0.01))
    session.compare(Comparison("agc", "never finished", [case], lambda name, value: print("timing", flush=True),
                               cache="in step", rounds=10**6))

bench_residual.SHAPE = (2, 8, 5, 5)
bench_agc.run = endless
harness.measure_bandwidth = lambda device, clock: {"copy": 1e9, "read": 1e9, "update": 1e9}
harness.measure_matmul = lambda device, clock: {"float32": 1e12}
sys.argv = ["benchmarks", "--device", "cpu", "--threads", "1", "--quick", "--only", "residual", "agc", *sys.argv[1:]]
sys.exit(__main__.main())
"""


def test_an_interruption_leaves_what_is_finished(tmp_path):
    # As a shell starts what is to run in the background: that, and `timeout`, would ignore an interruption.
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", ignoring, sys.executable, "-c", INTERRUPTED, "--output", str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.strip() == "timing":
            time.sleep(0.3)  # into the rounds
            process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130, "".join(seen)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert {row["bench"] for row in stored["timings"]} == {"residual"}
    assert Results.load(tmp_path).timings
    assert tables.table(Results.load(tmp_path), "residual").markdown() in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "residual.png").stat().st_size > 10_000
    said = "".join(seen)
    assert "interrupted; keeping what is finished" in said and BENCHES["residual"] in said
    assert "Traceback" not in said


def test_help_names_the_report(monkeypatch, capsys):
    for arguments, text in ((["--help"], "python -m benchmarks report --help"), (["report", "--help"], "report.html")):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        assert ended.value.code == 0 and text in capsys.readouterr().out
