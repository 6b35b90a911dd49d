"""Options of suites and the reading of local data."""

import json
from pathlib import Path

import pytest

from vllm_heterocache.evaluation.local_data import data_folder, draw, find_file, read_rows
from vllm_heterocache.evaluation.sample import SuiteSettings
from vllm_heterocache.evaluation.suite_options import choose_tasks, read_options


def test_tasks_default_and_keep_their_order():
    known = ["a", "b", "c"]
    assert choose_tasks("s", SuiteSettings(), known, ["a", "b"]) == ["a", "b"]
    assert choose_tasks("s", SuiteSettings(tasks=("c", "a", "c")), known, []) == ["c", "a"]


def test_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="--tasks d is not a task of --suite s; choose from a, b"):
        choose_tasks("s", SuiteSettings(tasks=("a", "d")), ["a", "b"], [])


@pytest.mark.parametrize("value", [True, "true", "1", "Yes", 1])
def test_options_take_the_type_of_their_default(value):
    settings = SuiteSettings(extra={"chat": value, "depths": "7"})
    options = read_options("s", settings, {"chat": False, "depths": 11, "other": "x"})
    assert options == {"chat": True, "depths": 7, "other": "x"}


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"chatt": 1}, "--set chatt=... is not an option of --suite s; did you mean chat"),
        ({"q": 1}, "--set q=... is not an option of --suite s; it has chat, depths"),
        ({"chat": "maybe"}, "--set chat=maybe is neither true nor false"),
        ({"depths": "many"}, "--set depths=many is not of type int"),
        ({"depths": 2.5}, "--set depths=2.5 is not of type int"),
        ({"depths": True}, "--set depths=True is not of type int"),
        ({"depths": 0}, "--set depths=0 is refused: it must be a whole number above 0"),
    ],
)
def test_wrong_options_are_refused_in_words(extra, message):
    with pytest.raises(ValueError, match=message):
        read_options("s", SuiteSettings(extra=extra), {"chat": False, "depths": 11})


def test_rows_of_json_lines_and_of_a_json_list_are_the_same(tmp_path):
    rows = [{"a": "line\u2028separator"}, {"a": "é"}]
    lines, whole = tmp_path / "x.jsonl", tmp_path / "x.json"
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    lines.write_text(text + "\n", encoding="utf-8")
    whole.write_text(json.dumps(rows), encoding="utf-8")
    assert read_rows(lines, ["a"]) == read_rows(whole, ["a"]) == rows


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1}\n{"a": ', "line 2 of .*x.jsonl is not JSON"),
        ('[{"a": 1}', "x.jsonl is not JSON"),
        ('{"a": 1}\n{"b": 1}', "row 2 of .*x.jsonl has no field a"),
        ("[1]", "row 1 of .*x.jsonl has no field a"),
        ("\n", "x.jsonl has no rows"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(path, ["a"])


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="--suite s reads a local dataset: give --data DIR with F"):
        data_folder("s", SuiteSettings(), "F")
    with pytest.raises(ValueError, match="--data no/where does not exist; it should hold F"):
        data_folder("s", SuiteSettings(data=Path("no/where")), "F")
    with pytest.raises(ValueError, match="has no a.json or b.json; it should hold F"):
        find_file(tmp_path, ["a.json", "b.json"], "F")
    (tmp_path / "b.json").write_text("")
    assert find_file(tmp_path, ["a.json", "b.json"], "F") == tmp_path / "b.json"


def test_draw_is_seeded_nested_and_in_the_order_of_the_file():
    rows = [{"i": i} for i in range(50)]
    few, more = draw(rows, 5, 3, "t"), draw(rows, 20, 3, "t")
    assert [row["i"] for index, row in more] == sorted(index for index, _ in more)
    assert len(few) == 5 and set(dict(few)) < set(dict(more))
    assert few == draw(rows, 5, 3, "t") != draw(rows, 5, 4, "t")
    assert [index for index, _ in draw(rows, 99, 0, "t")] == list(range(50))
