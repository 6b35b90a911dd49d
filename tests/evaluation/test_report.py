"""Cells, result rows, tables and plots from rows that are known."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from eval_fakes import Characters, EchoSuite, FakeEngines, echo_run

from vllm_heterocache.evaluation.engine import worker
from vllm_heterocache.evaluation.report import plots, report
from vllm_heterocache.evaluation.report.statistics import mcnemar, wilson
from vllm_heterocache.evaluation.run_folder import RunFolder, configuration, stock
from vllm_heterocache.heads.assignment import HeadRole

CONFIGURATIONS = [configuration({"gpu_budget": 0.3}), configuration({"gpu_budget": 0.1})]

NAMES = ["stock", *(one.name for one in CONFIGURATIONS)]


def wrong(configuration, sample):
    """Stock is always right; 0.1 errs in the first two samples of length 40."""
    index = sample.prompt[-1]
    return configuration.name == "heterocache 0.1" and sample.length == 40 and index < 2


def evaluated(path, suite=None, **settings) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(echo_run(**settings), resume=False)
    for one in (stock(), *CONFIGURATIONS):
        worker.run_configuration(
            folder, one, Characters(), FakeEngines(wrong).open, suite or EchoSuite()
        )
    return folder


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return evaluated(tmp_path)


def test_cells_count_samples_and_compare_with_stock(folder):
    cells = report.cells_of(folder, CONFIGURATIONS)
    assert [(c.length, c.configuration.name) for c in cells] == [
        (length, name)
        for length in (20, 40)
        for name in ("stock", "heterocache 0.3", "heterocache 0.1")
    ]
    low = cells[-1]
    assert (low.samples, low.units, low.score, low.stock_score) == (4, 4, 0.5, 1.0)
    assert (low.low, low.high) == wilson(2, 4)
    assert low.metrics == {"tokens": 6.0}
    test = low.against_stock
    assert (test.wins, test.losses, test.p) == (0, 2, mcnemar(0, 2))
    assert cells[0].against_stock is None


def test_questions_are_units_of_their_own(tmp_path):
    folder = evaluated(tmp_path, EchoSuite(questions=3))
    cell = report.cells_of(folder, CONFIGURATIONS)[-1]
    assert (cell.samples, cell.units, cell.score) == (4, 12, 0.5)
    assert (cell.against_stock.losses, cell.against_stock.p) == (6, mcnemar(0, 6))


def test_partial_scores_make_all_of_a_cell_no_proportions(tmp_path):
    """Full attention's 1, 1, 1, 1 is not four trials when others score in between."""

    class Partial(EchoSuite):
        def score(self, sample, tokens, text):
            return {"score": 1.0 if tokens[0] == sample.prompt[-1] else 0.75}

    stock_cell, ours, low = report.cells_of(evaluated(tmp_path, Partial()), CONFIGURATIONS)[3:]
    assert (stock_cell.low, stock_cell.high) == (1, 1)
    assert low.score == 0.875 and low.low < 0.875 < low.high
    assert low.against_stock.test == ours.against_stock.test == "bootstrap"
    assert ours.against_stock.p == 1


def test_several_tasks_have_cells_over_all_of_them(tmp_path):
    folder = evaluated(tmp_path, tasks=("a", "b"))
    cells = report.cells_of(folder, CONFIGURATIONS)
    assert [(c.task, c.length) for c in cells[::3]] == [
        (task, length) for task in (report.ALL_TASKS, "a", "b") for length in (20, 40)
    ]
    low = cells[5]
    assert (low.samples, low.score, low.stock_score) == (8, 0.5, 1.0)
    assert (low.against_stock.losses, low.against_stock.pairs) == (4, 8)
    report.write(folder, CONFIGURATIONS, {})
    text = (folder.path / "report.md").read_text()
    assert "| all tasks | 40 | 8 | 1.000 | 1.000 | 0.500 |\n| a | 20 | 4 | 1.000 |" in text


def test_tasks_of_different_metrics_are_not_averaged(tmp_path):
    class Mixed(EchoSuite):
        def score(self, sample, tokens, text):
            return super().score(sample, tokens, text) | {sample.task: 1.0}

    folder = evaluated(tmp_path, Mixed(), tasks=("a", "b"))
    assert {cell.task for cell in report.cells_of(folder, CONFIGURATIONS)} == {"a", "b"}


def test_samples_that_stock_lacks_are_left_out_and_other_prompts_refused(folder):
    file = folder.samples_file(stock())
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    assert sum(cell.samples for cell in report.cells_of(folder, CONFIGURATIONS)) == 3 * 7
    row = json.loads(lines[0]) | {"prompt": "other"}
    folder.append(stock(), row)
    with pytest.raises(ValueError, match=f"{row['id']} has one prompt for stock and another"):
        report.cells_of(folder, CONFIGURATIONS)


def test_result_rows_say_how_they_were_made(folder):
    report.write(folder, CONFIGURATIONS, {})
    rows = [json.loads(line) for line in (folder.path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert {"benchmark", "date", "commit", "device", "versions", "config"} <= row.keys()
        assert row["benchmark"] == "eval_echo" and row["model"] == "fake" and row["samples"] == 4
        assert None not in row.values()
    assert [row["config"] for row in rows[:3]] == [
        "stock",
        {"gpu_budget": 0.3},
        {"gpu_budget": 0.1},
    ]
    assert "p" not in rows[0] and rows[-1]["p"] == 0.5 and rows[-1]["test"] == "mcnemar"
    resident = {"share": 0.31, "with_tables": 0.315, "highest_share": 0.32, "moments": 5}
    resident["host"] = 0.15
    assert rows[1]["resident"] == resident and rows[1]["block_bytes"] == [400, 2]
    assert rows[1]["reads"] == {"share": 0.33, "fetched": 0.002, "dense_pages": 900}
    assert rows[0]["reads"] == {}


def test_report_is_markdown_with_counts_intervals_and_measured_memory(folder):
    report.write(folder, CONFIGURATIONS, {"heterocache 0.05": "below the floor"})
    text = (folder.path / "report.md").read_text()
    assert text.count("\n## echo, ") == 2
    low, high = wilson(2, 4)
    assert f"| heterocache 0.1 | 4 | 4 | 0.500 | {low:.3f}-{high:.3f} | 0/2 | 0.5 | 6 |" in text
    assert "| heterocache 0.3 | 40 | 4 | 0.330 | 0.002 | 5 | 0.310 | 0.315 | 0.320 |" in text
    assert "| stock | 40 | 4 | 1.000 | - | 5 | 1.010 | 1.015 | 1.020 |" in text
    assert "- heterocache 0.05: below the floor" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert "| samples |" in table.splitlines()[0]
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_plots_are_written_for_what_there_is(folder):
    pytest.importorskip("matplotlib")
    cells = report.cells_of(folder, CONFIGURATIONS)
    written = plots.save_plots(folder, cells, CONFIGURATIONS)
    names = {path.name for path in written}
    assert names == {
        "score_by_length.png",
        "score_by_resident_kv.png",
        "score_by_kv_read.png",
        "head_roles.png",
        "depth_by_length.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_one_length_gives_no_plot_over_length(tmp_path):
    pytest.importorskip("matplotlib")
    folder = evaluated(tmp_path, lengths=(20,))
    cells = report.cells_of(folder, CONFIGURATIONS)
    names = {path.name for path in plots.save_plots(folder, cells, CONFIGURATIONS)}
    assert "score_by_length.png" not in names and "score_by_kv_read.png" in names


def test_panels_of_many_tasks_stand_in_rows(tmp_path):
    """RULER's 13 tasks side by side would be 74 inches wide."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    figure, axes = plots._panels(13, plots.COLUMNS)
    assert isinstance(figure, Figure) and axes.shape == (4, 4) and len(figure.axes) == 13
    folder = evaluated(tmp_path, tasks=tuple("abcdef"))
    cells = report.cells_of(folder, CONFIGURATIONS)
    assert plots.save_length_plot(cells, tmp_path / "x.png").is_file()
    assert plots.save_share_plot(cells, "read_share", tmp_path / "y.png").is_file()


def test_shares_of_a_cell_are_the_measured_ones(folder):
    """Tables count as memory; stock reads everything, whatever was measured."""
    cells = report.cells_of(folder, CONFIGURATIONS)
    assert [cell.resident_share for cell in cells[:3]] == pytest.approx([1.015, 0.315, 0.115])
    assert [cell.read_share for cell in cells[:3]] == pytest.approx([1.0, 0.33, 0.13])
    unmeasured = [dataclasses.replace(cell, engine={}) for cell in cells[:2]]
    assert [(cell.resident_share, cell.read_share) for cell in unmeasured] == [
        (1.0, 1.0),
        (None, None),
    ]


def test_samples_of_all_tasks_count_in_the_cost_table(tmp_path):
    folder = evaluated(tmp_path, tasks=("a", "b"))
    report.write(folder, CONFIGURATIONS, {})
    assert "| heterocache 0.1 | 20 | 8 | 0.130 |" in (folder.path / "report.md").read_text()


def test_nothing_measured_gives_no_plot_over_it(folder, tmp_path):
    cells = [
        dataclasses.replace(cell, engine={}) for cell in report.cells_of(folder, CONFIGURATIONS)
    ]
    assert plots.save_share_plot(cells, "read_share", tmp_path / "x.png") is None


def test_role_map_reads_the_letters_back():
    expected = [
        [HeadRole.PIVOT, HeadRole.SATELLITE],
        [HeadRole.ANCHOR, HeadRole.VOLATILE],
    ]
    np.testing.assert_array_equal(plots.role_map(["PS", "AV"]), expected)


def test_roles_are_drawn_where_heads_differ(folder, tmp_path):
    assert plots.save_role_maps({}, tmp_path / "x.png") is None
    roles = {"heterocache 0.3": ["PS", "SA", "VP"], "heterocache 0.1": ["PS", "SA", "VP"]}
    assert plots._roles_of(folder, CONFIGURATIONS) == roles
    streaming = configuration({"policy": "streaming"})
    folder.save_engine(streaming, {"roles": ["AA", "AA"]})
    assert plots._roles_of(folder, [stock(), streaming]) == {}


def test_depth_map_averages_and_leaves_holes():
    rows = [
        {"depth": depth, "length": length, "scores": {"score": score}}
        for depth, length, score in [(0.5, 20, 1.0), (0.5, 20, 0.0), (0.0, 20, 1.0), (0.0, 40, 0.0)]
    ]
    scores = plots.depth_map(rows, [0.0, 0.5, 1.0], [20, 40])
    np.testing.assert_array_equal(scores, [[1.0, 0.0], [0.5, np.nan], [np.nan, np.nan]])


def test_depth_maps_say_their_scores_and_counts(tmp_path, monkeypatch):
    """A map of one colour shows neither its cells nor, to some, what the colour means."""
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    cells = [(depth, length) for depth in (0.0, 100.0) for length in (20, 40)]
    rows = [
        {"depth": depth, "length": length, "scores": {"score": score}}
        for depth, length in cells
        for score in (1.0, depth / 200)
    ]
    of_one = {"stock": rows, **{f"x {i}": rows for i in range(4)}, "killed": rows[:2]}
    plots.save_depth_maps(of_one, tmp_path / "x.png")
    (figure,) = drawn
    *maps, bar = figure.axes
    assert len(maps) == 6 and max(axis.get_subplotspec().colspan.stop for axis in maps) == 4
    assert [text.get_text() for text in maps[0].texts] == ["0.5", "0.5", "0.75", "0.75"]
    assert [text.get_text() for text in maps[-1].texts] == ["0.5", "", "", ""]
    assert bar.get_ylabel() == "score, mean of 2 samples a cell"
    low, high = maps[0].get_ylim()
    assert low > high, "the beginning of the prompt is on top"


def test_missing_matplotlib_is_said_in_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib.*--no-plots"):
        plots.check_matplotlib()


def test_rows_do_not_name_folders_of_this_machine(folder):
    cell = report.cells_of(folder, CONFIGURATIONS)[1]
    other = configuration({"profile": "/home/me/p.json", "gpu_budget": 0.3})
    row = report.result_row(dataclasses.replace(cell, configuration=other), echo_run().to_json())
    assert row["config"] == {"profile": "p.json", "gpu_budget": 0.3}
