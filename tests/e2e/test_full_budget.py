"""gpu_budget=1: the whole machinery runs, and the answers are stock vLLM's."""

from __future__ import annotations

import pytest
from engines import (
    assert_same_completions,
    assert_same_greedy_tokens,
    chain_engine,
    run_chains,
    run_greedy,
)


@pytest.fixture(scope="module")
def engine(model, stock):
    with chain_engine(model, {"gpu_budget": 1.0, "min_prompt_tokens": 64}) as engine:
        yield engine


@pytest.mark.feature(
    "Chunked prefill",
    "KV cache of the model's dtype",
    "V1 model runner",
    "Eager mode",
    "Full attention",
)
def test_greedy_tokens_equal_stock_in_a_mixed_chunked_batch(engine, stock, mixed_prompts):
    free_before = engine.num_free
    outputs = run_greedy(engine, mixed_prompts)
    assert_same_completions(outputs, stock.greedy)
    metrics = engine.metrics()
    assert metrics["requests_compacted{}"] == len(mixed_prompts) - 1  # one is under 64 tokens
    assert metrics["decode_rows{kind=compact,reason=compacted}"] > 0
    assert metrics["decode_rows{kind=dense,reason=short_prompt}"] > 0
    assert engine.num_free == free_before


@pytest.mark.feature("Prefix caching")
def test_prefix_hit_on_given_back_blocks_changes_nothing(engine, stock, mixed_prompts):
    """The prompts of the test above were compacted and freed; their hashed blocks still serve."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2, ignore_eos=True)
    first = engine.run(mixed_prompts[4:5], params)["0"]
    again = engine.run(mixed_prompts[4:5], params)["0"]
    assert again.num_cached_tokens >= len(mixed_prompts[4]) - 16
    assert_same_greedy_tokens(first.outputs[0].token_ids, stock.greedy[4])
    assert_same_greedy_tokens(again.outputs[0].token_ids, stock.greedy[4])


@pytest.mark.feature("Custom logits processors")
def test_forced_chain_answers_equal_stock(long_model, engine, stock, chains):
    ours = run_chains(engine, chains)
    for chain, output, expected in zip(chains, ours, stock.chains, strict=True):
        assert chain.correct(output) == chain.correct(expected)
