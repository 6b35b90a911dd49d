"""Quest in the engine: the prompt stays, is shared by prefix, and its lists follow the query."""

from __future__ import annotations

import pytest
from engines import assert_same_completions, chain_engine, run_chains, run_greedy

MIN_PROMPT = 512


@pytest.fixture(scope="module")
def engine(model):
    options = {"policy": "quest", "gpu_budget": 0.3, "min_prompt_tokens": MIN_PROMPT}
    with chain_engine(model, options) as engine:
        yield engine


def test_batches_fresh_or_from_the_prefix_cache_are_answered_alike(engine, mixed_prompts):
    """Every invariant is checked after every step; other requests read the same blocks."""
    free_before = engine.num_free
    fresh = run_greedy(engine, mixed_prompts)
    lowest = min(engine.free_blocks)
    cached = run_greedy(engine, mixed_prompts)
    assert_same_completions(cached, fresh)
    assert engine.num_free == free_before
    # the last two share 35 blocks; each prompt and what it generates stands in blocks of its own
    dense = sum(-(-(len(prompt) + 24) // 16) for prompt in mixed_prompts)
    assert free_before - lowest <= dense
    metrics = engine.metrics()
    compacted = 2 * sum(len(prompt) >= MIN_PROMPT for prompt in mixed_prompts)
    assert metrics["requests_compacted{}"] == compacted
    assert metrics["pages{kind=compact}"] == 0
    assert metrics["decode_rows{kind=dense,reason=short_prompt}"] > 0
    assert not any("table_full" in name for name in metrics)


def test_questions_after_the_prompt_are_answered_from_what_each_step_reads(
    long_model, engine, chain
):
    """No page of the facts is protected, nor were they asked for when the prompt ended."""
    (output,) = run_chains(engine, [chain])
    assert sum(chain.correct(output)) >= 0.9 * len(chain.answers)
