"""One report over all parts: their tables, plots and rows, and what is not in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_heterocache.evaluation.report.report import (
    COST_NOTE,
    ScoreCell,
    cost_table,
    overview,
)
from vllm_heterocache.evaluation.run_folder import Configuration, configuration
from vllm_heterocache.evaluation.suites.quick import FIDELITY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm_heterocache.evaluation.command import Evaluated

SIGNIFICANT = 0.05
LABELS = ("invoice", "station")  # wordings that tell facts apart by labels
METHOD = (
    "Stock vLLM with full attention answered the same prompts. Prompts are made of Python's own "
    "documentation and library (LongBench's are its own), so another version of Python has others. "
    "p is of the paired test against stock."
)


def write(
    out: Path,
    model: str,
    profile: Path | None,
    about: dict[str, str],
    done: dict[str, Evaluated],
    missing: Sequence[str],
) -> None:
    """report.md and results.jsonl of the folder, written anew.

    Args:
        profile: the head profile that was given; None: the model was calibrated.
        about: part -> what it asks.
        done: part -> what it left, of those that were evaluated.
        missing: what was left out and what failed, in words.
    """
    lines = [f"# {Path(model).name} against stock vLLM", ""]
    told = next((cell.engine for one in done.values() for cell in one.cells), {})
    lines += [*_provenance(told, profile), "", METHOD, ""]
    if missing:
        lines += ["## Not in this report", "", *(f"- {one}" for one in missing), ""]
    rows = ""
    for name, one in done.items():
        cells = [replace(cell, configuration=_short(cell.configuration)) for cell in one.cells]
        lines += [f"## {name}", "", f"{about[name]} [All tables]({name}/report.md).", ""]
        lines += [*_scores(cells), "", *_behind(cells), ""]
        lines += [*cost_table(cells), ""]
        for plot in one.plots:
            lines += [f"![{plot.stem.replace('_', ' ')}]({name}/{plot.name})", ""]
        rows += (one.folder.path / "results.jsonl").read_text()
    lines += ["## How to read the tables", "", COST_NOTE, ""]
    (out / "results.jsonl").write_text(rows)
    (out / "report.md").write_text("\n".join(lines))


def _provenance(engine: dict[str, Any], profile: Path | None) -> list[str]:
    """A list of where and with what the answers were made."""
    of_heads = "calibrated, or from the cache" if profile is None else profile.name
    versions = ", ".join(f"{name} {one}" for name, one in engine.get("versions", {}).items())
    names = ("device", "date", "commit")
    lines = [f"- {name}: {engine[name]}" for name in names if name in engine]
    return [*lines, f"- versions: {versions}", f"- head profile: {of_heads}"]


def _short(one: Configuration) -> Configuration:
    """The configuration under a name without the profile, which is the same for all."""
    if one.options is None:
        return one
    options = {key: value for key, value in one.options.items() if key != "profile"}
    return Configuration(configuration(options).name, one.options)


def _scores(cells: Sequence[ScoreCell]) -> list[str]:
    if any(cell.task == FIDELITY for cell in cells):
        return prose_and_facts(cells)
    return overview(cells, list(dict.fromkeys((cell.task, cell.length) for cell in cells)))


def prose_and_facts(cells: Sequence[ScoreCell]) -> list[str]:
    """A row a configuration: KL of prose and right answers by length, then answers of stock's."""
    names = list(dict.fromkeys(cell.configuration.name for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    heads = ["configuration", *(f"{length:,} tokens: KL; right" for length in lengths)]
    heads += ["all wordings, of stock's", "labels alone"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in names:
        mine = [cell for cell in cells if cell.configuration.name == name]
        texts = [name, *(_of_length([c for c in mine if c.length == n]) for n in lengths)]
        asked = [cell for cell in mine if cell.task != FIDELITY]
        labels = [cell for cell in asked if cell.task.endswith(LABELS)]
        texts += [_of_stock(asked), _of_stock(labels)]
        lines.append("| " + " | ".join(texts) + " |")
    return lines


def _of_length(cells: Sequence[ScoreCell]) -> str:
    """KL; right answers of how many. An engine that failed lacks some."""
    kl = [f"{cell.metrics['kl']:.4f}" for cell in cells if cell.task == FIDELITY]
    asked = [cell for cell in cells if cell.task != FIDELITY]
    right = f"{_right(asked)} of {sum(cell.units for cell in asked)}" if asked else "-"
    return "; ".join([*(kl or ["-"]), right])


def _right(cells: Iterable[ScoreCell]) -> int:
    return sum(round(cell.score * cell.units) for cell in cells)


def _of_stock(cells: Sequence[ScoreCell]) -> str:
    """Right answers over stock's to the same questions; of stock itself, how many."""
    if all(cell.against_stock is None for cell in cells):
        return str(_right(cells))
    of_stock = sum(round(cell.stock_score * cell.units) for cell in cells)
    return f"{_right(cells) / of_stock:.1%}" if of_stock else "-"


def _behind(cells: Sequence[ScoreCell]) -> list[str]:
    """The cells that the paired test finds behind stock. Prose is compared with itself by KL."""
    compared = [c for c in cells if c.against_stock is not None and c.task != FIDELITY]
    found = []
    for cell in compared:
        test = cell.against_stock
        if test is not None and test.losses > test.wins and test.p < SIGNIFICANT:
            found.append(
                f"- {cell.configuration.name}, {cell.task or 'all'}, {cell.length:,} tokens: "
                f"{cell.score:.3f} for {cell.stock_score:.3f} (p {test.p:.2g})"
            )
    return [f"Behind stock (p under {SIGNIFICANT}): {len(found)} of {len(compared)} cells.", *found]
