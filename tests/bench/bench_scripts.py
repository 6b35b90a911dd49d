"""Where the benchmark scripts are, and what their rows must hold.

Import this before any of them: the interpreter is chosen before Triton is imported.
"""

from __future__ import annotations

from pathlib import Path

import triton_mode  # noqa: F401

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"

# what tests/test_docs.py asks of every row in docs/results
ROW_KEYS = {"benchmark", "date", "commit", "device", "versions", "config"}
