"""The page of features is what marked tests did, and a stale page fails the session."""

from __future__ import annotations

from pathlib import Path

import feature_page
import pytest
from feature_page import Mark, page_of

pytest_plugins = ["pytester"]

ROWS = {"Apples": "`--apples`", "Pears": "`--pears`", "Quinces": "`--quinces`"}
INI = f"""\
[pytest]
testpaths = tests
pythonpath = {Path(__file__).parent}
addopts = --strict-markers --import-mode=importlib -p no:cacheprovider
markers =
    gpu
    feature
"""
CONFTEST = f"""\
import features

features.FEATURES.clear()
features.FEATURES["Fruit"] = {ROWS!r}
pytest_plugins = ["feature_page"]
"""
TESTS = """\
import pytest

@pytest.mark.feature("Apples")
@pytest.mark.parametrize("size", [1, 2])
def test_apples(size):
    pass

@pytest.mark.gpu
@pytest.mark.feature("Pears")
def test_pears():
    raise RuntimeError("no GPU here")
"""
PAGE_OF_TESTS = [
    "| Apples | `--apples` | works | `tests/test_fruit.py::test_apples` |",
    "| Pears | `--pears` | works, on GPUs | `tests/test_fruit.py::test_pears` on GPUs |",
    "| Quinces | `--quinces` | not tested |  |",
]
NOT_GPU = ("-m", "not gpu")


def rows(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(tuple(f"| {n} |" for n in ROWS))]


# --- what a row says ---


@pytest.fixture
def _fruit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_page, "FEATURES", {"Fruit": ROWS})


def apples(test: str, is_refusal: bool = False, needs_gpu: bool = False) -> Mark:
    return Mark("Apples", f"tests/a.py::{test}", is_refusal, needs_gpu)


def result(marks: list[Mark], takes_marks: bool = False, **outcomes: str) -> str:
    """The result of the row of apples, where tests ended so."""
    ended = {f"tests/a.py::{name}": outcome for name, outcome in outcomes.items()}
    return rows(page_of(marks, ended, takes_marks))[0].split("|")[3].strip()


@pytest.mark.usefixtures("_fruit")
def test_a_feature_without_tests_is_not_tested():
    assert result([]) == "not tested"


@pytest.mark.usefixtures("_fruit")
def test_a_feature_works_where_a_test_passed_and_none_failed():
    marks = [apples("one"), apples("two")]
    assert result(marks, one="passed") == "works"
    assert result(marks, one="passed", two="failed") == "fails"
    assert result(marks) == "not run"


@pytest.mark.usefixtures("_fruit")
def test_a_feature_is_refused_where_its_refusal_was_seen():
    marks = [apples("one", is_refusal=True)]
    assert result(marks, one="passed") == "refused"
    assert result(marks, one="failed") == "fails"
    assert result(marks) == "not run"


@pytest.mark.usefixtures("_fruit")
def test_tests_for_gpus_alone_count_without_a_run_unless_they_failed():
    marks = [apples("one", needs_gpu=True)]
    assert result(marks) == "works, on GPUs"
    assert result(marks, one="failed") == "fails"
    assert result([*marks, apples("two")]) == "not run"


@pytest.mark.usefixtures("_fruit")
def test_marks_are_taken_for_passes_where_the_page_is_written_without_a_run():
    marks = [apples("one"), apples("two")]
    assert result(marks, takes_marks=True) == "works"
    assert result(marks, takes_marks=True, two="failed") == "fails"


@pytest.mark.usefixtures("_fruit")
def test_a_feature_that_is_served_and_refused_needs_two_rows():
    marks = [apples("one"), apples("two", is_refusal=True)]
    with pytest.raises(ValueError, match="'Apples' has tests with refused=True and tests without"):
        page_of(marks, {}, takes_marks=True)


@pytest.mark.usefixtures("_fruit")
def test_functions_are_listed_once_and_those_for_gpus_last():
    marks = [apples("a", needs_gpu=True), apples("c[1]"), apples("c[2]"), apples("b")]
    shown = rows(page_of(marks, {}, takes_marks=True))[0].split("|")[4].strip()
    assert shown == "`tests/a.py::b`<br>`tests/a.py::c`<br>`tests/a.py::a` on GPUs"


# --- sessions ---


@pytest.fixture
def session(pytester: pytest.Pytester):
    """`session(*options)` runs pytest, in a process of its own, in a project with a few tests."""
    pytester.path.joinpath("pytest.ini").write_text(INI)
    for folder in ("docs", "tests"):
        pytester.mkdir(folder)
    tests = pytester.path / "tests"
    (tests / "conftest.py").write_text(CONFTEST)
    (tests / "test_fruit.py").write_text(TESTS)
    return pytester.runpytest_subprocess


@pytest.fixture
def page(pytester: pytest.Pytester) -> Path:
    return pytester.path / "docs" / "compatibility.md"


def mark_quinces(pytester: pytest.Pytester, marker: str = '"Quinces"') -> None:
    test = f"import pytest\n\n@pytest.mark.feature({marker})\ndef test_quinces():\n    pass\n"
    (pytester.path / "tests" / "test_quinces.py").write_text(test)


@pytest.mark.parametrize("processes", [(), ("-n", "2", "--dist", "loadfile")], ids=len)
def test_the_page_is_written_once_and_agrees_with_a_run(session, page, processes):
    """Tests that are deselected, as those for GPUs are, have their rows all the same."""
    written = session("--collect-only", "-q", "--features=write")
    written.stdout.fnmatch_lines(["docs/compatibility.md is written."])
    assert rows(page.read_text()) == PAGE_OF_TESTS
    done = session("--features=check", *NOT_GPU, *processes)
    assert done.ret == 0, done.stdout.str()
    assert "compatibility.md" not in done.stdout.str()


def test_a_run_writes_what_it_saw(session, page):
    assert session("--features=write").ret == 1  # the test for GPUs fails without one
    assert [row.split("|")[3].strip() for row in rows(page.read_text())] == [
        "works",
        "fails",
        "not tested",
    ]


@pytest.mark.parametrize("processes", [(), ("-n", "2", "--dist", "loadfile")], ids=len)
def test_a_stale_page_fails_the_session_and_says_which_rows(session, page, pytester, processes):
    session("--collect-only", "--features=write")
    before = page.read_text()
    mark_quinces(pytester)
    done = session("--features=check", *NOT_GPU, *processes)
    assert done.ret == 1
    done.stdout.fnmatch_lines(
        [
            "docs/compatibility.md says otherwise than the tests about Quinces: renew the page "
            "with pytest --collect-only -q --features=write."
        ]
    )
    done.assert_outcomes(passed=3, deselected=0 if processes else 1)
    assert page.read_text() == before


def test_a_test_that_did_not_run_shows_nothing(session, pytester):
    session("--collect-only", "--features=write")
    (pytester.path / "tests" / "test_more.py").write_text("def test_more():\n    pass\n")
    done = session("--features=check", "-k", "more")
    assert done.ret == 1
    done.stdout.fnmatch_lines(["docs/compatibility.md says otherwise * about Apples: renew *"])


def test_a_failure_comes_before_a_new_page(session, page, pytester):
    session("--collect-only", "--features=write")
    (pytester.path / "tests" / "test_fruit.py").write_text(TESTS.replace("pass", "assert not size"))
    done = session("--features=check", *NOT_GPU)
    assert done.ret == 1
    done.stdout.fnmatch_lines(["*about Apples: mend the tests that failed, or renew the page*"])


def test_a_missing_page_fails_the_session(session):
    done = session("--features=check", *NOT_GPU)
    assert done.ret == 1
    done.stdout.fnmatch_lines(["docs/compatibility.md is missing: write the page with pytest *"])


def test_without_the_option_nothing_is_read_or_written(session, page, pytester):
    mark_quinces(pytester)
    done = session(*NOT_GPU)
    assert done.ret == 0 and not page.exists()
    assert "compatibility.md" not in done.stdout.str()


@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=len)
def test_a_marker_without_a_row_is_an_error_of_its_file(session, pytester, processes):
    mark_quinces(pytester, '"Apples", "Quince"')
    done = session(*NOT_GPU, *processes)
    assert done.ret != 0
    done.stdout.fnmatch_lines(
        [
            "tests/test_quinces.py::test_quinces: the marker feature names 'Quince', which is no "
            "row of tests/features/features.py: add the row, or correct the name."
        ]
    )


def test_a_contradiction_fails_the_session_that_writes(session, page, pytester):
    mark_quinces(pytester, '"Apples", refused=True')
    done = session("--collect-only", "--features=write")
    assert done.ret == 1 and not page.exists()
    done.stdout.fnmatch_lines(["'Apples' has tests with refused=True and tests without: *"])


def test_a_part_of_the_tests_is_no_base_for_the_page(session):
    done = session("--features=check", "tests/test_fruit.py")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*--features=check is about all tests: remove the paths, or the *"])
