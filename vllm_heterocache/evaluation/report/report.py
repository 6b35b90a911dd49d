"""From the rows of a run folder to cells, result rows and Markdown tables.

A cell is one configuration at one task and length. Its units are samples, or the questions inside
them where the suite scores each (`right`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_heterocache.evaluation.provenance import rounded
from vllm_heterocache.evaluation.report.statistics import Comparison, compare, interval
from vllm_heterocache.evaluation.run_folder import Configuration, RunFolder, stock

if TYPE_CHECKING:
    from collections.abc import Sequence

Key = tuple[str, int]  # task, length
Rows = list[dict[str, Any]]
ALL_TASKS = "all tasks"  # the task of a cell over all of them
COST_NOTE = (
    "All are shares of what the same tokens, prompt and output, take under full attention. "
    "KV resident: blocks in use of vLLM's pool, at moments when every request in the engine "
    "decodes; with tables: and the plugin's tables for them. KV read: pages that decode steps "
    "read, choosing pages included; fetched: pages that they had copied from host memory. Host "
    "memory is not in the table."
)


@dataclass(frozen=True)
class ScoreCell:
    configuration: Configuration
    task: str
    length: int
    samples: int
    units: int  # questions, or samples
    score: float
    low: float
    high: float
    metrics: dict[str, float]  # means over samples, without "score"
    against_stock: Comparison | None  # None: this is stock
    stock_score: float  # over the same samples
    engine: dict[str, Any]  # what the worker noted of the engine

    @property
    def resident(self) -> dict[str, Any]:
        """Residency.summary() of this length; {} where nothing was noted."""
        return self.engine.get("resident", {}).get(str(self.length), {})

    @property
    def reads(self) -> dict[str, Any]:
        """Reads.summary() of this length; {} where nothing was noted."""
        return self.engine.get("reads", {}).get(str(self.length), {})

    @property
    def steps(self) -> dict[str, Any]:
        """Steps.summary() of this length; {} where nothing was noted."""
        return self.engine.get("steps", {}).get(str(self.length), {})

    @property
    def resident_share(self) -> float | None:
        """GPU-resident KV with the plugin's tables, measured; stock's is 1 where it was not."""
        share = self.resident.get("with_tables", self.resident.get("share"))
        return 1.0 if share is None and self.against_stock is None else share

    @property
    def read_share(self) -> float | None:
        """KV that a decode step reads, over what full attention would read; stock's is 1."""
        return 1.0 if self.against_stock is None else self.reads.get("share")


def cells_of(folder: RunFolder, configurations: Sequence[Configuration]) -> list[ScoreCell]:
    """Cells of stock and of the configurations, by task and length, stock first.

    Only samples that stock has answered too are compared. Where tasks have the same metrics, cells
    over all of them come before.

    Raises:
        ValueError: a sample's prompt differs between configurations.
    """
    of_stock = folder.rows(stock())
    everyone = [stock(), *configurations]
    # task, length -> configuration's place -> its rows
    groups: dict[Key, dict[int, Rows]] = {}
    for place, configuration in enumerate(everyone):
        for row in folder.rows(configuration).values():
            if row["id"] not in of_stock:
                continue
            if row["prompt"] != of_stock[row["id"]]["prompt"]:
                raise ValueError(
                    f"sample {row['id']} has one prompt for stock and another for "
                    f"{configuration.name} in {folder.path}; evaluate again in a new --out"
                )
            of_key = groups.setdefault((row["task"], row["length"]), {})
            of_key.setdefault(place, []).append(row)
    cells = []
    groups |= _over_tasks(groups)
    in_order = sorted(groups.items(), key=lambda item: (item[0][0] != ALL_TASKS, item[0]))
    for (task, _), group in in_order:
        # What one configuration can score, all can: full attention agrees with itself everywhere.
        binary = all(value in (0, 1) for rows in group.values() for r in rows for value in units(r))
        for place, rows in group.items():
            engine = folder.engine(everyone[place]) or {}
            cells.append(_cell(everyone[place], task, rows, of_stock, engine, binary))
    return cells


def _over_tasks(groups: dict[Key, dict[int, Rows]]) -> dict[Key, dict[int, Rows]]:
    """The rows of all tasks of a length together, where there are several with the same metrics."""
    found: dict[Key, dict[int, Rows]] = {}
    for length in {length for _, length in groups}:
        tasks = [group for key, group in groups.items() if key[1] == length]
        metrics = {frozenset(rows[0]["scores"]) for task in tasks for rows in task.values()}
        if len(tasks) > 1 and len(metrics) == 1:
            whole = found.setdefault((ALL_TASKS, length), {})
            for place, rows in (item for task in tasks for item in task.items()):
                whole.setdefault(place, []).extend(rows)
    return found


def _cell(
    configuration: Configuration,
    task: str,
    rows: Rows,
    of_stock: dict[str, dict[str, Any]],
    engine: dict[str, Any],
    binary: bool,
) -> ScoreCell:
    values = [value for row in rows for value in units(row)]
    others = [value for row in rows for value in units(of_stock[row["id"]])]
    names = [name for name in rows[0]["scores"] if name != "score"]
    low, high = interval(values, binary)
    return ScoreCell(
        configuration,
        task,
        rows[0]["length"],
        len(rows),
        len(values),
        sum(values) / len(values),
        low,
        high,
        {name: sum(row["scores"][name] for row in rows) / len(rows) for name in names},
        None if configuration.options is None else compare(values, others, binary),
        sum(others) / len(others),
        engine,
    )


def units(row: dict[str, Any]) -> list[float]:
    """What intervals and tests count: the sample's questions, or its score."""
    return [float(right) for right in row.get("right") or [row["scores"]["score"]]]


def result_row(cell: ScoreCell, run: dict[str, Any]) -> dict[str, Any]:
    """One line of docs/results: everything that is needed to repeat and to judge the number.

    Args:
        run: run.json of the folder.
    """
    engine, test = cell.engine, cell.against_stock
    row: dict[str, Any] = {"benchmark": f"eval_{run['suite']}"}
    row |= {name: engine.get(name) for name in ("date", "commit", "device", "versions")}
    row |= {
        "model": Path(run["model"]).name,
        "config": _shown(cell.configuration),
        "task": cell.task,
        "length": cell.length,
        "samples": cell.samples,
        "units": cell.units,
        "seed": run["settings"]["seed"],
        "extra": run["settings"]["extra"],
        "llm": run["llm"],
        "score": cell.score,
        "low": cell.low,
        "high": cell.high,
        "metrics": cell.metrics,
        "stock_score": cell.stock_score,
    }
    if test is not None:
        row |= {"wins": test.wins, "losses": test.losses, "p": test.p, "test": test.test}
    # Of all tasks of this length together, and the counters of the engine's whole run.
    row |= {"resident": cell.resident, "reads": cell.reads, "steps": cell.steps}
    row |= {"seconds": engine["seconds"].get(str(cell.length))}
    noted = {name: engine[name] for name in ("block_bytes", "counters") if name in engine}
    return rounded(row | noted)


def _shown(configuration: Configuration) -> dict[str, Any] | str:
    """The options, without the folder that the profile lies in here."""
    if configuration.options is None:
        return configuration.name
    options = dict(configuration.options)
    if "profile" in options:
        options["profile"] = Path(options["profile"]).name
    return options


def markdown(cells: Sequence[ScoreCell], run: dict[str, Any], failures: dict[str, str]) -> str:
    """The report: an overview of several tasks, then a table per task and length."""
    tasks = list(dict.fromkeys((cell.task, cell.length) for cell in cells))
    parts = [f"# {run['suite']}: {Path(run['model']).name}", ""]
    if len({cell.task for cell in cells}) > 1:
        parts += ["## Scores", "", *overview(cells, tasks), ""]
    for task, length in tasks:
        mine = [cell for cell in cells if (cell.task, cell.length) == (task, length)]
        title = ", ".join(filter(None, (task, f"{length:,} tokens")))
        parts += [f"## {title}", "", *_table(mine), ""]
    parts += ["## GPU memory and reading", "", *cost_table(cells), "", COST_NOTE, ""]
    if failures:
        parts += ["## Failed", "", *(f"- {name}: {why}" for name, why in failures.items()), ""]
    parts += [
        "Intervals are 95 %: Wilson's where all units are 0 or 1, else the bootstrap's. Units are "
        "questions where a sample asks several; those of one sample share its text. p is of the "
        "paired test against stock on the same units: exact McNemar, or paired bootstrap.",
        "",
    ]
    return "\n".join(parts)


def overview(cells: Sequence[ScoreCell], keys: Sequence[Key]) -> list[str]:
    """Scores: a row per task and length, a column per configuration."""
    names = list(dict.fromkeys(cell.configuration.name for cell in cells))
    scores = {
        (cell.task, cell.length, cell.configuration.name): f"{cell.score:.3f}" for cell in cells
    }
    # an incomplete run's configurations have fewer samples than stock; their tables say so
    samples = {
        (cell.task, cell.length): str(cell.samples) for cell in cells if not cell.against_stock
    }
    heads = ["task", "prompt tokens", "samples", *names]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for task, length in keys:
        texts = [task, f"{length:,}", samples[task, length]]
        texts += [scores.get((task, length, name), "-") for name in names]
        lines.append("| " + " | ".join(texts) + " |")
    return lines


def _table(cells: Sequence[ScoreCell]) -> list[str]:
    metrics = list(cells[0].metrics)
    heads = ["configuration", "samples", "units", "score", "95 %", "v stock +/-", "p", *metrics]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for cell in cells:
        test = cell.against_stock
        texts = [
            cell.configuration.name,
            str(cell.samples),
            str(cell.units),
            f"{cell.score:.3f}",
            f"{cell.low:.3f}-{cell.high:.3f}",
            "" if test is None else f"{test.wins}/{test.losses}",
            "" if test is None else f"{test.p:.2g}",
            *(f"{cell.metrics[name]:.4g}" for name in metrics),
        ]
        lines.append("| " + " | ".join(texts) + " |")
    return lines


def cost_table(cells: Sequence[ScoreCell]) -> list[str]:
    """What each engine held and read, by prompt length, over all tasks of that length."""
    heads = ["configuration", "prompt tokens", "samples", "KV read", "fetched", "moments"]
    heads += ["KV resident", "with tables", "highest"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    groups: dict[tuple[int, str], list[ScoreCell]] = {}
    for cell in cells:
        if cell.task != ALL_TASKS:
            groups.setdefault((cell.length, cell.configuration.name), []).append(cell)
    for (length, name), group in sorted(groups.items(), key=lambda item: item[0][0]):
        cell = group[0]
        resident, samples = cell.resident, sum(one.samples for one in group)
        texts = [name, f"{length:,}", str(samples)]
        texts += [_share(cell.read_share), _share(cell.reads.get("fetched"))]
        texts += [str(resident.get("moments", 0)), _share(resident.get("share"))]
        texts += [_share(cell.resident_share), _share(resident.get("highest_share"))]
        lines.append("| " + " | ".join(texts) + " |")
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write(
    folder: RunFolder, configurations: Sequence[Configuration], failures: dict[str, str]
) -> list[ScoreCell]:
    """results.jsonl and report.md of the folder, written anew."""
    run = json.loads((folder.path / "run.json").read_text())
    cells = cells_of(folder, configurations)
    lines = [json.dumps(result_row(cell, run)) + "\n" for cell in cells]
    (folder.path / "results.jsonl").write_text("".join(lines))
    (folder.path / "report.md").write_text(markdown(cells, run, failures))
    return cells
