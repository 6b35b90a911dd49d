"""One table of all configurations of a suite with prose and questions, budget by budget."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.report.report import ALL_TASKS, ScoreCell
from vllm_heterocache.evaluation.report.statistics import Comparison, mcnemar, wilson
from vllm_heterocache.evaluation.run_folder import STOCK, variant
from vllm_heterocache.evaluation.suites.quick import FIDELITY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SIGNIFICANT = 0.05
LABELS = ("invoice", "station")  # wordings that tell facts apart by labels
QUESTIONS = "questions"  # the task of a cell over all wordings
COMPARISON_NOTE = (
    "KL of prose in nats a token; right answers, with * where they are behind stock by the paired "
    f"test over all wordings (p under {SIGNIFICANT}). Of stock's: answers over all lengths. On "
    "the GPU, in host memory, read, fetched: percent of what the same tokens, prompt and output, "
    "take under full attention, by prompt length, the plugin's tables counted. Prompts that are "
    "too short for the budget stay dense and do not count. Requests: how many fit where one fits "
    "in stock vLLM, of the longest prompts. ms a step: the middle decode step of all requests at "
    "once; engines beside one another slow each other down, so only runs of one engine at a time "
    "compare times."
)


def over_wordings(cells: Iterable[ScoreCell]) -> list[ScoreCell]:
    """A cell for each configuration and length over the questions of all wordings."""
    groups: dict[tuple[str, int], list[ScoreCell]] = {}
    for cell in cells:
        if cell.task not in (FIDELITY, ALL_TASKS):
            groups.setdefault((cell.configuration.name, cell.length), []).append(cell)
    return [_pooled(group) for group in groups.values()]


def _pooled(group: Sequence[ScoreCell]) -> ScoreCell:
    units = sum(cell.units for cell in group)
    low, high = wilson(right_answers(group), units)
    tests = [cell.against_stock for cell in group if cell.against_stock is not None]
    wins, losses = sum(test.wins for test in tests), sum(test.losses for test in tests)
    return replace(
        group[0],
        task=QUESTIONS,
        samples=sum(cell.samples for cell in group),
        units=units,
        score=right_answers(group) / units,
        low=low,
        high=high,
        metrics={},
        against_stock=Comparison(wins, losses, units, mcnemar(wins, losses), "mcnemar")
        if tests
        else None,
        stock_score=sum(round(cell.stock_score * cell.units) for cell in group) / units,
    )


def right_answers(cells: Iterable[ScoreCell]) -> int:
    return sum(round(cell.score * cell.units) for cell in cells)


def of_stock(cells: Sequence[ScoreCell]) -> str:
    """Right answers over stock's to the same questions; of stock itself, how many."""
    if all(cell.against_stock is None for cell in cells):
        return str(right_answers(cells))
    others = sum(round(cell.stock_score * cell.units) for cell in cells)
    return f"{right_answers(cells) / others:.1%}" if others else "-"


def comparison_table(cells: Sequence[ScoreCell]) -> list[str]:
    """A row a configuration, budgets from the largest to the smallest, in each the default first.

    Args:
        cells: of suite `quick`; a configuration may lack some.
    """
    lengths = sorted({cell.length for cell in cells})
    heads = ["budget", "configuration", *(f"{length:,} tokens: KL; right" for length in lengths)]
    heads += ["of stock's", "labels alone", "on the GPU, %", "in host memory, %", "read, %"]
    heads += ["fetched, %", "requests", "ms a step"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    groups: dict[str, list[ScoreCell]] = {}
    for cell in cells:
        groups.setdefault(cell.configuration.name, []).append(cell)
    for group in sorted(groups.values(), key=_place):
        lines.append("| " + " | ".join(_row(group, lengths)) + " |")
    return lines


def _place(group: Sequence[ScoreCell]) -> tuple[float, int]:
    """Stock, then by budget, and the options that were changed by their number."""
    options = group[0].configuration.options
    if options is None:
        return -2.0, 0
    return -options["gpu_budget"], min(len(options) - 1, 1)


def _row(group: Sequence[ScoreCell], lengths: Sequence[int]) -> list[str]:
    options = group[0].configuration.options
    texts = ["", STOCK]
    if options is not None:
        texts = [f"{100 * options['gpu_budget']:g} %", variant(options)]
    by_length = {length: [c for c in group if c.length == length] for length in lengths}
    texts += [_answers(by_length[length]) for length in lengths]
    asked = [c for c in group if c.task not in (FIDELITY, ALL_TASKS) and not stayed_dense(c)]
    texts += [of_stock(asked), of_stock([c for c in asked if c.task.endswith(LABELS)])]
    some = [by_length[length][0] if by_length[length] else None for length in lengths]
    texts += [_joined(shares) for shares in zip(*map(_percents, some), strict=True)]
    resident = [cell.resident_share for cell in some if cell is not None][-1]
    texts.append(f"{1 / resident:.1f}" if resident else "-")
    times = [None if cell is None else cell.steps.get("median_ms") for cell in some]
    return [*texts, _joined(times)]


def _answers(cells: Sequence[ScoreCell]) -> str:
    """Of one length: KL; right answers. A run that was killed lacks some."""
    if any(map(stayed_dense, cells)):
        return "dense"
    kl = [f"{cell.metrics['kl']:.4f}" for cell in cells if cell.task == FIDELITY]
    if cells and cells[0].against_stock is None:
        kl = [""]
    asked = over_wordings(cells)
    right = [f"{right_answers([c])} of {c.units}{'*' * is_behind(c)}" for c in asked]
    return "; ".join([*(kl or ["-"]), *(right or ["-"])])


def stayed_dense(cell: ScoreCell) -> bool:
    """Whether the prompts stayed as they were, for being too short."""
    return cell.against_stock is not None and cell.read_share == 1.0


def is_behind(cell: ScoreCell) -> bool:
    """Whether the paired test finds the cell behind stock."""
    test = cell.against_stock
    return test is not None and test.losses > test.wins and test.p < SIGNIFICANT


def _percents(cell: ScoreCell | None) -> list[float | None]:
    """On the GPU, in host memory, read and fetched, of what full attention has."""
    if cell is None:
        return [None] * 4
    shares = [cell.resident_share, cell.resident.get("host")]
    shares += [cell.read_share, cell.reads.get("fetched")]
    return [None if share is None else 100 * share for share in shares]


def _joined(values: Sequence[float | None]) -> str:
    """By length; one text for all where they are the same."""
    found = ["-" if value is None else f"{value:.1f}" for value in values]
    return found[0] if len(set(found)) == 1 else " / ".join(found)
