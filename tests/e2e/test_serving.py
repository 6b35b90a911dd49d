"""`vllm serve --attention-backend heterocache` over HTTP, with its metrics."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_server import metric, serve
from engines import DTYPE, GREEDY_TOKENS, MAX_MODEL_LEN, assert_same_greedy_tokens


@pytest.fixture(scope="module")
def server(model, stock, tmp_path_factory):
    """URL of a server at gpu_budget=1; every long prompt goes through compaction."""
    options = "--additional-config.heterocache"
    with serve(
        model,
        tmp_path_factory.mktemp("server") / "log",
        *(f"{options}.gpu_budget", "1.0", f"{options}.min_prompt_tokens", "64"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", "512"),
        *("--dtype", DTYPE),
        VLLM_CPU_KVCACHE_SPACE="1",
    ) as url:
        yield url


@pytest.mark.feature("OpenAI server, completions")
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


@pytest.mark.feature("Prometheus metrics")
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
