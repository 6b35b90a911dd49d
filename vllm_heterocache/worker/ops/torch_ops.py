"""The operations in plain torch: the CPU platform runs the kernels' references."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_heterocache.kernels.dense_pages import gather_dense
from vllm_heterocache.kernels.drift_check_ref import drift_check_ref
from vllm_heterocache.kernels.exchange_pages_ref import exchange_pages_ref
from vllm_heterocache.kernels.find_pages_ref import find_pages_ref
from vllm_heterocache.kernels.flip_pages_ref import flip_pages_ref
from vllm_heterocache.kernels.hybrid_step_select_ref import hybrid_step_select_ref
from vllm_heterocache.kernels.kv_scales import to_elements
from vllm_heterocache.kernels.matched_tokens import REFERENCE
from vllm_heterocache.kernels.one_bit_step_select_ref import one_bit_step_select_ref
from vllm_heterocache.kernels.page_gather_ref import page_gather_ref
from vllm_heterocache.kernels.page_means_ref import page_means_ref
from vllm_heterocache.kernels.page_scores_ref import page_scores_ref
from vllm_heterocache.kernels.page_select_ref import page_select_ref
from vllm_heterocache.kernels.page_summaries_ref import page_summaries_ref
from vllm_heterocache.kernels.paged_decode_ref import paged_decode_ref
from vllm_heterocache.kernels.prefill_attention_ref import prefill_attention_ref
from vllm_heterocache.kernels.quantized_keys_ref import quantized_keys_ref
from vllm_heterocache.kernels.retrieval_moves_ref import retrieval_moves_ref
from vllm_heterocache.kernels.step_select_ref import step_select_ref
from vllm_heterocache.kernels.values import PAGE_SIZE
from vllm_heterocache.worker.ops.shared import TableOps

if TYPE_CHECKING:
    from vllm_heterocache.compat import AttentionLayer
    from vllm_heterocache.kernels.tables import DecodeRows, Moves
    from vllm_heterocache.kernels.values import DriftRule, Protected
    from vllm_heterocache.worker.batch import PrefillBatch
    from vllm_heterocache.worker.ops.interface import Geometry, Memory


class TorchOps(TableOps):
    """`ops.Ops` in plain torch, on any device that torch has; used on the CPU."""

    page_select = staticmethod(page_select_ref)
    page_gather = staticmethod(page_gather_ref)
    page_means = staticmethod(page_means_ref)
    page_summaries = staticmethod(page_summaries_ref)
    step_select = staticmethod(step_select_ref)
    one_bit_step_select = staticmethod(one_bit_step_select_ref)
    hybrid_step_select = staticmethod(hybrid_step_select_ref)
    quantized_keys = staticmethod(quantized_keys_ref)
    find_pages_by_keys = staticmethod(find_pages_ref)
    exchange_pages = staticmethod(exchange_pages_ref)
    match_kernels = REFERENCE

    def __init__(self, geometry: Geometry, memory: Memory) -> None:
        segments = geometry.max_rows * geometry.num_kv_heads
        head_lse = torch.zeros(geometry.num_layers, segments, geometry.group)
        super().__init__(geometry, memory, head_lse)

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        written = (slot_mapping >= 0).nonzero().flatten()
        token_slots = slot_mapping[written]
        key, value = key[: slot_mapping.shape[0]], value[: slot_mapping.shape[0]]
        if self.memory.kv_scales is not None:
            # vLLM's buffers hold one scale, or one for each KV head
            key = to_elements(key, layer._k_scale.expand(key.shape[1]), kv_cache.dtype)
            value = to_elements(value, layer._v_scale.expand(key.shape[1]), kv_cache.dtype)
        kv = torch.cat((key, value), dim=-1)
        kv_cache[token_slots // PAGE_SIZE, :, token_slots % PAGE_SIZE] = kv[written]

    def prefill(
        self,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: PrefillBatch,
        output: torch.Tensor,
    ) -> None:
        g, scales = self._geometry, self.memory.layer_scales(layer)
        for row, num_tokens in enumerate(batch.num_tokens):
            blocks = batch.block_table[row, : -(-num_tokens // PAGE_SIZE)]
            keys, values = gather_dense(kv_cache, blocks, num_tokens, scales)
            first = batch.first_token
            tokens = slice(first + batch.starts[row], first + batch.starts[row + 1])
            chunk = query[tokens]
            output[tokens] = prefill_attention_ref(
                chunk, keys, values, g.scale, self.memory.layer_sinks(layer), g.soft_cap
            )

    def split_decode(self, rows: DecodeRows) -> None:
        """Nothing to prepare."""

    def decode(
        self,
        query: torch.Tensor,
        rows: DecodeRows,
        layer: int,
        output: torch.Tensor,
        leads: bool,
    ) -> None:
        memory = self.memory
        paged_decode_ref(
            query,
            memory.pool,
            memory.tables,
            rows,
            layer,
            self._geometry.scale,
            output,
            memory.last_queries,
            memory.maps.pivot_of_head if leads else None,
            self._head_lse,
            memory.kv_scales,
            memory.sink_logits,
            self._geometry.soft_cap,
        )

    def score_prompt(
        self, queries: torch.Tensor, dense_blocks: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        g, memory = self._geometry, self.memory
        scores = torch.empty(g.num_layers, g.num_kv_heads, num_tokens // PAGE_SIZE)
        rows, sinks = self._query_rows(queries)
        page_scores_ref(
            rows, memory.pool, dense_blocks, num_tokens, g.scale, scores, memory.kv_scales, sinks,
            g.soft_cap,
        )  # fmt: skip
        return scores

    def check_drift(
        self,
        table_slots: torch.Tensor,
        waves_left: torch.Tensor,
        rule: DriftRule,
        max_pages: int,
    ) -> None:
        drift_check_ref(
            self.memory.tables,
            self.memory.maps,
            table_slots,
            self._head_lse,
            rule,
            max_pages,
            waves_left,
            self.memory.counters,
        )

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
        retrieval_moves_ref(
            self.memory.tables,
            self.memory.maps,
            table_slots,
            waves_left,
            spares,
            moves,
            self.memory.counters,
            protected,
            rotations,
            max_pages,
        )

    def flip(self, moves: Moves, table_slots: torch.Tensor) -> None:
        flip_pages_ref(self.memory.tables, moves, table_slots)
