"""From options and profile to roles, prompt lengths and pools: what start-up decides."""

from __future__ import annotations

from typing import Any

import psutil

from vllm_heterocache.compat.engine import kv_heads_of_rank, layers_of_pp_rank, workers_per_host
from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment
from vllm_heterocache.heads.budget import smallest_prompt
from vllm_heterocache.policies import make_policy
from vllm_heterocache.policies.full import Full
from vllm_heterocache.policies.policy import ALL_QUERIES, Policy, Shard
from vllm_heterocache.startup.host_pool_size import host_pool_blocks, num_satellites
from vllm_heterocache.startup.refusals import check_host_pool


def serving_policy(config: HeteroCacheConfig) -> Policy:
    """The policy that is in force: with a budget of 1 there is nothing to choose.

    Raises ValueError as `make_policy` does.
    """
    policy = make_policy(config)
    return Full() if config.keeps_everything else policy


def recomputed_tokens(config: HeteroCacheConfig, max_model_len: int) -> int:
    """Last tokens of a prompt that must be computed though a prefix of it is cached: those whose
    queries the policy observes."""
    observed = serving_policy(config).observed_queries
    return max_model_len if observed == ALL_QUERIES else observed


def rank_assignment(config: HeteroCacheConfig, shard: Shard) -> HeadAssignment:
    """Roles of the heads of one tensor- and pipeline-parallel rank.

    Args:
        config: `profile_data` is set where the policy needs a profile (`needs_profile`).

    Raises:
        ValueError: the budget is under the floor of the policy, or the profile lacks what it
            needs.
    """
    return serving_policy(config).assign(config, shard)


def needs_profile(config: HeteroCacheConfig) -> bool:
    """Whether roles come from a head profile."""
    return serving_policy(config).needs_profile


def all_assignments(vllm_config: Any, config: HeteroCacheConfig) -> list[HeadAssignment]:
    """Roles on every tensor- and pipeline-parallel rank of an engine.

    Raises ValueError as `rank_assignment` does.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    tp_size, pp_size = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    num_layers, num_kv_heads = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads()
    return [
        rank_assignment(
            config,
            Shard(
                layers_of_pp_rank(num_layers, pp_rank, pp_size),
                kv_heads_of_rank(num_kv_heads, tp_size, tp_rank),
                num_layers,
            ),
        )
        for pp_rank in range(pp_size)
        for tp_rank in range(tp_size)
    ]


def compact_min_tokens(config: HeteroCacheConfig, assignments: list[HeadAssignment]) -> int:
    """Shortest prompt that is compacted: as asked for, and long enough for the budgets.

    Raises ValueError, naming gpu_budget, where no prompt is.
    """
    feasible = smallest_prompt(assignments, config.gpu_budget, config.min_pages)
    return max(config.min_prompt_tokens, feasible)


def check_host_pools(
    vllm_config: Any, config: HeteroCacheConfig, assignments: list[HeadAssignment]
) -> None:
    """Raise ValueError unless every worker's host pool holds one request of max_model_len."""
    if not config.watches_drift:
        return
    model = vllm_config.model_config
    page_bytes = PAGE_SIZE * 2 * model.get_head_size() * model.dtype.itemsize
    sharing = workers_per_host(vllm_config.parallel_config)
    available = psutil.virtual_memory().available // sharing
    longest = model.max_model_len // PAGE_SIZE
    for assignment in assignments:
        blocks = host_pool_blocks(config, assignment, longest, page_bytes, available)
        block_bytes = num_satellites(assignment) * page_bytes
        check_host_pool(blocks * block_bytes, longest * block_bytes, model.max_model_len)
