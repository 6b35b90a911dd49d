"""Rows of several runs that asked the same prompts: of run folders, and of files of rows."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.evaluation.report.report import ScoreCell, cells_of, result_row
from vllm_heterocache.evaluation.report.statistics import Comparison
from vllm_heterocache.evaluation.run_folder import STOCK, RunFolder, configuration, stock

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

# What decides the prompts, and stock's answers to them, beside task and length.
ALIKE = ("benchmark", "model", "seed", "extra")
# What every row has, and its type; what rows of all but stock have beside it.
NUMBER = (int, float)
NEEDED: dict[str, Any] = {
    **dict.fromkeys(ALIKE, object),
    **dict.fromkeys(("length", "samples", "units"), int),
    **dict.fromkeys(("score", "low", "high", "stock_score"), NUMBER),
    **dict.fromkeys(("metrics", "versions", "llm"), dict),
    **{"config": (str, dict), "task": str},
}
NEEDED_OF_OURS = {"config": dict, "wins": int, "losses": int, "p": NUMBER, "test": str}
# What a row has of its engine, as the engine's notes have it, and for the row's length alone.
OF_THE_ENGINE = {"date", "commit", "device", "versions", "block_bytes", "counters"}
BY_LENGTH = {"resident", "reads", "steps", "seconds"}
OPTIONS = {field.name for field in fields(HeteroCacheConfig)}
# Options that say where something lies or how much room it has, not what is computed.
OF_THE_PLACE = ("profile", "cpu_pool_gib")


def joined_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Result rows of all runs, stock's first, then by place in `paths`.

    Configurations that differ in nothing that changes answers are the same. Where two runs have a
    row of the same, the one with more units counts, of as many the later.

    Args:
        paths: folders of `heterocache eval`, also of runs that were killed, and files of result
            rows, a JSON object a line.

    Raises:
        ValueError: a path holds no rows, or the runs have different prompts.
    """
    rows = [row for path in paths for row in _rows_of(path)]
    _check_alike(rows)
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        key = (cell_of(row).configuration.name, row["task"], row["length"])
        if key not in found or row["units"] >= found[key]["units"]:
            found[key] = row
    return sorted(found.values(), key=lambda row: row["config"] != STOCK)


def cell_of(row: dict[str, Any]) -> ScoreCell:
    """The cell that a row was made of, its configuration named by `plain_options`."""
    is_stock = row["config"] == STOCK
    engine = {name: row[name] for name in OF_THE_ENGINE & row.keys()}
    engine |= {name: {str(row["length"]): row[name]} for name in BY_LENGTH & row.keys()}
    return ScoreCell(
        stock() if is_stock else configuration(plain_options(row["config"])),
        row["task"],
        row["length"],
        row["samples"],
        row["units"],
        row["score"],
        row["low"],
        row["high"],
        row["metrics"],
        None
        if is_stock
        else Comparison(row["wins"], row["losses"], row["units"], row["p"], row["test"]),
        row["stock_score"],
        engine,
    )


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """The budget, and the options that change what is computed with it.

    A `matched_share` of 0.5 counts as the default, as it is in most models: rows do not tell the
    model's heads.

    Left out are defaults, the profile and the host pool. Rows of trials have words that are no
    options, which stay.
    """
    default = HeteroCacheConfig()
    config = HeteroCacheConfig(**{key: options[key] for key in options.keys() & OPTIONS})
    found = {
        key: value
        for key, value in options.items()
        if key not in OF_THE_PLACE and value != getattr(default, key, None)
    }
    for name in ("matched_share", "evicted_means"):
        unset: dict[str, Any] = {name: None}
        without = replace(config, **unset)
        if _left_behind(without) == _left_behind(config):
            found.pop(name, None)
            config = without
    return found | {"gpu_budget": config.gpu_budget}


def _left_behind(config: HeteroCacheConfig) -> tuple[float, bool, bool]:
    return config.share_of_matched, config.keeps_means, config.mixes_means


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, or of a folder: those that it holds, then those of its samples."""
    rows = []
    if path.is_file():
        rows = _read(path)
    if (path / "results.jsonl").is_file():
        rows = _read(path / "results.jsonl")
    if (path / "run.json").is_file():
        folder = RunFolder(path)
        run = json.loads((path / "run.json").read_text())
        cells = cells_of(folder, folder.configurations())
        rows += [result_row(cell, run) for cell in cells]
    if not rows:
        raise ValueError(
            f"{path} holds no rows; name folders of `heterocache eval` or files of result rows"
        )
    return rows


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no file of result rows: {error}") from None
    for row in rows:
        if not _is_row(row):
            raise ValueError(
                f"{path} has a line that is no row of `heterocache eval`: {row!s:.200}"
            )
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    needed = NEEDED if row.get("config") == STOCK else NEEDED | NEEDED_OF_OURS
    has_types = all(name in row and isinstance(row[name], kind) for name, kind in needed.items())
    return has_types and row["units"] > 0


def _check_alike(rows: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError unless all rows are of the same prompts, model and kind of cache."""
    seen: dict[str, Any] = {}
    for row in rows:
        told = {name: row[name] for name in ALIKE}
        told["Python"] = str(row["versions"].get("python")).rpartition(".")[0]
        told["kv_cache_dtype"] = row["llm"].get("kv_cache_dtype", "auto")
        for name, value in told.items():
            if seen.setdefault(name, value) != value:
                raise ValueError(
                    f"rows of {name} {seen[name]} and of {value} cannot be compared; name runs "
                    "with the same prompts"
                )
