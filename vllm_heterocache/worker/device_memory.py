"""Memory on the device that a worker needs beside the KV pool and its tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.kernels.page_scores import page_scores_workspace
from vllm_heterocache.worker.host.cuda_swap import STAGING_BYTES
from vllm_heterocache.worker.observe.reference_queries import reference_bytes, reference_positions
from vllm_heterocache.worker.observe.scoring_queries import queries_at_a_time
from vllm_heterocache.worker.stand_ins.centroids import merging_bytes
from vllm_heterocache.worker.stand_ins.matched_tokens import fitting_bytes

if TYPE_CHECKING:
    from vllm_heterocache.startup.serving_plan import ServingPlan
    from vllm_heterocache.worker.ops.interface import Geometry

# Beside staging: the moves of retrievals, and what compacting a prompt of usual length takes.
WORKING_BYTES = 96 << 20


def bytes_beside_pool(plan: ServingPlan, geometry: Geometry, max_model_len: int) -> int:
    """All of it."""
    num_scoring = plan.policy.scoring_queries(plan.config)
    needed = working_bytes(geometry, plan.config.gpu_budget, max_model_len, num_scoring)
    needed += observation_bytes(geometry, max_model_len)
    if plan.config.share_of_matched:
        needed += matching_bytes(geometry, plan.config.gpu_budget, max_model_len)
    if plan.policy.merged_chunk is not None:
        needed += merging_bytes(geometry, max_model_len, plan.policy.merged_chunk)
    return needed


def working_bytes(
    geometry: Geometry, gpu_budget: float, max_model_len: int, num_scoring: int = 1
) -> int:
    """Memory for pages on their way to the host, and for what a step takes for a moment: the
    compaction of the longest prompt, if that is more than WORKING_BYTES."""
    of_longest = compaction_bytes(geometry, gpu_budget, max_model_len, num_scoring)
    return STAGING_BYTES + max(WORKING_BYTES, of_longest)


def compaction_bytes(
    geometry: Geometry, gpu_budget: float, num_tokens: int, num_scoring: int = 1
) -> int:
    """Memory that compacting a prompt takes at most at a time: its page scores, and beside these
    what scoring takes, or its layers' scores one by one, or the numbers of the listed pages twice.

    Args:
        num_scoring: `Policy.scoring_queries`.
    """
    g = geometry
    heads = g.num_layers * g.num_kv_heads
    scores = 4 * heads * (num_tokens // PAGE_SIZE)
    at_a_time = queries_at_a_time(num_scoring, g.group)
    scoring = 4 * page_scores_workspace(num_tokens, g.num_kv_heads, g.group * at_a_time)
    if at_a_time < num_scoring:
        scoring += scores  # of the queries before
    if num_scoring > 1:  # all queries, and those that are scored as a kernel takes them
        scoring += reference_bytes(g, num_scoring + at_a_time)
    listed = 4 * heads * compact_blocks(num_tokens, gpu_budget)
    return scores + max(scores, scoring, 2 * listed)


def observation_bytes(geometry: Geometry, max_model_len: int) -> int:
    """Memory for the last queries, and for the masses of one window while a policy looks at it."""
    g = geometry
    queries = g.num_query_windows * g.window * math.prod(g.query_shape) * 4
    masses = g.num_q_heads * g.window * (max_model_len // PAGE_SIZE) * 4
    return queries + (2 * masses if g.window > 1 else 0)


def matching_bytes(geometry: Geometry, gpu_budget: float, max_model_len: int) -> int:
    """Memory for reference queries, and for what fitting a prompt's matched tokens takes."""
    references = reference_bytes(geometry, reference_positions(geometry))
    return references + fitting_bytes(geometry, gpu_budget, max_model_len)
