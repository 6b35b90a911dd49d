"""Timing of single kernels, and what the rows of their benchmarks have in common."""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
import time
from pathlib import Path

import bench_engine
import torch
import triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_ERROR = 5e-3 if DEVICE.type == "cuda" else 2e-2  # the interpreter rounds bf16 towards zero


def time_calls(call, num_layers: int, replays: int = 25) -> tuple[float, float]:
    """Median and spread (90th less 10th percentile) of call(layer), in microseconds."""
    call(0)
    if DEVICE.type == "cpu":  # the interpreter: only to see whether a script runs
        started = time.perf_counter()
        call(0)
        return (time.perf_counter() - started) * 1e6, 0.0
    calls = num_layers * max(1, 8 // num_layers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % num_layers)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for _ in range(3):
        graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 / calls for a, b in itertools.pairwise(events)]
    deciles = statistics.quantiles(times, n=10)
    del graph
    return statistics.median(times), deciles[-1] - deciles[0]


def check(actual: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    error = ((actual.float() - exact).norm() / exact.norm()).item()
    if not error < MAX_ERROR:
        raise SystemExit(f"{what} is wrong: relative error {error}; nothing is reported")


def provenance(commit: str) -> dict[str, object]:
    """What a row needs so that somebody else can repeat it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "device": bench_engine.device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }


def quantiles(call) -> list[float]:
    """Milliseconds of one call, L2 flushed before each: median, 90th and 10th percentile."""
    if DEVICE.type == "cpu":
        return [time_calls(lambda _: call(), 1)[0] / 1e3] * 3
    return triton.testing.do_bench(call, warmup=20, rep=150, quantiles=[0.5, 0.9, 0.1])


def append(out_dir: str | None, rows: list[dict[str, object]]) -> None:
    if out_dir:
        with open(Path(out_dir) / "kernels.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
