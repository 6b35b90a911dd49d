"""Per-step attention metadata: which rows prefill, which decode, and from which pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_heterocache.compat import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm_heterocache.kernels.paged_decode_ref import PageLists
from vllm_heterocache.request_state import Capture, CompactRequest
from vllm_heterocache.runtime import HeteroCacheRuntime, Row


@dataclass(frozen=True)
class PrefillRow:
    """A row of several tokens; its KV is dense."""

    tokens: slice  # of the batch
    num_tokens: int  # of the request, this chunk included
    blocks: torch.Tensor  # [ceil(num_tokens / page_size)] int32


@dataclass(frozen=True)
class HeteroCacheMetadata:
    """Built once a step, read by every layer."""

    prefills: list[PrefillRow]
    decode_tokens: torch.Tensor  # [num_decodes] int64, the batch's token of each decode row
    decode_slots: torch.Tensor  # [num_decodes] int64
    decode_block_table: torch.Tensor  # [num_decodes, max_blocks] int32
    decode_seq_lens: torch.Tensor  # [num_decodes] int32
    decode_tail_start: torch.Tensor  # [num_decodes] int32
    decode_requests: list[CompactRequest | None]
    captures: list[tuple[int, Capture]]  # last token of the row, where its query goes

    def page_lists(self, runtime: HeteroCacheRuntime, layer: int) -> PageLists:
        """The page lists of the decode rows in one layer."""
        table, slots = runtime.table, self.decode_slots
        start, count = table.start[slots, layer], table.count[slots, layer]
        return PageLists(table.entries, start, count, self.decode_tail_start)


class HeteroCacheMetadataBuilder(AttentionMetadataBuilder[HeteroCacheMetadata]):
    """One for all layers: it asks the runtime how each row is to be served."""

    _cudagraph_support = AttentionCGSupport.NEVER
    reorder_batch_threshold = 1

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self._runtime: HeteroCacheRuntime = layers[layer_names[0]].impl.runtime

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HeteroCacheMetadata:
        common = common_attn_metadata
        starts, seq_lens = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        spans = list(zip(starts, starts[1:], strict=False))[: common.num_reqs]
        rows = self._rows(common)
        for index, row in enumerate(rows):
            if row.capture is not None:
                assert seq_lens[index] == row.capture.order.num_tokens
                row.capture.dense_blocks = self._blocks(common, index, seq_lens[index]).clone()
        prefills = [
            PrefillRow(slice(*span), seq_lens[i], self._blocks(common, i, seq_lens[i]))
            for i, span in enumerate(spans)
            if span[1] - span[0] > 1
        ]
        decodes = [i for i, span in enumerate(spans) if span[1] - span[0] == 1]
        slots = torch.tensor([rows[i].slot for i in decodes], dtype=torch.int64)
        return HeteroCacheMetadata(
            prefills=prefills,
            decode_tokens=torch.tensor([starts[i] for i in decodes], dtype=torch.int64),
            decode_slots=slots,
            decode_block_table=common.block_table_tensor[decodes],
            decode_seq_lens=common.seq_lens[decodes],
            decode_tail_start=self._runtime.table.prompt_pages[slots],
            decode_requests=[rows[i].request for i in decodes],
            captures=[
                (end - 1, row.capture)
                for row, (_, end) in zip(rows, spans, strict=True)
                if row.capture is not None
            ],
        )

    def _rows(self, common: CommonAttentionMetadata) -> list[Row]:
        """How to serve each row; rows of profiling runs and padding are dense."""
        runtime = self._runtime
        request_ids = runtime.request_ids_of_batch(common.num_reqs)
        decoding = [not prefilling for prefilling in common.is_prefilling.tolist()]
        rows = runtime.rows(request_ids, decoding[: len(request_ids)])
        dense = Row(runtime.table.dense_slot, None, None)
        return rows + [dense] * (common.num_reqs - len(rows))

    def _blocks(self, common: CommonAttentionMetadata, index: int, num_tokens: int) -> torch.Tensor:
        """The blocks of a dense row: [ceil(num_tokens / page_size)] int32."""
        num_blocks = -(-num_tokens // self._runtime.config.page_size)
        return common.block_table_tensor[index, :num_blocks]
