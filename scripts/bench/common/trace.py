"""What decode steps are made of: kernels in a trace of torch's profiler, which a worker writes.

The stream with the most launches is the compute stream; transfers run on others beside it. CUPTI
makes steps somewhat longer, so the steps of a trace are not timed.
"""

from __future__ import annotations

import collections
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
TRACES = "*.pt.trace.json.gz"
MOST_KERNELS = 16


class Launch(NamedTuple):
    """A kernel or copy on the device; times in microseconds."""

    name: str
    stream: int
    start: float
    end: float


def profiler_config(folder: Path) -> dict[str, Any]:
    """`profiler_config` of an engine whose traces of the device alone go to `folder`."""
    return {
        "profiler": "torch",
        "torch_profiler_dir": str(folder),
        "torch_profiler_activities": ["CUDA"],
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
    }


def take_trace(folder: Path) -> list[Launch]:
    """The launches of the only trace in `folder`, which is removed; of several ranks, the first's.

    Raises FileNotFoundError where there is none.
    """
    paths = sorted(folder.glob(TRACES))
    if not paths:
        raise FileNotFoundError(f"no trace {TRACES} in {folder}")
    with gzip.open(paths[0], "rt") as file:
        events = json.load(file)["traceEvents"]
    for path in paths:
        path.unlink()
    return launches(events)


def launches(events: Iterable[dict[str, Any]]) -> list[Launch]:
    """Those of a trace that ran on the device, in order of time."""
    found = [
        Launch(short_name(e["name"]), int(e["args"]["stream"]), e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ON_DEVICE
    ]
    return sorted(found, key=lambda launch: launch.start)


def short_name(name: str) -> str:
    """A kernel's name without arguments, template parameters and its return type."""
    return name.removeprefix("void ").partition("<")[0].partition("(")[0].strip()


def per_step(found: list[Launch], num_steps: int) -> dict[str, Any]:
    """Microseconds a step: from the first to the last launch of the compute stream, in which this
    stream does nothing, and of each kernel, the longest first.

    `kernels` and `beside` are lists of [name, launches a step, us a step], of the compute stream
    and of the others. Raises ValueError where nothing ran.
    """
    if not found:
        raise ValueError("the trace has no kernel")
    counts = collections.Counter(launch.stream for launch in found)
    compute = counts.most_common(1)[0][0]
    mine = [launch for launch in found if launch.stream == compute]
    span = max(launch.end for launch in mine) - mine[0].start
    return {
        "num_steps": num_steps,
        "span_us": span / num_steps,
        "idle_us": (span - busy_time(mine)) / num_steps,
        "kernels": by_kernel(mine, num_steps)[:MOST_KERNELS],
        "beside": by_kernel([one for one in found if one.stream != compute], num_steps),
    }


def busy_time(found: list[Launch]) -> float:
    """Time in which at least one of these runs; they are in order of their starts."""
    busy, until = 0.0, float("-inf")
    for launch in found:
        busy += max(0.0, launch.end - max(until, launch.start))
        until = max(until, launch.end)
    return busy


def by_kernel(found: list[Launch], num_steps: int) -> list[list[Any]]:
    """[name, launches a step, us a step] of each kernel, the longest first."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for launch in found:
        times[launch.name].append(launch.end - launch.start)
    lines = [[name, len(t) / num_steps, sum(t) / num_steps] for name, t in times.items()]
    return sorted(lines, key=lambda line: -line[2])
