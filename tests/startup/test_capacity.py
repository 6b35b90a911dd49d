import dataclasses

import pytest

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.startup.capacity import steady_state_line, steady_state_requests

PAGE = 16


def admit_one_after_another(num_blocks, num_tokens, gpu_budget) -> int:
    """Count blocks: each request is prefilled beside the compacted ones, then compacted."""
    free, admitted = num_blocks - 1, 0
    whole, partial = num_tokens // PAGE, num_tokens % PAGE > 0
    while True:
        dense, compact = whole + partial, compact_blocks(num_tokens, gpu_budget, PAGE)
        if dense + compact > free:
            return admitted
        admitted += 1
        free -= dense + compact
        free += whole  # given back


@pytest.mark.parametrize("gpu_budget", [0.05, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("num_tokens", [17, 111, 512, 513, 6000])
def test_requests_at_once_are_as_many_as_can_be_admitted(gpu_budget, num_tokens):
    dense = -(-num_tokens // PAGE)
    for num_blocks in (2, dense, dense + 1, 2 * dense, 2 * dense + 1, 5 * dense + 7, 4000):
        compacted, stock = steady_state_requests(num_blocks, num_tokens, gpu_budget, PAGE)
        assert compacted == admit_one_after_another(num_blocks, num_tokens, gpu_budget)
        assert stock == (num_blocks - 1) // dense


def test_worked_example():
    # 6000 tokens: 375 pages, 113 kept; 1000 usable blocks; the last needs 375 + 113 = 488
    assert steady_state_requests(1001, 6000, 0.3, PAGE) == (1 + (1000 - 488) // 113, 2)


def test_line_compares_with_stock_vllm():
    config = HeteroCacheConfig(gpu_budget=0.3, min_prompt_tokens=500, compact_min_tokens=528)
    assert steady_state_line(1001, 6000, config) == (
        "HeteroCache: gpu_budget=0.3 keeps about 53,333 prompt tokens in 1,001 KV blocks "
        "(stock vLLM: 16,000); requests of 6,000 tokens at once: 5 (stock: 2). "
        "Prompts below 528 tokens stay dense."
    )


def test_line_promises_nothing_where_no_prompt_is_long_enough():
    config = HeteroCacheConfig(gpu_budget=0.3, compact_min_tokens=1024)
    line = steady_state_line(1001, 800, config)
    assert "requests of 800 tokens at once: 20 (stock: 20)" in line
    assert "53,333" not in line
    longer = dataclasses.replace(config, compact_min_tokens=800)
    assert "requests of 800 tokens at once: 63 (stock: 20)" in steady_state_line(1001, 800, longer)


def test_line_of_a_policy_that_frees_nothing_promises_nothing():
    config = HeteroCacheConfig(policy="quest", gpu_budget=0.3, compact_min_tokens=1024)
    assert steady_state_line(1001, 6000, config) == (
        "HeteroCache: policy quest frees no memory: 1,001 KV blocks keep 16,000 tokens, 2 requests "
        "of 6,000 tokens at once, as in stock vLLM. Each decode step reads gpu_budget=0.3 of a "
        "prompt; prompts below 1024 tokens are read whole."
    )
    everything = dataclasses.replace(config, gpu_budget=1.0)  # then every policy is policy full
    assert "requests of 6,000 tokens at once: 1 (stock: 2)" in steady_state_line(
        1001, 6000, everything
    )


def test_a_policy_that_frees_nothing_serves_as_many_as_stock_vllm():
    assert steady_state_requests(1001, 6000, 0.3, PAGE, frees_prompt=False) == (2, 2)
    assert steady_state_requests(376, 6000, 0.3, PAGE, frees_prompt=False) == (1, 1)
    assert steady_state_requests(375, 6000, 0.3, PAGE, frees_prompt=False) == (0, 0)
