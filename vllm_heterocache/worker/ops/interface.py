"""The operations of the backend on one device, over tensors whose addresses never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_heterocache.kernels.paged_decode_ref import DecodeRows
from vllm_heterocache.kernels.tables import HeadMaps, Moves, PageTables, StepTables

if TYPE_CHECKING:
    from vllm_heterocache.worker.batch import PrefillBatch


@dataclass(frozen=True)
class Geometry:
    """Sizes of one rank's attention."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of the softmax
    max_rows: int  # rows of a decode batch
    max_captures: int  # prompts whose last queries are kept at a time
    window: int = 1  # W, last queries kept of each

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def query_shape(self) -> tuple[int, int, int]:
        """Of one token's query in all layers."""
        return self.num_layers, self.num_q_heads, self.head_dim


@dataclass(frozen=True)
class Memory:
    """What the operations read and write."""

    pool: torch.Tensor  # [num_pages, page_size, 2 * head_dim], the packed pool as pages
    tables: PageTables
    maps: HeadMaps
    counters: torch.Tensor  # [4] int64: checks, triggers, pages fetched
    last_queries: torch.Tensor  # [max_captures * W, L, num_q_heads, head_dim]
    step: StepTables | None = None  # where pages are chosen by summaries at each step


class Ops(Protocol):
    """One implementation a platform; kernels/README.md specifies what each operation computes."""

    memory: Memory

    def write_kv(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write new tokens' K and V [num_tokens, H, head_dim] to their slots; -1 is padding."""

    def prefill(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: PrefillBatch,
        output: torch.Tensor,
    ) -> None:
        """Causal attention of the batch's prefill rows over their dense blocks."""

    def plan_decode(self, rows: DecodeRows) -> None:
        """Once a step, before the first layer's `decode`."""

    def decode(
        self,
        query: torch.Tensor,
        rows: DecodeRows,
        layer: int,
        output: torch.Tensor,
        due_pivot: torch.Tensor | None,
    ) -> None:
        """Decode attention of one layer; `due_pivot` is None where no head of it ever leads."""

    def score_prompt(self, query: int, dense_blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Page scores [L, H, P] fp32 of a dense prompt, by `last_queries[query]`."""

    def select(
        self,
        scores: torch.Tensor,
        slot: int,
        dense_blocks: torch.Tensor,
        sink_pages: int,
        recent_pages: int,
        listed_pages: torch.Tensor,
    ) -> torch.Tensor:
        """Fill the slot's lists, whose pages are `listed_pages`; returns the dense page
        [num_listed] int32 of each. A mean page has none: it is returned itself."""

    def copy_pages(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy pages [n] within the pool."""

    def fill_means(self, slot: int, dense_blocks: torch.Tensor) -> None:
        """Fill the slot's mean pages from the prompt's blocks; its lists are chosen."""

    def summarize(self, dense_blocks: torch.Tensor) -> None:
        """Summarize all pages of full blocks [n] int32; needs `memory.step`."""

    def select_by_summaries(
        self,
        query: torch.Tensor,
        rows: DecodeRows,
        layer: int,
        sink_pages: int,
        recent_pages: int,
    ) -> None:
        """Fill the lists of one layer by the bounds that summaries put on this step's logits;
        needs `memory.step`. As `decode`, it may be captured in a CUDA graph."""

    def select_by_attention(
        self,
        query: torch.Tensor,
        rows: DecodeRows,
        layer: int,
        sink_pages: int,
        recent_pages: int,
    ) -> None:
        """Fill the lists of one layer by this step's exact attention. It waits for the device."""

    def check_drift(
        self,
        slots: torch.Tensor,
        due: torch.Tensor,
        dirty: torch.Tensor,
        threshold: float,
        refresh_waves: int,
        max_pages: int,
        forced_share: float,
        seed: int,
    ) -> None:
        """Score the pages of the due pivots and mark the clusters that drifted."""

    def plan_retrieval(
        self,
        slots: torch.Tensor,
        due: torch.Tensor,
        dirty: torch.Tensor,
        spares: torch.Tensor,
        moves: Moves,
        sink_pages: int,
        recent_pages: int,
        rotation: int,
        max_pages: int,
    ) -> None:
        """Plan the moves of the due satellites whose cluster drifted."""

    def flip(self, moves: Moves, slots: torch.Tensor) -> None:
        """Make retrieved pages visible."""
