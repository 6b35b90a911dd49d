"""The operations of the backend on one device, over tensors whose addresses never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_heterocache.kernels.kv_scales import KVScales
from vllm_heterocache.kernels.tables import (
    DecodeRows,
    FinderTables,
    HeadMaps,
    Moves,
    PageTables,
    StepTables,
)

if TYPE_CHECKING:
    from vllm_heterocache.compat import AttentionLayer
    from vllm_heterocache.kernels.matched_tokens import MatchKernels
    from vllm_heterocache.kernels.values import DriftRule, Protected
    from vllm_heterocache.worker.batch import PrefillBatch


@dataclass(frozen=True)
class Geometry:
    """Sizes of one rank's attention."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of the softmax
    dtype: torch.dtype  # of queries, and of keys and values on their way to the pool
    max_rows: int  # rows of a decode batch
    max_queries: int  # Q, of a row of a decode batch
    num_query_windows: int  # prompts whose last queries are kept at a time
    window: int = 1  # W, queries of a window
    soft_cap: float = 0.0  # of the logits, 0: none

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
    counters: torch.Tensor  # [3] int64, indexed by DriftCounter
    last_queries: torch.Tensor  # [num_query_windows * W, L, num_q_heads, head_dim]
    step: StepTables | None = None  # where pages are chosen by summaries at each step
    kv_scales: KVScales | None = None  # of an fp8 pool
    # [L, num_q_heads], of models whose heads have an attention sink: a logit without a value
    sink_logits: torch.Tensor | None = None
    finders: FinderTables | None = None  # where heads find their pages by quantised keys
    # [host blocks * num_satellites, page_size, 2 * head_dim] of the host pool
    host_pages: torch.Tensor | None = None

    def layer_scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scales of a layer's keys and of its values, [H] fp32 each; None but for an fp8 pool."""
        if self.kv_scales is None:
            return None
        return self.kv_scales.key[layer], self.kv_scales.value[layer]

    def layer_sinks(self, layer: int) -> torch.Tensor | None:
        """Logits of the sinks of a layer's query heads, [num_q_heads]; None: they have none."""
        return None if self.sink_logits is None else self.sink_logits[layer]


class Ops(Protocol):
    """One implementation a platform; kernels/README.md specifies what each operation computes.

    Letters: S table slots, L layers, H KV heads, P full pages of a prompt, R rows of a batch. All
    tensors are on the device of `memory.pool`. No operation but `select_by_attention` waits for the
    device.

    Args of several operations:
        table_slot: a request's place in the page table, 0 <= table_slot < S.
        table_slots: [R] int32, table slot of each row of a decode batch, -1 where the row is to
            be left alone.
        dense_blocks: [at least P] int32, ids of the blocks that hold a prompt.
        protected: pages that come before all others.
        layer: index among this rank's layers, 0 <= layer < L.
        waves_left: [S + 1, num_pivots] int32, retrievals in which the satellites of a pivot still
            take part.
        max_pages: most full prompt pages of a request of the batch.
    """

    memory: Memory
    match_kernels: MatchKernels  # of the fit of matched tokens

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the K and V of new tokens.

        Args:
            layer: vLLM's attention layer.
            key, value: [num_tokens, H, head_dim].
            kv_cache: [num_blocks, H, page_size, 2 * head_dim] of the layer, in the pool's dtype.
            slot_mapping: [num_tokens] int64 token slots, -1 for padding.
        """

    def prefill(
        self,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: PrefillBatch,
        output: torch.Tensor,
    ) -> None:
        """Causal attention of the batch's prefill rows over their dense blocks.

        Args:
            query: [num_tokens, num_q_heads, head_dim] of the whole batch.
            kv_cache: [num_blocks, H, page_size, 2 * head_dim] of the layer, in the pool's dtype.
            output: [num_tokens, num_q_heads, head_dim], written at the prefill rows' tokens.
        """

    def split_decode(self, rows: DecodeRows) -> None:
        """Divide the step's decode attention among programs, before the first layer's `decode`."""

    def decode(
        self,
        query: torch.Tensor,
        rows: DecodeRows,
        layer: int,
        output: torch.Tensor,
        leads: bool,
    ) -> None:
        """Decode attention of one layer.

        Args:
            query: [num_queries, num_q_heads, head_dim], those of a row behind one another.
            output: [num_queries, num_q_heads, head_dim], written.
            leads: whether a head of the layer leads others. The page scores of such heads are
                written in the rows that are due.
        """

    def score_prompt(
        self, queries: torch.Tensor, dense_blocks: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        """Page scores of a dense prompt, the largest of some queries behind it.

        Args:
            queries: [n, L, num_q_heads, head_dim].
            num_tokens: tokens of the prompt, the partial last page included.

        Returns:
            [L, H, P] fp32.
        """

    def select(
        self,
        scores: torch.Tensor,
        table_slot: int,
        dense_blocks: torch.Tensor,
        protected: Protected,
        listed_pages: torch.Tensor,
    ) -> torch.Tensor:
        """Choose the pages of all lists of a request.

        Args:
            scores: [L, H, P] fp32, not negative.
            listed_pages: [num_listed] int32, pages of the request's lists and mean pages.

        Returns:
            [num_listed] int32, the dense page that each listed page is to hold. A mean page has
            none: its place holds the mean page itself.
        """

    def copy_pages(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy pages within the pool.

        Args:
            source, target: [n] int32 page ids; no page is both.
        """

    def fill_means(self, table_slot: int, dense_blocks: torch.Tensor) -> None:
        """Fill the mean pages of a request whose lists are chosen."""

    def quantize_keys(self, table_slot: int, dense_blocks: torch.Tensor) -> None:
        """Note the quantised keys of a prompt's full blocks [P] int32 for every finder; needs
        `memory.finders`."""

    def find_pages(
        self, query: torch.Tensor, rows: DecodeRows, layer: int, protected: Protected
    ) -> None:
        """Fetch, in the rows that are due, the pages that the finders of one layer attend to,
        before the layer's `decode`; needs `memory.finders` and `memory.host_pages`. As `decode`,
        it may be captured in a CUDA graph.

        Args:
            query: [R, num_q_heads, head_dim].
        """

    def summarize(self, dense_blocks: torch.Tensor) -> None:
        """Summarize all pages of full blocks [n] int32, with the bits of their keys if
        `memory.step` has room for these; needs `memory.step`."""

    def select_by_summaries(
        self, query: torch.Tensor, rows: DecodeRows, layer: int, protected: Protected
    ) -> None:
        """Choose one layer's lists by the bounds that summaries put on this step's logits; needs
        `memory.step`. As `decode`, it may be captured in a CUDA graph.

        Args:
            query: [R, num_q_heads, head_dim].
        """

    def select_by_bits(
        self, query: torch.Tensor, rows: DecodeRows, layer: int, protected: Protected
    ) -> None:
        """Choose one layer's lists by this step's logits on one-bit keys; needs
        `memory.step.bits`. As `decode`, it may be captured in a CUDA graph.

        Args:
            query: [R, num_q_heads, head_dim].
        """

    def select_among_kept(
        self,
        query: torch.Tensor,
        rows: DecodeRows,
        layer: int,
        protected: Protected,
        channel_share: float,
    ) -> None:
        """Choose one layer's lists among the pages that heads keep, by attention on their
        summaries; needs `memory.step` and `tables.idle_pages`. As `decode`, it may be captured in
        a CUDA graph.

        Args:
            query: [R, num_q_heads, head_dim].
            channel_share: share of the channels that is looked at, (0, 1].
        """

    def select_by_attention(
        self, query: torch.Tensor, rows: DecodeRows, layer: int, protected: Protected
    ) -> None:
        """Choose one layer's lists by this step's exact attention. It waits for the device.

        Args:
            query: [R, num_q_heads, head_dim].
        """

    def check_drift(
        self,
        table_slots: torch.Tensor,
        waves_left: torch.Tensor,
        rule: DriftRule,
        max_pages: int,
    ) -> None:
        """Score the pages of the leading pivots, and note the clusters that drifted."""

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
        """List the moves of the satellites whose cluster drifted.

        Args:
            spares: [R, 2] int32, of each row the first spare entry that this retrieval may use,
                relative to the request's first entry, and how many from there on; over all rows
                as many as `moves` has room for.
            moves: written.
            rotations: [R] int32 >= 0, changes from one retrieval of a request to the next; it
                decides which satellite goes short.
        """

    def flip(self, moves: Moves, table_slots: torch.Tensor) -> None:
        """Make the retrieved pages of some rows visible; the others have table slot -1."""
