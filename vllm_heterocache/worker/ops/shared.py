"""The operations on page tables, which both platforms do alike: with a kernel, or its reference."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_heterocache.kernels.step_select_ref import exact_step_select_ref
from vllm_heterocache.worker.ops.interface import Geometry, Memory


class TableOps:
    """See `ops.Ops`. A platform names its functions, as static methods, and their buffers."""

    page_select: Callable[..., None]
    page_gather: Callable[..., None]
    page_means: Callable[..., None]
    page_summaries: Callable[..., None]
    step_select: Callable[..., None]
    drift_check: Callable[..., None]
    retrieval_plan: Callable[..., None]
    flip_pages: Callable[..., None]

    def __init__(
        self,
        geometry: Geometry,
        memory: Memory,
        head_lse: torch.Tensor,
        plan_workspace: torch.Tensor | None,
    ) -> None:
        self.memory, self._geometry = memory, geometry
        self._head_lse, self._plan_workspace = head_lse, plan_workspace

    def select(self, scores, slot, dense_blocks, sink_pages, recent_pages, listed_pages):
        source = listed_pages.clone()
        memory = self.memory
        self.page_select(
            scores, memory.tables, memory.maps, slot, dense_blocks, sink_pages, recent_pages, source
        )
        return source

    def copy_pages(self, source, target) -> None:
        self.page_gather(self.memory.pool, source, self.memory.pool, target)

    def fill_means(self, slot, dense_blocks) -> None:
        self.page_means(self.memory.pool, self.memory.tables, slot, dense_blocks)

    def summarize(self, dense_blocks) -> None:
        memory, num_heads = self.memory, self.memory.maps.pivot_of_head.numel()
        self.page_summaries(memory.pool, dense_blocks, num_heads, memory.step.summaries)

    def select_by_summaries(self, query, rows, layer, sink_pages, recent_pages) -> None:
        tables, step = self.memory.tables, self.memory.step
        self.step_select(query, tables, step, rows, layer, sink_pages, recent_pages)

    def select_by_attention(self, query, rows, layer, sink_pages, recent_pages) -> None:
        exact_step_select_ref(
            query,
            self.memory.pool,
            self.memory.tables,
            rows,
            layer,
            self._geometry.scale,
            sink_pages,
            recent_pages,
        )

    def check_drift(
        self, slots, due, dirty, threshold, refresh_waves, max_pages, forced_share, seed
    ) -> None:
        self.drift_check(
            self.memory.tables,
            self.memory.maps,
            slots,
            due,
            self._head_lse,
            threshold,
            refresh_waves,
            max_pages,
            dirty,
            self.memory.counters,
            forced_share,
            seed,
        )

    def plan_retrieval(
        self, slots, due, dirty, spares, moves, sink_pages, recent_pages, rotation, max_pages
    ) -> None:
        self.retrieval_plan(
            self.memory.tables,
            self.memory.maps,
            slots,
            due,
            dirty,
            spares,
            moves,
            self.memory.counters,
            sink_pages,
            recent_pages,
            rotation,
            max_pages,
            self._plan_workspace,
        )

    def flip(self, moves, slots) -> None:
        self.flip_pages(self.memory.tables, moves, slots)
