"""Result rows: what each of them says beside its numbers, where they go, how they are shown."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from vllm_heterocache.evaluation.provenance import commit, provenance, rounded


def row_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    parser.add_argument("--out", type=Path, default=out, help="folder for rows; default: $OUT")
    parser.add_argument("--run", default="", help="name of the run, kept in the rows")
    parser.add_argument("--commit", default=commit(), help="kept in the rows")
    parser.add_argument("--tiny", action="store_true", help="a tiny case, on a CPU too")
    return parser


def made_by(args: argparse.Namespace) -> dict[str, Any]:
    """date, commit, device, versions and run, for rows that are measured in this process."""
    return provenance() | {"commit": args.commit, "run": args.run}


def append_rows(folder: Path | None, name: str, rows: list[dict[str, Any]]) -> None:
    """Add `rows` to the JSON lines of file `name`; without a folder they are not kept."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(rounded(row)) + "\n" for row in rows)


def print_table(heads: list[str], lines: list[list[Any]]) -> None:
    """A Markdown table with columns as wide as their widest cell."""
    texts = [heads, *[[_text(cell) for cell in line] for line in lines]]
    widths = [max(len(line[i]) for line in texts) for i in range(len(heads))]
    texts.insert(1, ["-" * (width - 1) + ":" for width in widths])
    for line in texts:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("| " + " | ".join(cells) + " |", flush=True)


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
