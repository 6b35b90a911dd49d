#!/usr/bin/env python3
"""Plots for docs/performance.md from measured rows.

usage: plot.py docs/results/decode_h200.jsonl docs/results/serving_h200.jsonl

decode-time.svg: time per output token against context, batch 1, one line an engine;
throughput.svg: output tokens per second against the number of requests, at each context.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STYLES = {
    "stock": ("o-", "tab:gray"),
    "paper": ("s-", "tab:orange"),
    "retrieval": ("^-", "tab:blue"),
}
GPU_BUDGET = 0.25
MODEL = "llama-3.1-8b-shape"
CONTEXT_STYLES = ("-", "--", ":", "-.")


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows of the engine benchmarks; a later run of the same cell replaces an earlier one.

    Left out are runs with random attention, which are there to compare levels of drift, and what
    something else on the machine disturbed. Runs of other models, on several GPUs, with drafts, of
    another `gpu_budget`, KV cache or `evicted_means` would be lines of their own.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["benchmark"] in ("decode", "serving") and not is_special(row):
                names = ("benchmark", "engine", "cell", "drift", "num_tokens", "device")
                rows[tuple(row.get(name) for name in names)] = row
    return list(rows.values())


def is_special(row: dict[str, Any]) -> bool:
    config = row.get("config", {})
    engine, options = config.get("engine", {}), config.get("options") or {}
    return (
        row.get("random_attention", False)
        or row.get("model", MODEL) != MODEL
        or "disturbed" in row
        or engine.get("tensor_parallel_size", 1) > 1
        or engine.get("kv_cache_dtype", "auto") != "auto"
        or engine.get("num_drafts", 0) > 0
        or options.get("gpu_budget", GPU_BUDGET) != GPU_BUDGET
        or "evicted_means" in options
    )


def cell_of(row: dict[str, Any]) -> tuple[int, int]:
    """Requests and prompt tokens of a row."""
    if row["benchmark"] == "serving":
        return row["requests"], row["num_tokens"]
    count, _, tokens = row["cell"].partition("x")
    return int(count), int(tokens[:-1]) * 1024 if tokens.endswith("K") else int(tokens)


def times_by_engine(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Engine -> (prompt tokens, ms a token) of batch 1, without drift checks."""
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        count, num_tokens = cell_of(row)
        if row["benchmark"] == "decode" and count == 1 and row["drift"] in (None, "off"):
            lines[row["engine"]].append((num_tokens, row["mean_ms"]))
    return {engine: sorted(points) for engine, points in lines.items()}


def throughput_by_engine(
    rows: list[dict[str, Any]],
) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """(engine, prompt tokens) -> (requests, tokens per second while all decode), no drift checks.

    Only contexts that were measured at more than one number of requests.
    """
    lines: dict[tuple[str, int], set[tuple[int, float]]] = defaultdict(set)
    for row in rows:
        if row["drift"] not in (None, "off"):
            continue
        count, num_tokens = cell_of(row)
        if row["benchmark"] == "decode":
            rate = count / row["mean_ms"] * 1e3
        elif "decode_phase_tokens_per_s" in row:
            rate = row["decode_phase_tokens_per_s"]
        else:
            continue
        lines[row["engine"], num_tokens].add((count, rate))
    return {key: sorted(points) for key, points in lines.items() if len(points) > 1}


def plot(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write both pictures; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    # no date and no random ids, so that equal rows give equal files
    matplotlib.rcParams["svg.hashsalt"] = "performance"
    import matplotlib.pyplot as plt

    pictures = []
    device = ", ".join(sorted({row["device"] for row in rows}))
    for name, draw in (("decode-time", _draw_times), ("throughput", _draw_throughput)):
        figure, axes = plt.subplots(figsize=(6.4, 4.0))
        draw(axes, rows)
        axes.set_title(device, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        path = folder / f"{name}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        pictures.append(path)
    return pictures


def _draw_times(axes: Any, rows: list[dict[str, Any]]) -> None:
    for engine, points in times_by_engine(rows).items():
        style, colour = STYLES[engine]
        tokens, times = zip(*points, strict=True)
        axes.plot([n / 1024 for n in tokens], times, style, color=colour, label=engine)
    axes.set_xlabel("context, K tokens (batch 1)")
    axes.set_ylabel("ms per output token")


def _draw_throughput(axes: Any, rows: list[dict[str, Any]]) -> None:
    lines = throughput_by_engine(rows)
    contexts = sorted({num_tokens for _, num_tokens in lines})
    for (engine, num_tokens), points in lines.items():
        style, colour = STYLES[engine]
        dash = CONTEXT_STYLES[contexts.index(num_tokens) % len(CONTEXT_STYLES)]
        counts, rates = zip(*points, strict=True)
        label = f"{engine}, {num_tokens // 1024}K" if num_tokens >= 1024 else engine
        axes.plot(counts, rates, style[0] + dash, color=colour, label=label)
    axes.set_xlabel("requests decoding at once")
    axes.set_ylabel("output tokens per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/plots"))
    args = parser.parse_args()
    rows = read_rows(args.rows)
    if not rows:
        raise SystemExit("these files hold no rows of decode.py or serving.py")
    args.out.mkdir(parents=True, exist_ok=True)
    for path in plot(rows, args.out):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
