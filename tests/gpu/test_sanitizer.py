"""Every Triton kernel under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "check.py"
UNUSABLE = 3  # the script's exit code where there is no sanitizer, or it refuses the GPU

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_kernel_reads_or_writes_out_of_bounds_or_races(tool):
    command = [sys.executable, str(SCRIPT), "--sanitize", tool]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == UNUSABLE:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{tool}: " in result.stdout and "SUMMARY" in result.stdout
