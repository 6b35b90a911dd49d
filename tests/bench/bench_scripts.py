"""The benchmark scripts as modules; they stand beside one another and import one another."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import triton_mode  # noqa: F401  before Triton is imported

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.append(str(SCRIPTS))

bench_common = importlib.import_module("bench_common")
bench_decode = importlib.import_module("bench_decode")
bench_engine = importlib.import_module("bench_engine")
bench_kernels = importlib.import_module("bench_kernels")
bench_serving = importlib.import_module("bench_serving")
bench_step_kernels = importlib.import_module("bench_step_kernels")
bench_swap = importlib.import_module("bench_swap")
decode_cells = importlib.import_module("decode_cells")
decode_timing = importlib.import_module("decode_timing")
mean_timing = importlib.import_module("mean_timing")
plot_performance = importlib.import_module("plot_performance")
synthetic_profiles = importlib.import_module("synthetic_profiles")

# what tests/test_docs.py asks of every row in docs/results
ROW_KEYS = {"benchmark", "date", "commit", "device", "versions", "config"}
