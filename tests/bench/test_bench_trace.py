"""scripts/bench/common/trace.py says what decode steps are made of."""

from __future__ import annotations

import gzip
import json
from typing import Any

import decode as bench_decode
import pytest

from common import trace


def event(name: str, stream: int, start: float, length: float, cat: str = "kernel") -> dict:
    args = {"stream": stream}
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length, "args": args}


# two steps; the second product overlaps the first, and a fetch runs beside
EVENTS: list[dict[str, Any]] = [
    {"ph": "M", "name": "process_name", "args": {}},
    event("cudaLaunchKernel", 7, 0, 500, "cuda_runtime"),
    event("_page_gather_kernel", 20, 10, 60),
    event("paged_decode_kernel", 7, 0, 10),
    event("void cutlass::gemm<float, 1>(Params)", 7, 10, 20),
    event("void cutlass::gemm<half, 2>(Params)", 7, 20, 20),
    event("Memcpy DtoH (Device -> Pinned)", 7, 60, 20, "gpu_memcpy"),
]


def test_launches_are_summed_by_kernel_and_gaps_of_the_compute_stream_are_idle():
    summary = trace.per_step(trace.launches(EVENTS), 2)
    assert summary == {
        "num_steps": 2,
        "span_us": 40.0,  # from 0 to 80
        "idle_us": 10.0,  # from 40 to 60
        "kernels": [
            ["cutlass::gemm", 1.0, 20.0],
            ["Memcpy DtoH", 0.5, 10.0],
            ["paged_decode_kernel", 0.5, 5.0],
        ],
        "beside": [["_page_gather_kernel", 0.5, 30.0]],
    }


def test_a_trace_is_read_once(tmp_path):
    with gzip.open(tmp_path / "rank0.1.pt.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": EVENTS}, file)
    assert trace.take_trace(tmp_path) == trace.launches(EVENTS)
    with pytest.raises(FileNotFoundError, match="no trace"):
        trace.take_trace(tmp_path)


def test_no_kernel_is_an_error():
    with pytest.raises(ValueError, match="no kernel"):
        trace.per_step(trace.launches(EVENTS[:2]), 1)


def test_a_traced_window_is_printed_with_its_kernels(capsys):
    made_of = trace.per_step(trace.launches(EVENTS), 2)
    row = {"engine": "retrieval", "cell": "8x32K", "drift": "real", "trace": made_of}
    bench_decode.print_traces([row, {"trace": None}])
    printed = capsys.readouterr().out
    assert "retrieval, 8x32K, drift real" in printed and "40, in 10 of which" in printed
    assert "cutlass::gemm" in printed and "beside: _page_gather_kernel" in printed


def test_a_trace_needs_a_gpu():
    with pytest.raises(SystemExit, match="--trace is of kernels on a GPU"):
        bench_decode.parse_args(["--tiny", "--trace", "8"])
    assert bench_decode.parse_args(["--trace", "8", "--cells", "8x32K"]).trace == 8
