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
        table, slots = runtime.table, self.decode_slots
        return PageLists(
            table.entries, table.start[slots, layer], table.count[slots, layer],
            self.decode_tail_start,
        )  # fmt: skip


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
        runtime = self._runtime
        page_size = runtime.config.page_size
        starts = common.query_start_loc_cpu.tolist()
        seq_lens = common.seq_lens.tolist()
        request_ids = runtime.request_ids_of_batch(common.num_reqs)
        decoding = [not prefilling for prefilling in common.is_prefilling.tolist()]
        rows = runtime.rows(request_ids, decoding[: len(request_ids)])
        dense = Row(runtime.table.dense_slot, None, None)
        rows += [dense] * (common.num_reqs - len(rows))  # profiling and padded rows
        prefills, decodes, captures = [], [], []
        for index, row in enumerate(rows):
            begin, end = starts[index], starts[index + 1]
            if row.capture is not None:
                assert seq_lens[index] == row.capture.order.num_tokens
                used = -(-seq_lens[index] // page_size)
                row.capture.dense_blocks = common.block_table_tensor[index, :used].clone()
                captures.append((end - 1, row.capture))
            if end - begin == 1:
                decodes.append(index)
            elif end > begin:
                used = -(-seq_lens[index] // page_size)
                blocks = common.block_table_tensor[index, :used]
                prefills.append(PrefillRow(slice(begin, end), seq_lens[index], blocks))
        slots = torch.tensor([rows[i].slot for i in decodes], dtype=torch.int64)
        return HeteroCacheMetadata(
            prefills=prefills,
            decode_tokens=torch.tensor([starts[i] for i in decodes], dtype=torch.int64),
            decode_slots=slots,
            decode_block_table=common.block_table_tensor[decodes],
            decode_seq_lens=common.seq_lens[decodes],
            decode_tail_start=runtime.table.prompt_pages[slots],
            decode_requests=[rows[i].request for i in decodes],
            captures=captures,
        )
