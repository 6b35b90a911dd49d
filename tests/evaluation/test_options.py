"""Options of suites and the reading of local data."""

from pathlib import Path

import pytest

from vllm_heterocache.evaluation.local_data import data_folder, draw
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
    ("extra", "message"),
    [
        ({"chatt": 1}, "--set chatt=... is not an option of --suite s; did you mean chat"),
        ({"q": 1}, "--set q=... is not an option of --suite s; it has chat, depths"),
        ({"chat": "maybe"}, "--set chat=maybe is neither true nor false"),
        ({"depths": "many"}, "--set depths=many is not of type int"),
        ({"depths": 2.5}, "--set depths=2.5 is not of type int"),
        ({"depths": True}, "--set depths=True is not of type int"),
        ({"depths": ""}, "--set depths= is not of type int"),
        ({"depths": [7]}, "--set depths=.7. is not of type int"),
        ({"chat": 2}, "--set chat=2 is neither true nor false"),
        ({"depths": -3}, "--set depths=-3 is refused: it must be a whole number above 0"),
        ({"depths": 0}, "--set depths=0 is refused: it must be a whole number above 0"),
    ],
)
def test_wrong_options_are_refused_in_words(extra, message):
    with pytest.raises(ValueError, match=message):
        read_options("s", SuiteSettings(extra=extra), {"chat": False, "depths": 11})


def test_missing_data_is_named():
    with pytest.raises(ValueError, match="--suite s reads a local dataset: give --data DIR with F"):
        data_folder("s", SuiteSettings(), "F")
    with pytest.raises(ValueError, match="--data no/where does not exist; it should hold F"):
        data_folder("s", SuiteSettings(data=Path("no/where")), "F")


def test_draw_is_seeded_nested_and_in_the_order_of_the_file():
    few, more = draw(50, 5, 3, "t"), draw(50, 20, 3, "t")
    assert few == sorted(few) and more == sorted(more)
    assert len(few) == 5 and len(more) == 20 and set(few) < set(more)
    assert few == draw(50, 5, 3, "t") != draw(50, 5, 4, "t")
    assert draw(50, 99, 0, "t") == list(range(50))
