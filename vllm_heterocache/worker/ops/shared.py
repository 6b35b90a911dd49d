"""The operations on page tables, which both platforms do alike: with a kernel, or its reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.kernels.one_bit_step_select_ref import page_bits_ref
from vllm_heterocache.kernels.step_select_ref import exact_step_select_ref

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from vllm_heterocache.kernels.tables import DecodeRows
    from vllm_heterocache.kernels.values import Protected
    from vllm_heterocache.worker.ops.interface import Geometry, Memory


class TableOps:
    """The operations of `ops.Ops` that read and write page tables.

    A platform names its functions, as static methods, and their buffers.
    """

    page_select: Callable[..., None]
    page_gather: Callable[..., None]
    page_means: Callable[..., None]
    page_summaries: Callable[..., None]
    step_select: Callable[..., None]
    one_bit_step_select: Callable[..., None]
    hybrid_step_select: Callable[..., None]
    quantized_keys: Callable[..., None]
    find_pages_by_keys: Callable[..., None]
    exchange_pages: Callable[..., None]

    def __init__(
        self,
        geometry: Geometry,
        memory: Memory,
        head_lse: torch.Tensor,
    ) -> None:
        """
        Args:
            head_lse: [L, max_rows * H, G] fp32, log-sum-exps of scored heads that `decode` leaves.
        """
        self.memory, self._geometry, self._head_lse = memory, geometry, head_lse

    def _query_rows(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries of n tokens as rows of KV heads, those of a query head behind one another.

        Args:
            queries: [n, L, num_q_heads, head_dim].

        Returns:
            [L, num_q_heads * n, head_dim], and the sinks of these rows [L, num_q_heads * n].
        """
        sinks = self.memory.sink_logits
        if sinks is not None:
            sinks = sinks.repeat_interleave(queries.shape[0], dim=1)
        return queries.permute(1, 2, 0, 3).flatten(1, 2).contiguous(), sinks

    def select(
        self,
        scores: torch.Tensor,
        table_slot: int,
        dense_blocks: torch.Tensor,
        protected: Protected,
        listed_pages: torch.Tensor,
    ) -> torch.Tensor:
        source, memory = listed_pages.clone(), self.memory
        self.page_select(
            scores, memory.tables, memory.maps, table_slot, dense_blocks, protected, source
        )
        return source

    def copy_pages(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.page_gather(self.memory.pool, source, self.memory.pool, target)

    def fill_means(self, table_slot: int, dense_blocks: torch.Tensor) -> None:
        self.page_means(self.memory.pool, self.memory.tables, table_slot, dense_blocks)

    def quantize_keys(self, table_slot: int, dense_blocks: torch.Tensor) -> None:
        memory = self.memory
        self.quantized_keys(memory.pool, memory.tables, memory.finders, table_slot, dense_blocks)

    def find_pages(
        self, query: torch.Tensor, rows: DecodeRows, layer: int, protected: Protected
    ) -> None:
        memory, g = self.memory, self._geometry
        self.find_pages_by_keys(
            query, memory.tables, memory.finders, rows, layer, g.scale, memory.kv_scales, g.soft_cap
        )
        self.exchange_pages(
            memory.pool, memory.host_pages, memory.tables, memory.finders, rows, layer, protected,
            memory.counters,
        )  # fmt: skip

    def summarize(self, dense_blocks: torch.Tensor) -> None:
        memory, num_heads = self.memory, self.memory.maps.pivot_of_head.numel()
        assert memory.step is not None
        self.page_summaries(memory.pool, dense_blocks, num_heads, memory.step.summaries)
        if memory.step.bits is not None:
            page_bits_ref(memory.pool, dense_blocks, num_heads, memory.step)

    def select_by_summaries(
        self, query: torch.Tensor, rows: DecodeRows, layer: int, protected: Protected
    ) -> None:
        self.step_select(query, self.memory.tables, self.memory.step, rows, layer, protected)

    def select_by_bits(
        self, query: torch.Tensor, rows: DecodeRows, layer: int, protected: Protected
    ) -> None:
        self.one_bit_step_select(
            query, self.memory.tables, self.memory.step, rows, layer, protected
        )

    def select_among_kept(
        self,
        query: torch.Tensor,
        rows: DecodeRows,
        layer: int,
        protected: Protected,
        channel_share: float,
    ) -> None:
        memory = self.memory
        self.hybrid_step_select(
            query, memory.tables, memory.step, rows, layer, self._geometry.scale, protected,
            channel_share, memory.kv_scales,
        )  # fmt: skip

    def select_by_attention(
        self, query: torch.Tensor, rows: DecodeRows, layer: int, protected: Protected
    ) -> None:
        memory, g = self.memory, self._geometry
        exact_step_select_ref(
            query, memory.pool, memory.tables, rows, layer, g.scale, protected, memory.kv_scales,
            memory.sink_logits, g.soft_cap,
        )  # fmt: skip
