"""The one place where a worker's parts are put together, in the engine and in the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.evicted_means import layers_with_means
from vllm_heterocache.kernels.tables import HeadMaps, drift_counters
from vllm_heterocache.metrics import Counters
from vllm_heterocache.policies.policy import ALL_QUERIES
from vllm_heterocache.worker.answers import Answers
from vllm_heterocache.worker.compaction import PromptCompactor
from vllm_heterocache.worker.finding import Finding
from vllm_heterocache.worker.host.host_copies import HostCopies
from vllm_heterocache.worker.host.host_pool import HostPool
from vllm_heterocache.worker.host.swap import SwapManager
from vllm_heterocache.worker.observe.prompt_observer import PromptObserver
from vllm_heterocache.worker.observe.reference_queries import ReferenceQueries
from vllm_heterocache.worker.ops.interface import Geometry, Memory, Ops
from vllm_heterocache.worker.retrieval import Retriever
from vllm_heterocache.worker.row_buffers import RowBuffers
from vllm_heterocache.worker.row_counter import RowCounter
from vllm_heterocache.worker.runtime import HeteroCacheRuntime
from vllm_heterocache.worker.stand_ins.centroids import CentroidsFiller
from vllm_heterocache.worker.stand_ins.matched_tokens import MatchedTokensFiller
from vllm_heterocache.worker.step_selection import StepSelection, step_tables
from vllm_heterocache.worker.tables.page_table import PageTable

if TYPE_CHECKING:
    from vllm_heterocache.compat.engine import RequestIdsReader
    from vllm_heterocache.kernels.kv_scales import KVScales
    from vllm_heterocache.worker.observe.moved_queries import MoveQueries
    from vllm_heterocache.worker.rank import Rank

MakeOps = Callable[[Geometry, Memory], Ops]
MakeSwap = Callable[[torch.Tensor, HostPool, HeadMaps], SwapManager]


def assemble_runtime(
    rank: Rank,
    pool: torch.Tensor,
    num_blocks: int,
    host_blocks: int,
    make_ops: MakeOps,
    make_swap: MakeSwap,
    request_ids: RequestIdsReader,
    kv_scales: KVScales | None = None,
    move_queries: MoveQueries | None = None,
    sink_logits: torch.Tensor | None = None,
) -> HeteroCacheRuntime:
    """A runtime over an empty KV pool.

    Args:
        pool: [num_blocks * L * H, page_size, 2 * head_dim], the packed KV pool as pages.
        host_blocks: blocks of the host pool, each a page of every satellite.
        make_ops: the platform's operations over these sizes and this memory.
        make_swap: what moves pages between the pool and the host on this platform.
        request_ids: tells the requests of the batch whose metadata is being built.
        kv_scales: of an fp8 pool.
        move_queries: for matched tokens; None where the model's rotations are not known.
        sink_logits: [L, num_q_heads], of models whose heads have attention sinks.
    """
    config, policy, geometry = rank.plan.config, rank.plan.policy, rank.geometry
    counters, device = Counters(), pool.device
    table = _page_table(rank, num_blocks, device)
    host_pool = HostPool(
        host_blocks,
        rank.maps.satellite_heads.numel(),
        PAGE_SIZE,
        geometry.head_dim,
        pool.dtype,
    )
    memory = _memory(rank, pool, num_blocks, host_pool, table, kv_scales, sink_logits)
    ops = make_ops(geometry, memory)
    swap = make_swap(pool, host_pool, rank.maps)
    step_selection = references = None
    if policy.step_selection:
        step_selection = StepSelection(policy, config.protected, rank.assignment, ops)
    if config.share_of_matched:
        references = ReferenceQueries(geometry, device, can_move=move_queries is not None)
    return HeteroCacheRuntime(
        rank=rank,
        num_blocks=num_blocks,
        table=table,
        ops=ops,
        host_pool=host_pool,
        swap=swap,
        host_copies=HostCopies(host_pool, swap, counters),
        observer=PromptObserver(
            geometry, ops.memory, policy.observed_queries == ALL_QUERIES, references
        ),
        step_selection=step_selection,
        compactor=_compactor(rank, table, ops, step_selection, move_queries),
        retriever=_retriever(rank, table, ops, swap),
        rows=RowBuffers(geometry.max_rows, geometry.max_queries, rank.staging_depth, device),
        counters=counters,
        row_counter=RowCounter(counters, table, rank.assignment, policy),
        answers=Answers(),
        request_ids=request_ids,
    )


def _retriever(rank: Rank, table: PageTable, ops: Ops, swap: SwapManager) -> Retriever | Finding:
    config = rank.plan.config
    if rank.assignment.finders.size:
        return Finding(config, rank.maps, ops, swap)
    return Retriever(
        config, rank.maps, table, ops, swap, rank.geometry.max_rows, rank.staging_depth
    )


def _page_table(rank: Rank, num_blocks: int, device: torch.device) -> PageTable:
    config, policy = rank.plan.config, rank.plan.policy
    return PageTable(
        rank.max_num_seqs,
        num_blocks,
        rank.maps,
        rank.geometry.group,
        config.gpu_budget,
        device,
        has_stand_ins=config.keeps_means or policy.biased_share(config) > 0,
        biased_share=policy.biased_share(config),
        has_idle_pages=policy.step_selection is not None and policy.frees_prompt,
        keys=rank.finder_keys,
    )


def _compactor(
    rank: Rank,
    table: PageTable,
    ops: Ops,
    step_selection: StepSelection | None,
    move_queries: MoveQueries | None,
) -> PromptCompactor:
    config, policy, geometry = rank.plan.config, rank.plan.policy, rank.geometry
    matched_tokens = centroids = None
    if config.share_of_matched:
        has_means = layers_with_means(rank.layer_ids, rank.model_layers)
        has_means &= config.mixes_means
        matched_tokens = MatchedTokensFiller(
            geometry, ops.memory, table, has_means, move_queries, ops.match_kernels
        )
    if policy.merged_chunk is not None:
        centroids = CentroidsFiller(geometry, ops.memory, table, policy.merged_chunk)
    return PromptCompactor(
        config,
        policy,
        rank.assignment,
        geometry,
        rank.layer_ids,
        rank.model_layers,
        table,
        ops,
        step_selection,
        matched_tokens,
        centroids,
        move_queries,
    )


def _memory(
    rank: Rank,
    pool: torch.Tensor,
    num_blocks: int,
    host_pool: HostPool,
    table: PageTable,
    kv_scales: KVScales | None,
    sink_logits: torch.Tensor | None,
) -> Memory:
    geometry = rank.geometry
    num_queries = geometry.num_query_windows * geometry.window
    gpu_budget = rank.plan.config.gpu_budget
    return Memory(
        pool,
        table.tensors,
        rank.maps,
        counters=drift_counters(pool.device),
        last_queries=pool.new_zeros(num_queries, *geometry.query_shape, dtype=geometry.dtype),
        step=step_tables(rank.plan.policy, pool, num_blocks, geometry, gpu_budget),
        kv_scales=kv_scales,
        sink_logits=sink_logits,
        finders=table.finders,
        host_pages=host_pool.pages,
    )
