from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vllm_heterocache.compat.other_groups import OtherGroup
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.heads.recipes import all_full
from vllm_heterocache.policies import make_policy
from vllm_heterocache.refusal import Sentence
from vllm_heterocache.startup.capacity import (
    MAX_HOST_SHARE,
    host_pool_blocks,
    nothing_compacted,
    steady_state_line,
    steady_state_requests,
)
from vllm_heterocache.startup.serving_plan import ServingPlan, serving_policy

PAGE = 16
PAGE_BYTES = 8192


def plan_of(config: HeteroCacheConfig, compact_min_tokens: int) -> ServingPlan:
    """Of any model: the line depends neither on roles nor on observed queries."""
    policy = serving_policy(config, make_policy(config))
    return ServingPlan(config, policy, (), compact_min_tokens, recomputed_tokens=1)


# --- requests in the KV pool ---


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
    plan = plan_of(HeteroCacheConfig(gpu_budget=0.3, min_prompt_tokens=500), 528)
    assert steady_state_line(1001, 6000, plan) == (
        "HeteroCache: gpu_budget=0.3 keeps about 53,333 prompt tokens in 1,001 KV blocks "
        "(stock vLLM: 16,000); requests of 6,000 tokens at once: 5 (stock: 2). "
        "Prompts below 528 tokens stay dense."
    )


def test_line_promises_nothing_where_no_prompt_is_long_enough():
    plan = plan_of(HeteroCacheConfig(gpu_budget=0.3), 1024)
    line = steady_state_line(1001, 800, plan)
    assert "requests of 800 tokens at once: 20 (stock: 20)" in line
    assert "53,333" not in line
    shorter = dataclasses.replace(plan, compact_min_tokens=800)
    assert "requests of 800 tokens at once: 63 (stock: 20)" in steady_state_line(1001, 800, shorter)


def test_a_start_that_compacts_nothing_is_warned_of_with_its_cause():
    by_option = plan_of(HeteroCacheConfig(min_prompt_tokens=5000), 5000)
    warning = nothing_compacted(4999, by_option)
    assert str(warning) == (
        "HeteroCache compacts no prompt: prompts below 5000 tokens stay dense by "
        "min_prompt_tokens=5000; lower it, or raise --max-model-len (4999)."
    )
    assert nothing_compacted(5000, by_option) is None
    by_budget = plan_of(HeteroCacheConfig(gpu_budget=0.01), 6416)
    assert nothing_compacted(4096, by_budget) == Sentence(
        "HeteroCache compacts no prompt: prompts below 6416 tokens stay dense by gpu_budget=0.01 "
        "with 5 pages or more in every compressed head",
        "raise gpu_budget, lower sink_pages or recent_pages, or raise --max-model-len (4096)",
    )
    assert nothing_compacted(800, plan_of(HeteroCacheConfig(gpu_budget=1.0), 1024)) is None


def test_line_of_a_policy_that_frees_nothing_promises_nothing():
    config = HeteroCacheConfig(policy="quest", gpu_budget=0.3)
    assert steady_state_line(1001, 6000, plan_of(config, 1024)) == (
        "HeteroCache: policy quest frees no memory: 1,001 KV blocks keep 16,000 tokens, 2 requests "
        "of 6,000 tokens at once, as in stock vLLM. Each decode step reads gpu_budget=0.3 of a "
        "prompt; prompts below 1024 tokens are read whole."
    )
    everything = dataclasses.replace(config, gpu_budget=1.0)  # then every policy is policy full
    assert "requests of 6,000 tokens at once: 1 (stock: 2)" in steady_state_line(
        1001, 6000, plan_of(everything, 1024)
    )


def test_a_policy_that_frees_nothing_serves_as_many_as_stock_vllm():
    assert steady_state_requests(1001, 6000, 0.3, PAGE, frees_prompt=False) == (2, 2)
    assert steady_state_requests(376, 6000, 0.3, PAGE, frees_prompt=False) == (1, 1)
    assert steady_state_requests(375, 6000, 0.3, PAGE, frees_prompt=False) == (0, 0)


# --- blocks in the host pool ---


@pytest.fixture
def three_satellites() -> HeadAssignment:
    roles = np.array([[HeadRole.PIVOT, HeadRole.SATELLITE], [HeadRole.SATELLITE] * 2], np.int8)
    leaders = np.array([[-1, 0], [0, 0]], np.int32)
    return HeadAssignment(roles, leaders, np.array([[0, 1], [1, 1]], np.float32))


def test_satellites_are_counted(three_satellites):
    assert three_satellites.num_led == 3
    assert all_full(4, 3).num_led == 0


def test_automatic_size_is_what_is_wanted_where_memory_allows(three_satellites):
    config = HeteroCacheConfig()
    assert host_pool_blocks(config, three_satellites, 1000, PAGE_BYTES, 1 << 40) == 1000


def test_automatic_size_leaves_most_of_the_free_memory(three_satellites):
    available = 3 * 1001 * PAGE_BYTES
    blocks = host_pool_blocks(HeteroCacheConfig(), three_satellites, 10**6, PAGE_BYTES, available)
    assert blocks == 250 == int(1001 * MAX_HOST_SHARE)


# a block of three satellites takes 24 KiB
@pytest.mark.parametrize(("gib", "blocks"), [(1.0, 43690), (0.75, 32768), (3e-5, 1), (2e-5, 0)])
def test_a_size_in_gib_is_taken_literally(gib, blocks, three_satellites):
    config = HeteroCacheConfig(cpu_pool_gib=gib)
    assert host_pool_blocks(config, three_satellites, 7, PAGE_BYTES, 0) == blocks


@pytest.mark.parametrize("gib", [None, 4])
def test_without_satellites_or_without_retrieval_there_is_no_host_pool(gib, three_satellites):
    config = HeteroCacheConfig(cpu_pool_gib=gib)
    assert host_pool_blocks(config, all_full(2, 2), 1000, PAGE_BYTES, 1 << 40) == 0
    never = HeteroCacheConfig(cpu_pool_gib=gib, drift_threshold=0)
    assert host_pool_blocks(never, three_satellites, 1000, PAGE_BYTES, 1 << 40) == 0


def test_blocks_of_windows_are_counted_with_every_request():
    """6000 tokens: 375 blocks of 16, of which 113 stay, and of each window at most 90 blocks while
    the prompt is prefilled, 33 then."""
    windows = [OtherGroup(16, 512, 90)] * 2
    compacted = 1 + (1000 - (375 + 180 + 113)) // (113 + 66)
    stock = 1 + (1000 - (375 + 180)) // (375 + 66)
    assert steady_state_requests(1001, 6000, 0.3, PAGE, others=windows) == (compacted, stock)
    plan = plan_of(HeteroCacheConfig(gpu_budget=0.3, min_prompt_tokens=500), 528)
    assert steady_state_line(1001, 6000, plan, windows) == (
        "HeteroCache: gpu_budget=0.3 keeps about 33,613 prompt tokens in 1,001 KV blocks "
        "(stock vLLM: 13,605); requests of 6,000 tokens at once: 2 (stock: 2). "
        "Prompts below 528 tokens stay dense. Layers with a window of 512 tokens keep 66 more "
        "blocks a request."
    )


def test_a_drafters_blocks_are_counted_with_every_request():
    """6000 tokens: 375 blocks of 16, of which 113 stay, and 12 of 512."""
    drafter = [OtherGroup(512)]
    compacted = 1 + (1000 - (375 + 12 + 113)) // (113 + 12)
    found = steady_state_requests(1001, 6000, 0.3, PAGE, others=drafter)
    assert found == (compacted, 1000 // (375 + 12))
    found = steady_state_requests(1001, 6000, 0.3, PAGE, frees_prompt=False, others=drafter)
    assert found == (2, 2)
    plan = plan_of(HeteroCacheConfig(gpu_budget=0.3, min_prompt_tokens=500), 528)
    assert steady_state_line(1001, 6000, plan, drafter) == (
        "HeteroCache: gpu_budget=0.3 keeps about 48,301 prompt tokens in 1,001 KV blocks "
        "(stock vLLM: 15,515); requests of 6,000 tokens at once: 5 (stock: 2). "
        "Prompts below 528 tokens stay dense. A drafter's layers keep the whole KV, in a block for "
        "each 512 tokens."
    )
    quest = plan_of(HeteroCacheConfig(policy="quest", gpu_budget=0.3), 1024)
    line = steady_state_line(1001, 6000, quest, drafter)
    assert "keep 15,515 tokens, 2 requests" in line and line.endswith("for each 512 tokens.")


def test_blocks_of_several_pages_are_taken_and_kept_whole():
    """6000 tokens: 12 blocks of 528, of which 113 pages keep 4 and the partial one, and 3 groups of
    recurrent layers with 2 states each."""
    states = [OtherGroup(528, num_states=2)] * 3
    compacted, stock = 1 + (100 - (12 + 4 + 6)) // (4 + 1 + 6), 1 + (100 - 18) // 18
    found = steady_state_requests(101, 6000, 0.3, 528, others=states)
    assert found == (compacted, stock) == (8, 5)
    plan = plan_of(HeteroCacheConfig(gpu_budget=0.3, min_prompt_tokens=500), 528)
    assert steady_state_line(101, 6000, plan, states, 528) == (
        "HeteroCache: gpu_budget=0.3 keeps about 63,768 prompt tokens in 101 KV blocks "
        "(stock vLLM: 34,554); requests of 6,000 tokens at once: 8 (stock: 5). "
        "Prompts below 1056 tokens stay dense. Recurrent layers keep 6 more blocks a request."
    )
    assert nothing_compacted(1000, plan, 528) == Sentence(
        "HeteroCache compacts no prompt: prompts below 1056 tokens stay dense by gpu_budget=0.3, "
        "as shorter ones save none of their blocks of 528 tokens",
        "lower gpu_budget, or raise --max-model-len (1000)",
    )
    assert nothing_compacted(1056, plan, 528) is None
