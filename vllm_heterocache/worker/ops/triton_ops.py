"""The operations on CUDA: Triton kernels, FlashAttention for prefill, vLLM's own cache write."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from vllm_heterocache import compat
from vllm_heterocache.kernels.bounded_least_squares import bounded_least_squares
from vllm_heterocache.kernels.drift_check import drift_check_launch, page_launch
from vllm_heterocache.kernels.evicted_attention import evicted_attention
from vllm_heterocache.kernels.exchange_pages import exchange_pages
from vllm_heterocache.kernels.find_pages import find_pages, find_pages_workspace
from vllm_heterocache.kernels.flip_pages import flip_pages_launch
from vllm_heterocache.kernels.hybrid_step_select import hybrid_step_select
from vllm_heterocache.kernels.matched_tokens import MatchKernels
from vllm_heterocache.kernels.one_bit_step_select import one_bit_step_select
from vllm_heterocache.kernels.page_gather import page_gather
from vllm_heterocache.kernels.page_means import page_means
from vllm_heterocache.kernels.page_scores import page_scores, page_scores_workspace
from vllm_heterocache.kernels.page_select import page_select
from vllm_heterocache.kernels.page_summaries import page_summaries
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace, paged_decode, split_decode
from vllm_heterocache.kernels.quantized_keys import quantized_keys
from vllm_heterocache.kernels.retrieval_moves import (
    retrieval_moves_launches,
    retrieval_moves_workspace,
)
from vllm_heterocache.kernels.step_select import step_select
from vllm_heterocache.kernels.values import PAGE_SIZE
from vllm_heterocache.worker.ops.shared import TableOps

if TYPE_CHECKING:
    from vllm_heterocache.compat import AttentionLayer
    from vllm_heterocache.kernels.kv_scales import KVScales
    from vllm_heterocache.kernels.tables import DecodeRows, Moves
    from vllm_heterocache.kernels.values import DriftRule, Protected
    from vllm_heterocache.worker.batch import PrefillBatch
    from vllm_heterocache.worker.ops.interface import Geometry, Memory

# vLLM's names of fp8 caches
CACHE_DTYPES = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


class TritonOps(TableOps):
    """`ops.Ops` in Triton kernels, on CUDA."""

    page_select = staticmethod(page_select)
    page_gather = staticmethod(page_gather)
    page_means = staticmethod(page_means)
    page_summaries = staticmethod(page_summaries)
    step_select = staticmethod(step_select)
    one_bit_step_select = staticmethod(one_bit_step_select)
    hybrid_step_select = staticmethod(hybrid_step_select)
    quantized_keys = staticmethod(quantized_keys)
    match_kernels = MatchKernels(evicted_attention, bounded_least_squares)

    def __init__(self, geometry: Geometry, memory: Memory, workspace: DecodeWorkspace) -> None:
        super().__init__(geometry, memory, workspace.head_lse)
        self._workspace = workspace
        self._num_pivots = memory.maps.pivot_heads.numel()
        size = retrieval_moves_workspace(geometry.max_rows, memory.maps.satellite_heads.numel())
        self._moves_workspace = torch.empty(size, dtype=torch.int32, device=memory.pool.device)
        if memory.finders is not None:
            size = find_pages_workspace(geometry.max_rows, memory.finders, geometry.group)
            program_lse = torch.empty(size, dtype=torch.float32, device=memory.pool.device)
            self.find_pages_by_keys = partial(find_pages, program_lse=program_lse)
            self.exchange_pages = partial(exchange_pages, program_lse=program_lse)
        # by what differs between two of an operation, addresses included; all else is this object's
        self._launches: dict[tuple, Any] = {}

    @cached_property
    def _fa_version(self) -> int:
        g = self._geometry
        version = compat.get_flash_attn_version(
            head_size=g.head_dim,
            has_sinks=self.memory.sink_logits is not None,
            requires_softcap=bool(g.soft_cap),
        )
        assert version is not None, "no FlashAttention on this device"
        return version

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        dtype = CACHE_DTYPES.get(kv_cache.dtype, "auto")
        if self.memory.kv_scales is not None:
            kv_cache = kv_cache.view(torch.uint8)  # as vLLM's own backend gives it
        keys, values = _split(kv_cache)
        compat.reshape_and_cache_flash(
            key, value, keys, values, slot_mapping, dtype, layer._k_scale, layer._v_scale
        )

    def prefill(
        self,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: PrefillBatch,
        output: torch.Tensor,
    ) -> None:
        keys, values = _split(kv_cache)
        query = query[batch.tokens]
        descales: dict[str, Any] = {}
        if self.memory.kv_scales is not None:
            query, descales = self._as_fp8(
                query, self.memory.kv_scales, layer, len(batch.num_tokens)
            )
        compat.flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=output[batch.tokens],
            cu_seqlens_q=batch.cu_seqlens,
            max_seqlen_q=batch.max_query_len,
            seqused_k=batch.seq_lens,
            max_seqlen_k=batch.max_seq_len,
            softmax_scale=self._geometry.scale,
            softcap=self._geometry.soft_cap,
            s_aux=self.memory.layer_sinks(layer),
            causal=True,
            block_table=batch.block_table,
            fa_version=self._fa_version,
            **descales,
        )

    def _as_fp8(
        self, query: torch.Tensor, scales: KVScales, layer: int, num_rows: int
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """FlashAttention's arguments for an fp8 cache, as vLLM's own backend gives them.

        Its products take queries of the keys' dtype alone. Each KV head's queries have one scale.

        Args:
            query: [num_tokens, num_q_heads, head_dim].
        """
        g, of_query = self._geometry, scales.query[layer]
        columns = g.group * g.head_dim if of_query.numel() > 1 else -1
        elements, _ = compat.scaled_fp8_quant(query.flatten(1), of_query, group_shape=(-1, columns))
        shape = num_rows, g.num_kv_heads
        return elements.view(query.shape), {
            "q_descale": of_query.expand(shape),
            "k_descale": scales.key[layer].expand(shape),
            "v_descale": scales.value[layer].expand(shape),
        }

    def split_decode(self, rows: DecodeRows) -> None:
        split_decode(self.memory.tables, rows, self._workspace)

    def decode(
        self,
        query: torch.Tensor,
        rows: DecodeRows,
        layer: int,
        output: torch.Tensor,
        leads: bool,
    ) -> None:
        memory = self.memory
        paged_decode(
            query,
            memory.pool,
            memory.tables,
            rows,
            self._workspace,
            layer,
            self._geometry.scale,
            output,
            memory.last_queries,
            memory.maps.pivot_of_head if leads else None,
            kv_scales=memory.kv_scales,
            sink_logits=memory.sink_logits,
            soft_cap=self._geometry.soft_cap,
        )

    def score_prompt(
        self, queries: torch.Tensor, dense_blocks: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        g, memory, device = self._geometry, self.memory, dense_blocks.device
        rows, sinks = self._query_rows(queries)
        size = page_scores_workspace(num_tokens, g.num_kv_heads, g.group * queries.shape[0])
        workspace = torch.empty(size, dtype=torch.float32, device=device)
        shape = (g.num_layers, g.num_kv_heads, num_tokens // PAGE_SIZE)
        scores = torch.empty(shape, dtype=torch.float32, device=device)
        page_scores(
            rows,
            memory.pool,
            dense_blocks,
            num_tokens,
            g.scale,
            scores,
            workspace,
            kv_scales=memory.kv_scales,
            sink_logits=sinks,
            soft_cap=g.soft_cap,
        )
        return scores

    # Between two forward passes the host has little time, so what these launch is kept.

    def check_drift(
        self,
        table_slots: torch.Tensor,
        waves_left: torch.Tensor,
        rule: DriftRule,
        max_pages: int,
    ) -> None:
        addresses = table_slots.data_ptr(), waves_left.data_ptr()
        key = drift_check_launch, addresses, rule, page_launch(max_pages)
        launch = self._launches.get(key)
        if launch is None:
            memory = self.memory
            launch = self._launches[key] = drift_check_launch(
                memory.tables, memory.maps, table_slots, self._head_lse, rule, max_pages,
                waves_left, memory.counters,
            )  # fmt: skip
        launch(table_slots.shape[0], self._num_pivots)

    def list_moves(
        self,
        table_slots: torch.Tensor,
        waves_left: torch.Tensor,
        spares: torch.Tensor,
        moves: Moves,
        protected: Protected,
        rotations: torch.Tensor,
        max_pages: int,
    ) -> None:
        of_rows = table_slots.data_ptr(), spares.data_ptr(), rotations.data_ptr()
        addresses = *of_rows, waves_left.data_ptr(), moves.total.data_ptr()
        key = retrieval_moves_launches, addresses, protected, page_launch(max_pages)
        launches = self._launches.get(key)
        if launches is None:
            memory = self.memory
            launches = self._launches[key] = retrieval_moves_launches(
                memory.tables, memory.maps, table_slots, waves_left, spares, moves,
                memory.counters, protected, rotations, max_pages, self._moves_workspace,
            )  # fmt: skip
        launches(table_slots.shape[0])

    def flip(self, moves: Moves, table_slots: torch.Tensor) -> None:
        key = flip_pages_launch, moves.total.data_ptr(), table_slots.data_ptr()
        launch = self._launches.get(key)
        if launch is None:
            tables = self.memory.tables
            launch = self._launches[key] = flip_pages_launch(tables, moves, table_slots)
        launch()


def _split(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as FlashAttention takes them: views [num_blocks, page_size, H, head_dim]."""
    keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return keys, values
