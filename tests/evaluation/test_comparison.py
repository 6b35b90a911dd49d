"""Several runs in one table: which cells are the same, what the table and the plot have of them."""

import json
import re

import pytest
from eval_fakes import Characters, EchoSuite, FakeEngines, echo_run

from vllm_heterocache.commands import cli
from vllm_heterocache.evaluation.engine import worker
from vllm_heterocache.evaluation.report import comparison, plots, report
from vllm_heterocache.evaluation.report.joined_runs import (
    NEEDED,
    cell_of,
    joined_rows,
    plain_options,
)
from vllm_heterocache.evaluation.report.statistics import mcnemar
from vllm_heterocache.evaluation.run_folder import RunFolder, configuration, stock

TASKS = ("prose/register", "prose/station", "fidelity")


class ProseAndFacts(EchoSuite):
    """As suite `quick`: four questions a context, KL of texts."""

    def __init__(self):
        super().__init__(questions=4)

    def score(self, sample, tokens, text):
        kl = {"kl": 0.25} if sample.task == "fidelity" else {}
        return super().score(sample, tokens, text) | kl


def wrong(configuration, sample):
    """Half a budget forgets whatever `register` asks."""
    return configuration.name.startswith("heterocache 0.1") and sample.task == TASKS[0]


def evaluated(path, *options, **settings):
    """A folder with stock and these configurations, which has no results yet."""
    folder = RunFolder(path)
    folder.begin(echo_run(**{"tasks": TASKS, **settings}), resume=False)
    for one in (stock(), *map(configuration, options)):
        engines = FakeEngines(wrong)
        worker.run_configuration(folder, one, Characters(), engines.open, ProseAndFacts())
    return folder


def with_results(folder, *options):
    report.write(folder, [configuration(one) for one in options], {})
    return folder.path / "results.jsonl"


def joined_cells(paths):
    return [cell_of(row) for row in joined_rows(paths)]


def row_of(lines, *texts):
    (found,) = [line for line in lines if line.startswith("| " + " | ".join(texts) + " |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, {"gpu_budget": 0.3}),
        ({"gpu_budget": 0.1, "profile": "/p.json", "cpu_pool_gib": 5}, {"gpu_budget": 0.1}),
        ({"policy": "heterocache", "recipe": "retrieval", "sink_pages": 1}, {"gpu_budget": 0.3}),
        ({"matched_share": 0.5}, {"gpu_budget": 0.3}),
        ({"matched_share": 0}, {"gpu_budget": 0.3, "matched_share": 0}),
        ({"evicted_means": False, "matched_share": 0}, {"gpu_budget": 0.3, "evicted_means": False}),
        (
            {"evicted_means": False, "matched_share": 0.5},
            {"gpu_budget": 0.3, "evicted_means": False, "matched_share": 0.5},
        ),
        (
            {"policy": "snapkv", "evicted_means": False, "policy_options": {"window": 8}},
            {"gpu_budget": 0.3, "policy": "snapkv", "policy_options": {"window": 8}},
        ),
        ({"recipe": "paper", "trial": "x"}, {"gpu_budget": 0.3, "recipe": "paper", "trial": "x"}),
    ],
)
def test_options_that_change_nothing_are_left_out(options, plain):
    assert plain_options(options) == plain


def test_a_row_is_as_good_as_the_cell_it_was_made_of(tmp_path):
    options = {"gpu_budget": 0.1}
    file = with_results(evaluated(tmp_path, options), options)
    run = json.loads((tmp_path / "run.json").read_text())
    for line in file.read_text().splitlines():
        row = json.loads(line)
        assert report.result_row(cell_of(row), run) == row


def test_runs_are_joined_also_of_folders_that_were_killed(tmp_path):
    small, large = {"gpu_budget": 0.1}, {"gpu_budget": 0.2, "cpu_pool_gib": 5}
    file = with_results(evaluated(tmp_path / "a", small), small)
    evaluated(tmp_path / "b", large | {"matched_share": 0.5})
    cells = joined_cells([file, tmp_path / "b"])
    names = ["stock", "heterocache 0.1", "heterocache 0.2"]
    assert list(dict.fromkeys(cell.configuration.name for cell in cells)) == names
    assert len(cells) == 3 * len(TASKS) * 2, "stock is there once"


def test_more_units_count_and_of_as_many_the_later(tmp_path):
    options = {"gpu_budget": 0.2}
    first = with_results(evaluated(tmp_path / "a", options), options)
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    later, fewer = tmp_path / "later.jsonl", tmp_path / "fewer.jsonl"
    for file, changes in ((later, {"score": 0.5}), (fewer, {"score": 0.0, "units": 1})):
        file.write_text("".join(json.dumps(row | changes) + "\n" for row in rows))
    cells = joined_cells([first, later, fewer])
    assert len(cells) == len(rows) and {cell.score for cell in cells} == {0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "rows of seed 0 and of 1 cannot be compared"),
        ({"llm": {"kv_cache_dtype": "fp8"}}, "rows of kv_cache_dtype auto and of fp8"),
        ({"versions": {"python": "3.9.1"}}, "rows of Python .* and of 3.9 cannot"),
    ],
)
def test_runs_of_other_prompts_are_refused(tmp_path, changes, message):
    options = {"gpu_budget": 0.2}
    file = with_results(evaluated(tmp_path / "a", options, lengths=(20,)), options)
    other = tmp_path / "other.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    other.write_text(json.dumps(row | changes) + "\n")
    with pytest.raises(ValueError, match=message):
        joined_cells([file, other])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no rows"),
        ("", "holds no rows"),
        ("nothing", "is no file of result rows"),
        ("[" * 100_000, "is no file of result rows"),
        ("{}", "is no row of"),
        (json.dumps(dict.fromkeys(NEEDED)), "is no row of"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, text, message, capsys):
    path = tmp_path / "x"
    path.mkdir() if text is None else path.write_text(text)
    assert cli.main(["compare", str(path), "--no-plots", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [{"config": None}, {"task": None}, {"score": "0.5"}, {"wins": None}, {"units": 0}],
    ids=str,
)
def test_rows_that_cannot_be_compared_are_refused_with_their_file(tmp_path, changes):
    options = {"gpu_budget": 0.1}
    file = with_results(evaluated(tmp_path, options), options)
    row = json.loads(file.read_text().splitlines()[-1])
    file.write_text(json.dumps(row | changes | {"extra": "x" * 1000}) + "\n")
    with pytest.raises(ValueError, match="is no row of") as error:
        joined_rows([file])
    assert str(file) in str(error.value) and len(str(error.value)) < 600


def test_one_table_has_answers_and_costs_of_everyone(tmp_path):
    options = [{"gpu_budget": 0.1, "drift_threshold": 0}, {"gpu_budget": 0.3}, {"gpu_budget": 0.1}]
    folder = evaluated(tmp_path, *options)
    lines = comparison.comparison_table(joined_cells([folder.path]))
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        ["  ", " stock "],
        [" 30 % ", " heterocache "],
        [" 10 % ", " heterocache "],
        [" 10 % ", " heterocache drift_threshold=0 "],
    ]
    row = row_of(lines, "10 %", "heterocache")
    # two wordings of four contexts with four questions each, one of them forgotten
    assert mcnemar(0, 16) < comparison.SIGNIFICANT
    assert row[2:6] == ["0.2500; 16 of 32*"] * 2 + ["50.0%", "100.0%"]
    assert row[6:] == ["11.5", "5.0", "13.0", "0.2", "8.7", "2.5"]
    assert row_of(lines, "30 %", "heterocache")[2] == "0.2500; 32 of 32"
    assert row_of(lines, "", "stock")[2:6] == ["; 32 of 32", "; 32 of 32", "64", "32"]


def test_prompts_that_stayed_dense_do_not_count(tmp_path):
    options = {"gpu_budget": 0.1}
    file = with_results(evaluated(tmp_path, options), options)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if row["length"] == 20 and row["config"] != "stock":
            row["reads"]["share"] = 1.0
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = joined_cells([file])
    row = row_of(comparison.comparison_table(cells), "10 %", "heterocache")
    assert row[2:5] == ["dense", "0.2500; 16 of 32*", "50.0%"]


def test_a_configuration_may_lack_a_length(tmp_path):
    options = {"gpu_budget": 0.1}
    file = with_results(evaluated(tmp_path, options), options)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(one for one in lines if '"stock"' in one or '"length": 20' in one))
    lines = comparison.comparison_table(joined_cells([file]))
    row = row_of(lines, "10 %", "heterocache")
    assert row[2:4] == ["0.2500; 16 of 32*", "-; -"] and row[6] == "11.5 / -"


def test_compare_writes_a_table_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    evaluated(tmp_path / "a", {"gpu_budget": 0.1}, {"gpu_budget": 0.1, "policy": "snapkv"})
    out = tmp_path / "out"
    assert cli.main(["compare", str(tmp_path / "a"), "--out", str(out)]) == 0
    text = (out / "comparison.md").read_text()
    assert text in capsys.readouterr().out and re.search(r"^\| 10 % \| snapkv \|", text, re.M)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    configurations = [row["config"] for row in rows]
    assert configurations[:6] == ["stock"] * 6 and len(rows) == 18
    assert configurations.count({"gpu_budget": 0.1, "policy": "snapkv"}) == 6
    assert (out / "kl_and_answers_by_resident_kv.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_has_kl_above_answers_and_nothing_of_dense_prompts(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    options = [{"gpu_budget": 0.1}, {"gpu_budget": 0.3}, {"gpu_budget": 0.97}]  # reads 1.0
    cells = joined_cells([evaluated(tmp_path, *options).path])
    assert plots.save_comparison_plot(cells, tmp_path / "x.png") is not None
    axes = drawn[0].axes
    assert len(axes) == 4 and [axis.get_title("left") for axis in axes[:2]] == [
        "20 tokens",
        "40 tokens",
    ]
    (kl,) = axes[0].get_lines()
    assert kl.get_xdata() == pytest.approx([0.115, 0.315]) and set(kl.get_ydata()) == {0.25}
    assert axes[0].get_yscale() == "log"
    answers = next(one for one in axes[2].get_lines() if len(one.get_xdata()) == 2)
    assert answers.get_ydata() == pytest.approx([0.5, 1.0])


def test_without_texts_there_is_no_such_plot(tmp_path):
    cells = joined_cells([evaluated(tmp_path, {"gpu_budget": 0.1}, tasks=TASKS[:2]).path])
    assert plots.save_comparison_plot(cells, tmp_path / "x.png") is None
