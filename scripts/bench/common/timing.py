"""Timing of calls on the GPU, and the refusal of wrong results."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_ERROR = 5e-3 if DEVICE.type == "cuda" else 2e-2  # the interpreter rounds bf16 towards zero
CPU_CALLS = 5


def time_calls(
    call: Callable[[int], Any], num_layers: int, replays: int = 25
) -> tuple[float, float]:
    """Median and spread (90th less 10th percentile) of call(layer), in microseconds."""
    if DEVICE.type == "cpu":  # the interpreter: only to see whether a script runs
        return time_once(lambda: call(0)) * 1e6, 0.0
    call(0)
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


def seconds(call: Callable[[], Any]) -> list[float]:
    """Median, 90th and 10th percentile of a call; on a GPU with a cold L2, without launch time."""
    if DEVICE.type == "cuda":
        times = triton.testing.do_bench(call, warmup=20, rep=150, quantiles=[0.5, 0.9, 0.1])
        return [ms / 1e3 for ms in times]
    return summary(time_once(call) for _ in range(CPU_CALLS))


def summary(times: Iterable[float]) -> list[float]:
    """Median, longest and shortest."""
    times = list(times)
    return [statistics.median(times), max(times), min(times)]


def time_once(call: Callable[[], Any]) -> float:
    """Seconds by the clock of the host; the call waits for the device itself."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rates(num_bytes: int, times: list[float]) -> list[float]:
    """GB/s of each of the times, which are in seconds."""
    return [num_bytes / time / 1e9 for time in times]


def expect(is_right: bool, what: str) -> None:
    """Raise SystemExit where a result that is about to be timed is wrong."""
    if not is_right:
        raise SystemExit(f"{what} is wrong; nothing is reported")


def expect_close(
    actual: torch.Tensor, exact: torch.Tensor, what: str, most: float = MAX_ERROR
) -> None:
    """Raise SystemExit where the relative error is above `most`."""
    error = ((actual.float() - exact).norm() / exact.norm()).item()
    if not error < most:
        raise SystemExit(f"{what} is wrong: relative error {error}; nothing is reported")
