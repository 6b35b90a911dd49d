"""Per-step attention metadata: which rows prefill, which decode, and from which pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_heterocache.compat import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.tables import DecodeRows
from vllm_heterocache.worker.batch import Batch, KeptQueries, PrefillBatch

if TYPE_CHECKING:
    from vllm_heterocache.compat import VllmConfig
    from vllm_heterocache.worker.runtime import HeteroCacheRuntime


@dataclass(frozen=True)
class HeteroCacheMetadata(AttentionMetadata):
    """Built once a step, read by every layer. Decode rows come first."""

    decodes: DecodeRows | None
    prefills: PrefillBatch | None
    kept: list[KeptQueries]  # of prefill rows


class HeteroCacheMetadataBuilder(AttentionMetadataBuilder[HeteroCacheMetadata | None]):
    """One for all layers: it asks the runtime how each row is to be served.

    What a captured CUDA graph reads (DecodeRows) lies in buffers of the runtime and of vLLM that
    keep their addresses; `build` fills those of the runtime before every replay.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # decode rows first: those of one token, or of one and its drafts
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._max_queries = self.reorder_batch_threshold or 1
        layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
        self._layer = layers[layer_names[0]].impl
        self._kernel_blocks = KernelBlockTable(kv_cache_spec.block_size // PAGE_SIZE, device)

    @property
    def _runtime(self) -> HeteroCacheRuntime | None:
        return self._layer.runtime

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HeteroCacheMetadata | None:
        """None while there is no KV pool yet (vLLM measures the memory of CUDA graphs so)."""
        runtime = self._runtime
        if runtime is None:
            return None
        common = common_attn_metadata
        block_table = self._kernel_blocks.of(common.block_table_tensor, runtime.rows.max_rows)
        assert common.is_prefilling is not None
        query_lens, seq_lens = _host_lengths(common)
        num_decodes = _num_decodes(query_lens, self._max_queries)
        batch = Batch(
            query_lens,
            seq_lens,
            common.is_prefilling.numpy(),
            num_decodes,
            block_table,
            common.req_idx,
        )
        kept = runtime.begin_batch(batch)
        decodes = None
        if num_decodes:
            decodes = runtime.rows.decode_rows(
                block_table, common.seq_lens, common.query_start_loc, num_decodes
            )
        return HeteroCacheMetadata(
            decodes=decodes,
            prefills=_prefills(common, block_table, num_decodes, seq_lens),
            kept=kept,
        )


class KernelBlockTable:
    """Block tables in kernel blocks of PAGE_SIZE tokens, of vLLM's in blocks.

    Kernel block `i` of block `b` is `b * kernel_blocks + i`. A token's slot is the same number in
    both units.
    """

    def __init__(self, kernel_blocks: int, device: torch.device) -> None:
        """`kernel_blocks` are those of a block."""
        self._num = kernel_blocks
        self._within = torch.arange(kernel_blocks, dtype=torch.int32, device=device)
        self._tables: torch.Tensor | None = None  # at an address that CUDA graphs read

    def of(self, block_table: torch.Tensor, max_rows: int) -> torch.Tensor:
        """[num_rows, max_blocks * kernel_blocks] int32, valid until the next call.

        Args:
            block_table: [num_rows, max_blocks] int32; vLLM's are always as wide.
            max_rows: most rows of a batch.
        """
        if self._num == 1:
            return block_table
        num_rows, width = block_table.shape
        if self._tables is None:
            self._tables = block_table.new_empty(max_rows, width * self._num)
        table = self._tables[:num_rows]
        assert table.shape == (num_rows, width * self._num)
        blocks, out = block_table.unsqueeze(-1), table.view(num_rows, width, self._num)
        torch.add(self._within, blocks, alpha=self._num, out=out)
        return table


def _host_lengths(common: CommonAttentionMetadata) -> tuple[np.ndarray, np.ndarray]:
    """Query and sequence lengths [num_reqs] as the host knows them; padding has query length 0.

    Where drafts are verified while later steps are scheduled, the lengths of rows that decode are
    upper bounds. The device knows the right ones."""
    starts = common.query_start_loc_cpu.numpy()[: common.num_reqs + 1]
    query_lens = starts[1:] - starts[:-1]
    known = common.seq_lens_cpu_upper_bound
    assert known is not None
    seq_lens = np.zeros(common.num_reqs, np.int64)  # V2 gives no lengths for padding
    seq_lens[: known.shape[0]] = known.numpy()[: common.num_reqs]
    return query_lens, seq_lens


def _num_decodes(query_lens: np.ndarray, max_queries: int) -> int:
    """Leading rows of at most that many tokens; in a batch of nothing else also its padding."""
    if query_lens.max(initial=0) <= max_queries:
        return query_lens.size
    others = np.flatnonzero((query_lens > max_queries) | (query_lens == 0))
    return int(others[0])


def _prefills(
    common: CommonAttentionMetadata,
    block_table: torch.Tensor,
    num_decodes: int,
    seq_lens: np.ndarray,
) -> PrefillBatch | None:
    if num_decodes == common.num_reqs:
        return None
    starts = common.query_start_loc_cpu[num_decodes : common.num_reqs + 1].tolist()
    device_starts = common.query_start_loc[num_decodes : common.num_reqs + 1]
    return PrefillBatch(
        first_token=starts[0],
        starts=[start - starts[0] for start in starts],
        num_tokens=seq_lens[num_decodes:].tolist(),
        cu_seqlens=device_starts - starts[0],
        seq_lens=common.seq_lens[num_decodes : common.num_reqs],
        block_table=block_table[num_decodes : common.num_reqs],
    )
