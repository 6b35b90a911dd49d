"""A server of `vllm serve`, as users start it, and what its `/metrics` say."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

START_LIMIT_S = 600


@contextlib.contextmanager
def serve(model: str, log: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """URL of a server with this backend; its output goes to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = shutil.which("vllm", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert vllm, "the vllm command is not installed"
    command = [vllm, "serve", model, "--attention-backend", "heterocache"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    command += ["--enforce-eager", "--seed", "0", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail("the server did not stop on SIGTERM")


def wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    started = time.monotonic()
    while time.monotonic() - started < START_LIMIT_S:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            time.sleep(0.5)
    raise AssertionError(f"not healthy after {START_LIMIT_S} s: {log.read_text()[-3000:]}")


def metric(url: str, pattern: str, before_first: float | None = None) -> float:
    """Sum of the samples whose line matches `vllm:heterocache_<pattern>`.

    vLLM exports no sample with labels before it has counted with them: `before_first` is the sum
    then, and without it no sample raises AssertionError.
    """
    return stock_metric(url, f"heterocache_{pattern}", before_first)


def stock_metric(url: str, pattern: str, before_first: float | None = None) -> float:
    """The same of vLLM's own metrics, `vllm:<pattern>`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    found = re.findall(rf"^vllm:{pattern}\S* (\S+)$", text, re.MULTILINE)
    if not found and before_first is not None:
        return before_first
    assert found, f"no metric {pattern}"
    return sum(map(float, found))
