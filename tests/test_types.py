"""The annotations of the package, and of kernels/ as a part of it, are consistent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def check_types(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs mypy in a folder, as `make types` does in the repository."""
    return subprocess.run(
        [sys.executable, "-m", "mypy", *options], cwd=folder, capture_output=True, text=True
    )


# Without a cache, mypy reads vLLM and torch: about a minute.
@pytest.mark.slow
def test_mypy_finds_no_error():
    done = check_types(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_are_checked_through_the_symlink(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "vllm_heterocache").mkdir()
    (tmp_path / "vllm_heterocache" / "__init__.py").touch()
    (tmp_path / "vllm_heterocache" / "kernels").symlink_to("../kernels")
    (tmp_path / "kernels" / "wrong.py").write_text(
        "def length(text: str) -> int:\n    return text\n"
    )
    (tmp_path / "kernels" / "untyped.py").write_text("def length(text):\n    return len(text)\n")
    done = check_types(tmp_path, "--config-file", str(ROOT / "pyproject.toml"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "vllm_heterocache/kernels/wrong.py:2" in done.stdout
    assert "vllm_heterocache/kernels/untyped.py:1" in done.stdout
