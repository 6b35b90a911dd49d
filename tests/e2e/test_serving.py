"""`vllm serve --attention-backend heterocache` over HTTP, with its metrics."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engines import DTYPE, GREEDY_TOKENS, MAX_MODEL_LEN, assert_same_greedy_tokens

START_LIMIT_S = 600


@pytest.fixture(scope="module")
def server(model, stock, tmp_path_factory):
    """URL of a server at gpu_budget=1; every long prompt goes through compaction."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = shutil.which("vllm", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert vllm, "the vllm command is not installed"
    log = tmp_path_factory.mktemp("server") / "log"
    options = "--additional-config.heterocache"
    command = [vllm, "serve", model, "--attention-backend", "heterocache"]
    command += [f"{options}.gpu_budget", "1.0", f"{options}.min_prompt_tokens", "64"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", "512"]
    command += ["--enforce-eager", "--seed", "0", "--dtype", DTYPE]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
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


def metric(url: str, pattern: str) -> float:
    """Sum of the samples whose line matches `vllm:heterocache_<pattern>`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    found = re.findall(rf"^vllm:heterocache_{pattern}\S* (\S+)$", text, re.MULTILINE)
    assert found, f"no metric {pattern}"
    return sum(map(float, found))


def test_concurrent_completions_equal_stock(server, stock, mixed_prompts):
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none", timeout=600)

    def complete(prompt: list[int]) -> list[int]:
        reply = client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=GREEDY_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return reply.choices[0].model_extra["token_ids"]

    with ThreadPoolExecutor(len(mixed_prompts)) as pool:
        answers = list(pool.map(complete, mixed_prompts))
    for tokens, expected in zip(answers, stock.greedy, strict=True):
        assert_same_greedy_tokens(tokens, expected)

    assert metric(server, "requests_compacted_total") == len(mixed_prompts) - 1
    rows = GREEDY_TOKENS - 1  # the first token comes from the prefill
    assert metric(server, 'decode_rows_total{[^}]*kind="compact"') == rows * (
        len(mixed_prompts) - 1
    )
    assert metric(server, 'decode_rows_total{[^}]*reason="short_prompt"') == rows


def test_all_metrics_are_exported_and_idle_at_zero(server):
    for kind in ("dense", "compact", "host", "spare"):
        assert metric(server, f'pages{{[^}}]*kind="{kind}"') == 0
    for name in ("drift_checks", "drift_triggers", "pages_fetched", "pages_offloaded"):
        assert metric(server, f"{name}_total") == 0  # nothing is compressed at 1.0


def test_bad_option_stops_the_server_with_one_sentence(tiny_model):
    """The sentence reaches the user as it is, not wrapped by pydantic."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny_model]
    command += ["--attention-backend", "heterocache", "--skip-tokenizer-init"]
    command += ["--additional-config", '{"heterocache": {"gpu_budgett": 0.3}}']
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "gpu_budgett" in last and "did you mean 'gpu_budget'" in last
