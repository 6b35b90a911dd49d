"""From a user's options to the serving plan, one step after the other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_heterocache.calibration.profile_cache import resolve_profile
from vllm_heterocache.compat.engine import kv_heads_of_rank, layers_of_pp_rank, workers_per_host
from vllm_heterocache.compat.layer_kinds import mixes_recurrent_layers, served_layers
from vllm_heterocache.compat.platforms import (
    check_executor,
    check_platform,
    check_runner,
    fp8_prefill,
    platform_name,
)
from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.matched_tokens import default_share
from vllm_heterocache.heads.recipes import retrieval_score
from vllm_heterocache.policies import make_policy
from vllm_heterocache.policies.policy import Policy, Shard
from vllm_heterocache.startup.capacity import host_pool_blocks, page_bytes
from vllm_heterocache.startup.host_memory import available_host_bytes
from vllm_heterocache.startup.refusals.check import check_vllm_config
from vllm_heterocache.startup.refusals.connectors import check_connectors
from vllm_heterocache.startup.refusals.host_memory import check_host_memory, check_host_pool
from vllm_heterocache.startup.refusals.kv_cache_dtypes import check_fp8_prefill
from vllm_heterocache.startup.refusals.platforms import check_kernels, check_length, check_policy
from vllm_heterocache.startup.serving_plan import ServingPlan, serving_policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_heterocache.heads.assignment import HeadAssignment
    from vllm_heterocache.heads.profile import HeadProfile


def resolve(vllm_config: Any) -> ServingPlan:
    """Read the options, refuse what cannot be served, and decide everything else.

    Where no head profile of the model is cached, this calibrates, for minutes.

    Raises:
        ValueError: an option is wrong, infeasible or not supported together with another.
    """
    config, policy = read_options(vllm_config)
    profile = None
    if policy.needs_profile:
        profile = resolve_profile(config.profile, vllm_config)
    return make_plan(vllm_config, config, policy, profile)


def read_options(vllm_config: Any) -> tuple[HeteroCacheConfig, Policy]:
    """The user's options and the policy that serves them.

    Raises:
        ValueError: an option is wrong, or the engine's options, model or platform are not
            supported.
    """
    config = HeteroCacheConfig.from_additional_config(vllm_config.additional_config)
    check_platform()
    check_runner(vllm_config)
    check_executor(vllm_config)
    check_vllm_config(vllm_config)
    check_kernels(vllm_config, platform_name() or "")
    check_connectors(vllm_config, platform_name() or "")
    check_fp8_prefill(vllm_config, platform_name() or "", fp8_prefill)
    asked = make_policy(config)
    check_policy(vllm_config, asked, platform_name() or "")
    policy = serving_policy(config, asked)
    check_length(vllm_config, config, policy, platform_name() or "")
    return config, policy


def make_plan(
    vllm_config: Any, config: HeteroCacheConfig, policy: Policy, profile: HeadProfile | None
) -> ServingPlan:
    """The plan for an engine whose options were checked and whose profile is known.

    Raises:
        ValueError: the budget is under the floor of the policy, no prompt is long enough for the
            budget, the profile lacks what the policy needs, or a host pool is too small.
    """
    model = vllm_config.model_config
    assignments = assign_ranks(vllm_config, config, policy, profile)
    if config.leaves_share_of_matched:
        assert profile is not None
        share = share_of_matched(profile, shards(vllm_config), assignments)
        config = dataclasses.replace(config, matched_share=share)
    plan = ServingPlan.make(
        config,
        policy,
        assignments,
        model.max_model_len,
        workers_per_host(vllm_config.parallel_config),
        is_recurrent=mixes_recurrent_layers(model),
    )
    check_host_pools(vllm_config, plan)
    return plan


def assign_ranks(
    vllm_config: Any, config: HeteroCacheConfig, policy: Policy, profile: HeadProfile | None
) -> list[HeadAssignment]:
    """Roles on every tensor- and pipeline-parallel rank of an engine.

    Raises ValueError as `Policy.assign` does.
    """
    return [policy.assign(config, shard, profile) for shard in shards(vllm_config)]


def shards(vllm_config: Any) -> list[Shard]:
    """Heads of every rank, [pp_size * tp_size]."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    tp_size, pp_size = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    num_layers, num_kv_heads = len(served_layers(model)), model.get_total_num_kv_heads()
    return [
        Shard(
            layers_of_pp_rank(num_layers, pp_rank, pp_size),
            kv_heads_of_rank(num_kv_heads, tp_size, tp_rank),
            num_layers,
        )
        for pp_rank in range(pp_size)
        for tp_rank in range(tp_size)
    ]


def share_of_matched(
    profile: HeadProfile, shards: Sequence[Shard], assignments: Sequence[HeadAssignment]
) -> float:
    """`matched_share` of recipe "retrieval", the same on all ranks.

    Raises ValueError where the profile lacks the retrieval score of a head.
    """
    scores = retrieval_score(profile)
    is_whole = np.zeros(scores.shape, bool)
    for shard, assignment in zip(shards, assignments, strict=True):
        is_whole[np.ix_(shard.layers, shard.kv_heads)] |= assignment.full
    return default_share(scores, is_whole)


def check_host_pools(vllm_config: Any, plan: ServingPlan) -> None:
    """Raise ValueError unless every worker's host pool holds one request of max_model_len, and the
    host has memory for all of them."""
    if not plan.config.watches_drift:
        return
    model = vllm_config.model_config
    bytes_of_page = page_bytes(vllm_config, model.get_head_size())
    available = available_host_bytes() // plan.workers_per_host
    longest = model.max_model_len // PAGE_SIZE
    for assignment in plan.assignments:
        blocks = host_pool_blocks(plan.config, assignment, longest, bytes_of_page, available)
        block_bytes = assignment.num_led * bytes_of_page
        check_host_pool(blocks * block_bytes, longest * block_bytes, model.max_model_len)
    if any(assignment.num_led for assignment in plan.assignments):
        check_host_memory(plan.config.cpu_pool_gib, available)
