"""Policies with tables of their own in a tiny engine each: memory, reading, and what goes back."""

from __future__ import annotations

import pytest
import tiny_llama
from engines import start

from vllm_heterocache.heads.budget import compact_blocks

BUDGET = 0.5
FREES = {"rocketkv": True, "centroidkv": True, "fier": False}
OPTIONS = {"rocketkv": {"read_share": 0.3}, "fier": {"full_layers": 0}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama.write(folder)
    return str(folder)


@pytest.mark.parametrize("policy", FREES)
def test_a_batch_is_served_within_its_budget(policy, tiny):
    """Every invariant is checked after every step."""
    options = {
        "policy": policy,
        "gpu_budget": BUDGET,
        "min_prompt_tokens": tiny_llama.MIN_PROMPT_TOKENS,
        "policy_options": OPTIONS.get(policy, {}),
    }
    prompts = tiny_llama.text_prompts()
    compacted = [len(p) for p in prompts if len(p) >= tiny_llama.MIN_PROMPT_TOKENS]
    held = {}
    with start(tiny, options, **tiny_llama.SETTINGS) as engine:
        free = engine.num_free

        def on_step(engine, step: int) -> None:
            if engine.runtime.counters.requests_compacted == len(compacted):
                held.setdefault("blocks", []).append(free - engine.num_free)

        completions = tiny_llama.completions(engine, prompts, on_step=on_step)
        metrics = engine.metrics()
        assert engine.num_free == free
    assert all(len(one.token_ids) == tiny_llama.NUM_TOKENS for one in completions)
    rows = len(compacted) * (tiny_llama.NUM_TOKENS - 1)
    assert metrics["decode_rows{kind=compact,reason=compacted}"] == rows
    ends = [len(p) + tiny_llama.NUM_TOKENS - 1 for p in prompts]
    dense = sum(-(-end // 16) for end in ends)
    freed = sum(length // 16 - compact_blocks(length, BUDGET) for length in compacted)
    assert max(held["blocks"][1:]) <= dense - (freed if FREES[policy] else 0)
    read = metrics["decode_pages_read{}"] / metrics["decode_pages_dense{}"]
    assert read < (0.6 if policy == "rocketkv" else 0.8)
