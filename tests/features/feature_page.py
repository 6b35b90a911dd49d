"""The marker `feature`, and docs/compatibility.md, which is written from what marked tests did.

`@pytest.mark.feature(NAME, ...)` says that a test shows these rows of features.py at work;
`refused=True` says that the test shows their refusal. With `--features` the session ends by writing
the page, or by comparing the page with what the tests did.

Processes of xdist collect the marks, tests included that are deselected then. The process that
started the others sees all outcomes, and builds the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from features import FEATURES

PAGE = "docs/compatibility.md"
RENEW = "pytest --collect-only -q --features=write"
FROM_WORKER = "feature_marks"

INTRODUCTION = f"""\
# Compatibility

This page says what becomes of vLLM's features with `--attention-backend heterocache`. The tests
write this page, so every change is made in a test
([how to add a row](../CONTRIBUTING.md#add-a-row-to-the-compatibility-page)).
`{RENEW}` renews the page. A run of all tests
with `--features=check` compares the page with what the tests did.

| result | meaning |
|---|---|
| works | Tests show the feature at work without a GPU. At least one passed, and none failed |
| works, on GPUs | All tests of the feature need a GPU. They are run by hand |
| refused | Start-up refuses the feature in one sentence, which names the fix |
| not tested | No test shows the feature. It may work all the same |

Tests without a GPU run engines on vLLM's CPU platform, or vLLM's own scheduler with workers that
a test plays.
"""


class Mark(NamedTuple):
    """One feature of one test."""

    feature: str
    test: str  # id of the test, with its parameters
    is_refusal: bool
    needs_gpu: bool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("features").addoption(
        "--features",
        choices=("check", "write"),
        help=f"check: the session fails where {PAGE} says otherwise than the tests. "
        "write: the page is written; what did not run is taken to pass",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.features is None:
        return
    if not _is_worker(config) and config.args_source is not config.ArgsSource.TESTPATHS:
        raise pytest.UsageError(
            f"--features={config.option.features} is about all tests: remove the paths, or the "
            "option."
        )
    config.pluginmanager.register(FeaturePage(config))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A marker that names no row is an error of its file."""
    report = yield
    items = [one for one in report.result or () if isinstance(one, pytest.Item)]
    known = {name for rows in FEATURES.values() for name in rows}
    unknown = [mark for item in items for mark in marks_of(item) if mark.feature not in known]
    if unknown:
        report.outcome, report.result = "failed", []
        report.longrepr = (
            f"{unknown[0].test}: the marker feature names {unknown[0].feature!r}, which is no row "
            "of tests/features/features.py: add the row, or correct the name."
        )
    return report


class FeaturePage:
    """Gathers marks and outcomes of a session, and writes or checks the page at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.marks: list[Mark] = []
        self.outcomes: dict[str, str] = {}  # id of a test -> "passed" or "failed"
        self.said = ""

    # Before tests are deselected
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.marks = [mark for item in items for mark in marks_of(item)]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        sent = getattr(node, "workeroutput", {}).get(FROM_WORKER)
        if sent is not None:
            self.marks = [Mark(*mark) for mark in sent]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif report.passed and report.when == "call":
            self.outcomes.setdefault(report.nodeid, "passed")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if _is_worker(self.config):
            self.config.workeroutput[FROM_WORKER] = [tuple(mark) for mark in self.marks]
        elif exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            try:
                self.said = self._conclude()
            except ValueError as error:
                self.said = str(error)
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.said:
            terminalreporter.write_line(self.said)

    def _conclude(self) -> str:
        """Write or check the page; what to tell.

        Raises:
            ValueError: a row has tests that contradict each other, or the page is stale.
        """
        path = self.config.rootpath / PAGE
        is_writing = self.config.option.features == "write"
        page = page_of(self.marks, self.outcomes, takes_marks=is_writing)
        if is_writing:
            path.write_text(page)
            return f"{PAGE} is written."
        if not path.exists():
            raise ValueError(f"{PAGE} is missing: write the page with {RENEW}.")
        stale = _differing_rows(path.read_text(), page)
        if stale is not None:
            fix = "mend the tests that failed, or " * ("failed" in self.outcomes.values())
            raise ValueError(
                f"{PAGE} says otherwise than the tests about {stale or 'its text'}: {fix}renew the "
                f"page with {RENEW}."
            )
        return ""


def marks_of(item: pytest.Item) -> list[Mark]:
    """The features of a test."""
    needs_gpu = item.get_closest_marker("gpu") is not None
    return [
        Mark(name, item.nodeid, bool(marker.kwargs.get("refused")), needs_gpu)
        for marker in item.iter_markers("feature")
        for name in marker.args
    ]


def page_of(marks: Sequence[Mark], outcomes: Mapping[str, str], takes_marks: bool) -> str:
    """Text of the page.

    Args:
        outcomes: id of a test -> "passed" or "failed"; tests that did not run are missing.
        takes_marks: a test that did not run counts as passed.

    Raises:
        ValueError: a row has tests that show the feature at work, and others that show its refusal.
    """
    parts = [INTRODUCTION]
    for group, rows in FEATURES.items():
        parts += [f"\n## {group}\n\n", "| feature | vLLM's option | result | shown by |\n"]
        parts.append("|---|---|---|---|\n")
        for name, option in rows.items():
            of_row = [mark for mark in marks if mark.feature == name]
            result = _result(of_row, outcomes, takes_marks)
            parts.append(f"| {name} | {option} | {result} | {_tests(of_row)} |\n")
    return "".join(parts)


def _result(marks: Sequence[Mark], outcomes: Mapping[str, str], takes_marks: bool) -> str:
    if not marks:
        return "not tested"
    if len({mark.is_refusal for mark in marks}) > 1:
        raise ValueError(
            f"{marks[0].feature!r} has tests with refused=True and tests without: give each kind a "
            "row of its own in tests/features/features.py."
        )
    ended = {outcomes.get(mark.test) for mark in marks}
    is_by_hand = all(mark.needs_gpu for mark in marks)
    if "failed" in ended:
        return "fails"
    if not (is_by_hand or takes_marks or "passed" in ended):
        return "not run"
    word = "refused" if marks[0].is_refusal else "works"
    return f"{word}, on GPUs" if is_by_hand else word


def _tests(marks: Sequence[Mark]) -> str:
    """The functions of the marked tests, those for GPUs last."""
    functions = {(mark.needs_gpu, mark.test.split("[")[0]) for mark in marks}
    return "<br>".join(f"`{test}`" + " on GPUs" * on_gpu for on_gpu, test in sorted(functions))


def _differing_rows(old: str, new: str) -> str | None:
    """Names of the rows in which two pages differ, "" for other lines; None if they are equal."""
    if old == new:
        return None
    lines = set(old.splitlines()) ^ set(new.splitlines())
    rows = [line for line in lines if line.startswith("| ")]
    return ", ".join(sorted({row.split("|")[1].strip() for row in rows}))


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")
