"""The report of stored results: what it says in short, its tables, its page and its Markdown."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from benchmarks.report import documents, headlines, notes, places, plots, tables
from benchmarks.report.duels import Duel
from benchmarks.report.page import page
from benchmarks.results import BENCHES, NOT_MEASURED, Incident, Results

from .report_cases import STEP, SWEEPS, environment, everything, machines, of, timing

QUIET = Console(quiet=True)


def test_a_duel_is_of_our_first_and_the_fastest_peer():
    timings = [
        timing("agc", "case", "bound", 1.0, "ceiling"),
        timing("agc", "case", "first", 10.0, "ours"),
        timing("agc", "case", "slow", 30.0),
        timing("agc", "case", "fast", 8.0),
        timing("agc", "case", "second", 5.0, "ours"),
    ]
    duel = Duel.of(timings)
    assert (duel.ours.contestant, duel.peer.contestant, duel.speed_up) == ("first", "fast", 0.8)
    assert tables.duel_row("case", duel) == ["case", "10.0 ms", "fast, 8.00 ms", "0.80x (slower)", "-"]
    assert tables.duel_row("case", Duel.of(timings[1:2])) == ["case", "10.0 ms", "-", "-", "-"]
    assert Duel.of(timings[2:4]) is None
    assert tables.duel_row("case", None)[1] == NOT_MEASURED


def test_the_headlines_are_the_same_for_every_machine():
    full, none = headlines.headline_table(everything()), headlines.headline_table(Results(environment()))
    assert len(full.rows) == len(none.rows) == len(headlines.HEADLINES)
    assert {row[1] for row in none.rows} == {NOT_MEASURED}
    by_work = {row[0]: row[1:] for row in full.rows}
    assert by_work["Scaled activations: gelu bfloat16, forward + backward"] == [
        "20.0 ms", "eager, 18.0 ms", "0.90x (slower)", "-"
    ]  # fmt: skip
    assert by_work[f"T{STEP[1:]}, float32"][1:3] == ["BatchNorm twin, 1041 ms", "1.09x"]
    assert {bench for bench, _ in headlines.HEADLINES} < set(BENCHES)


def test_batch_norm_counts_in_its_strongest_form():
    machine = of(
        environment("Some GPU"),
        timing("step", f"{STEP}, bfloat16 autocast", "nfnets_kernels nf_resnet50", 30.0, "ours"),
        timing("step", f"{STEP}, bfloat16 autocast", "timm nf_resnet50", 1.0),  # is no BatchNorm network
        timing("step", f"{STEP}, bfloat16 autocast", "BatchNorm twin", 40.0),
        timing("step", f"{STEP}, bfloat16 autocast, NCHW", "timm resnetv2_50, CUDA graph", 20.0),
        timing("step", f"{STEP}, bfloat16 autocast, with torch.compile", "nfnets_kernels, torch.compile", 25.0, "ours"),
        timing("step", "training step, batch 1 at 224, bfloat16 autocast", "torchvision resnet50", 2.0),
        timing("step", f"{STEP}, float32", "nfnets_kernels nf_resnet50", 90.0, "ours"),
        timing("step", f"{STEP}, float32", "torchvision resnet50, torch.compile", 99.0),
        timing("step", f"inference, {STEP}, float32", "BatchNorm twin", 1.0),
    )
    low, alone, single = headlines.batch_norm_sentences(machine.results)
    assert "nfnets_kernels, torch.compile, our fastest form, takes 25.0 ms" in low
    assert "(timm resnetv2_50, CUDA graph) 20.0 ms: 0.80 times as fast, that is slower." in low
    assert alone == f"Training step, batch 1 at 224, bfloat16: against BatchNorm {NOT_MEASURED}."
    assert single.endswith("(torchvision resnet50, torch.compile) 99.0 ms: 1.10 times as fast.")
    assert list(headlines.batch_norm_sentences(Results(environment()))) == [
        f"Training step: against BatchNorm {NOT_MEASURED}."
    ]


def test_missed_goals_are_told_in_words():
    told = headlines.sentences(machines(everything())[0])
    assert (
        f"Missed: T{STEP[1:]}, float32: 1.09x, where the goal is at least 1.15x as fast as BatchNorm twin."
    ) in told  # fmt: skip
    assert any(re.match(r"Goals for such a machine: 1 met, 1 missed, \d+ not measured yet\.", one) for one in told)
    assert any(one.startswith("Not measured yet: Clipping, SGD and average in one pass; ") for one in told)


def test_of_several_runs_on_a_machine_the_one_with_most_figures_counts():
    old, new = (Results(environment(date=date, command=date)) for date in ("2021-02-11", "2021-02-12"))
    other = Results(environment("Some GPU"))
    old.timings = [timing("agc", "case", "mine", 1.0, "ours"), timing("residual", "case", "mine", 1.0, "ours")]
    new.timings = [timing("agc", "case", "mine", 2.0, "ours")]
    new.trainings = 3 * everything().trainings
    old.trainings = everything().trainings
    old.incidents = [Incident("agc", "case", "disturbed", "old"), Incident("host", "case", "skipped", "old")]
    first, second = machines(old, new, other)
    assert (len(first.runs), first.main.results, second.results.environment.gpu) == (2, new, "Some GPU")
    assert [one.median_ms for one in first.results.timings] == [2.0, 1.0]  # equally many: the newest; the only one
    assert len(first.results.trainings) == 6
    assert first.others() == {"commit x, 2021-02-11, by `2021-02-11`": [BENCHES["residual"]]}
    assert [one.bench for one in first.results.incidents] == ["host"]  # the other figure was measured again since
    assert BENCHES["host"] in first.unmeasured() and BENCHES["agc"] not in first.unmeasured()


def test_tables_have_the_columns_for_which_there_are_figures():
    columns, rows = tables.table(everything(), "agc")
    assert columns == tables.TIMINGS
    assert rows[0] == [
        "NF-ResNet-50, all clipped",
        "agc_",
        "cpu",
        "12.0",
        "10.8 to 13.2",
        "1.00x",
        "75% memory",
        "cold",
    ]
    assert [row[0] for row in rows[1:]] == ["", ""]
    assert [row[6] for row in rows] == ["75% memory", "50% memory", "-"]
    columns, rows = tables.table(everything(), "scaled_activation")
    assert columns[5:] == ["Time / ours", "Cache", "Compile s"]
    assert [row[-1] for row in rows] == ["-", "-", "7.2"]
    columns, rows = tables.table(everything(), "step")
    assert (columns[-1], [row[-1] for row in rows]) == ("Peak MB", ["503", "682"])
    assert "Timed" in tables.table(everything("Some GPU"), "step").columns


def test_a_sweep_has_a_row_per_point():
    columns, rows = tables.table(everything(), "scaling")
    assert columns == tables.POINTS
    assert [row[0] for row in rows] == ["agc: parameters", "", "", "training step: threads", ""]
    assert [row[1] for row in rows[:3]] == ["1,000,000", "10,000,000", "500,000,000"]
    assert rows[3][1:] == ["1", "2.00", "4.00", "theirs", "2.00x", "1.00", "matmul"]


def test_a_sweep_is_plotted_with_its_floor():
    figure = plots.plot_sweeps("machine", everything().sweeps())
    drawn = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    assert set(drawn) == set(SWEEPS)
    for sweep, axes in drawn.items():
        bound, at = SWEEPS[sweep]
        assert axes.get_xscale() == axes.get_yscale() == "log"
        lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        floor = {"memory": "floor: memory bandwidth", "matmul": "floor: matrix products"}[bound]
        twice, four_times = ([factor * value for value in at] for factor in (2.0, 4.0))
        assert lines == {"mine": (at, twice), "theirs": (at, four_times), floor: (at, at)}
        assert [line.get_linestyle() for line in axes.lines][-1] == "--"
        (band, _) = axes.collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((0.9 * twice[0], 1.1 * twice[-1]))
    plots.plt.close(figure)
    assert set(plots.drawings(everything())) == {
        "agc", "scaled_activation", "step", "profile", "scaling", "models", "convergence"
    }  # fmt: skip


def test_a_plot_takes_the_colour_of_the_page():
    draw = plots.drawings(everything())["agc"]
    drawn = plots.svg(draw, "here")
    assert drawn == plots.svg(draw, "here") != plots.svg(draw, "there")
    assert "#000000" not in drawn and "currentColor" in drawn and "#ffffff" not in drawn
    assert ">lean &lt;b&gt;eager&lt;/b&gt; | &amp; co</text>" in drawn


def cells(text: str) -> list[list[int]]:
    """The number of cells in each row of each table, as another parser of Markdown sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    found: list[list[int]] = []
    for token in tokens:
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append(0)
        elif token.type in ("th_open", "td_open"):
            found[-1][-1] += 1
    return found


def test_markdown_is_well_formed_and_says_what_was_not_measured(tmp_path):
    both = machines(everything(), replace(everything("Some GPU"), timings=everything().timings[:2]))
    texts = [documents.summary(everything()), documents.overview(both, tmp_path), documents.readme_section(both)]
    texts += [documents.docs_section(both, name) for name in places.NAMES]
    for text in texts:
        assert all(len(set(rows)) == 1 for rows in cells(text))
    assert all(NOT_MEASURED in text and cells(text) for text in texts[:4])
    assert f"## {BENCHES['residual']}\n\n{NOT_MEASURED}" in texts[0]
    assert len(cells(texts[2])) == 2
    alone = machines(everything())
    for text in (documents.readme_section(alone), documents.docs_section(alone, "agc")):
        assert text.endswith("GPU: not measured yet.")
    assert "lean <b>eager</b> \\| & co" in texts[0]


def test_cases_of_several_machines_are_compared():
    both = machines(everything(), replace(everything("Some GPU"), timings=everything().timings[:2]))
    table = headlines.across_machines(both)
    assert table.columns == ["Work", "x, 1 thread", "Some GPU"]
    assert table.rows == [
        [
            "Adaptive gradient clipping: NF-ResNet-50, all clipped",
            *["12.0 / 18.0 ms: 1.50x, lean <b>eager</b> | & co"] * 2,
        ]
    ]
    assert headlines.across_machines(both[:1]).rows == []


class Page(HTMLParser):
    """What a page holds; its elements must be closed in order."""

    VOID = ("meta", "link", "br", "hr", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def whole_page() -> str:
    results = everything("Some GPU")
    results.incidents.append(Incident("agc", "<i>case</i>", "failed", "`no` reason"))
    return page(machines(everything(), results), QUIET)


def test_the_page_needs_nothing_but_itself(whole_page):
    found = Page(whole_page)
    assert not {"script", "iframe", "img", "object"} & set(found.tags)
    links = [value for name, value in found.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert links and all(value.startswith(("#", "data:")) for value in links)
    assert "@import" not in whole_page
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", whole_page))
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    wanted = {value[1:] for value in links if value.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", whole_page))
    assert wanted <= set(ids)
    assert len(whole_page.encode()) < 3_000_000


def test_the_page_holds_everything(whole_page):
    found = Page(whole_page)
    for text in (
        *BENCHES.values(), "lean <b>eager</b> | & co", "2100 to 2100", "matrix products, float32", "0.15 TFLOP/s",
        "<i>case</i>", "0.90x (slower)", "goal missed: 1.09x, at least 1.15x as fast as BatchNorm twin", NOT_MEASURED,
        "accuracy as published", *documents.METHOD, "floor: memory bandwidth", "Across machines", "aten::<b>|",
        "300 ms, 31%, 53x",
    ):  # fmt: skip
        assert text in found.text, text
    assert "lean <b>" not in whole_page and "<i>case" not in whole_page
    assert "prefers-color-scheme: dark" in whole_page and "@media print" in whole_page
    alone = Page(page(machines(everything()), QUIET))
    assert "GPU: not measured yet." in alone.text and "Across machines" not in alone.text
    assert "CPU: not measured yet." in Page(page([], QUIET)).text


def test_a_profile_is_stacked_up_to_the_time_of_the_step():
    figure = plots.plot_profiles(everything())
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["nfnets_kernels nf_resnet50", "BatchNorm twin"]
    of_ours = [bars[0] for bars in axes.containers]
    assert [bar.get_width() for bar in of_ours if bar.get_width()] == [300.0, 100.0, 554.0]
    assert of_ours[-1].get_x() + of_ours[-1].get_width() == pytest.approx(954.0)
    assert axes.containers[-1].get_label() == "outside operators"
    plots.plt.close(figure)


def test_of_several_runs_the_one_with_most_profiles_counts():
    old, new = everything(), Results(environment(date="2021-02-12"), profiles=everything().profiles[:1])
    (machine,) = machines(old, new)
    assert machine.results.profiles == old.profiles


def test_notes_say_how_training_went():
    assert notes.trainings_outcome(everything()).endswith("NF-ResNet with AGC at batch 64: -1.0 BatchNorm twin.")
