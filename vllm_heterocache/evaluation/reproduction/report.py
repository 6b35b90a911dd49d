"""One report over all parts: their tables, plots and rows, and what is not in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_heterocache.evaluation.report.comparison import (
    COMPARISON_NOTE,
    SIGNIFICANT,
    comparison_table,
    is_behind,
)
from vllm_heterocache.evaluation.report.joined_runs import plain_options
from vllm_heterocache.evaluation.report.report import (
    COST_NOTE,
    ScoreCell,
    cost_table,
    overview,
)
from vllm_heterocache.evaluation.run_folder import Configuration, configuration
from vllm_heterocache.evaluation.suites.quick import FIDELITY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_heterocache.evaluation.command import Evaluated

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
    lines += ["## How to read the tables", "", COMPARISON_NOTE, "", COST_NOTE, ""]
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
    return one if one.options is None else configuration(plain_options(one.options))


def _scores(cells: Sequence[ScoreCell]) -> list[str]:
    if any(cell.task == FIDELITY for cell in cells):
        return comparison_table(cells)
    return overview(cells, list(dict.fromkeys((cell.task, cell.length) for cell in cells)))


def _behind(cells: Sequence[ScoreCell]) -> list[str]:
    """The cells that the paired test finds behind stock. Prose is compared with itself by KL."""
    compared = [c for c in cells if c.against_stock is not None and c.task != FIDELITY]
    found = []
    for cell in filter(is_behind, compared):
        test = cell.against_stock
        assert test is not None  # else it is not behind
        found.append(
            f"- {cell.configuration.name}, {cell.task or 'all'}, {cell.length:,} tokens: "
            f"{cell.score:.3f} for {cell.stock_score:.3f} (p {test.p:.2g})"
        )
    return [f"Behind stock (p under {SIGNIFICANT}): {len(found)} of {len(compared)} cells.", *found]
