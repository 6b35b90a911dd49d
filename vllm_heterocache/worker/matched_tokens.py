"""Worker side: what a prompt's evicted tokens leave behind, fitted and written to its pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.matched_tokens import MOST_PAGES
from vllm_heterocache.kernels.kv_scales import logit_scales
from vllm_heterocache.kernels.matched_tokens import (
    BLOCK_ELEMENTS,
    MatchedTokens,
    fit_elements,
    match_tokens,
)
from vllm_heterocache.kernels.paged_decode_ref import LOG2_E
from vllm_heterocache.kernels.tables import layer_page_ids
from vllm_heterocache.worker.observe.moved_queries import MoveQueries, distances_behind
from vllm_heterocache.worker.observe.page_mass import by_kv_head
from vllm_heterocache.worker.observe.reference_queries import MAX_POSITIONS
from vllm_heterocache.worker.tables.upload import upload

if TYPE_CHECKING:
    from vllm_heterocache.worker.ops.interface import Geometry, Memory
    from vllm_heterocache.worker.requests import References
    from vllm_heterocache.worker.tables.page_table import PageTable

# Bytes of the K and V that are read at a time, and of the fit to them, but for those of one head.
MOST_BYTES = 512 << 20


def fitting_bytes(geometry: Geometry, num_tokens: int) -> int:
    """Memory that fitting the matched tokens of a prompt takes at most at a time."""
    of_head = head_bytes(geometry, num_tokens, MOST_PAGES * PAGE_SIZE)
    return max(MOST_BYTES, of_head) + 3 * 4 * BLOCK_ELEMENTS


def head_bytes(geometry: Geometry, num_tokens: int, num_matched: int) -> int:
    """Memory for the K and V of a head, and for the fit of its matched tokens."""
    g = geometry
    fit = fit_elements(MAX_POSITIONS * g.group, g.head_dim, num_matched)
    return num_tokens * 2 * g.head_dim * g.dtype.itemsize + 4 * fit


class MatchedTokensFiller:
    """Fills the stand-in pages of a compacted prompt with matched tokens.

    All of it is enqueued; nothing waits for the device, whose tables alone know which pages were
    evicted.
    """

    def __init__(
        self,
        geometry: Geometry,
        memory: Memory,
        table: PageTable,
        move_queries: MoveQueries | None,
    ) -> None:
        """
        Args:
            move_queries: moves queries behind the prompt; None: they stay as they are.
        """
        self._geometry, self._memory, self._table = geometry, memory, table
        self._move_queries = move_queries

    def fill(self, table_slot: int, dense_blocks: torch.Tensor, references: References) -> None:
        """Fit and write the matched tokens of all heads.

        Args:
            table_slot: of the request, whose lists are chosen.
            dense_blocks: [P] int32, blocks of the prompt's full pages.
            references: queries of the prompt.
        """
        num_matched = self._table.extents[table_slot].stand_in_pages * PAGE_SIZE
        is_evicted, distances = self._evicted_pages(table_slot), distances_behind(references)
        for layer in range(self._geometry.num_layers):
            queries = self._queries(layer, references.queries[:, layer], distances)
            heads = np.flatnonzero(num_matched[layer])
            num_tokens, most = dense_blocks.shape[0] * PAGE_SIZE, int(num_matched[layer].max())
            at_a_time = max(1, MOST_BYTES // head_bytes(self._geometry, num_tokens, most))
            for first in range(0, heads.size, at_a_time):
                some = heads[first : first + at_a_time]
                counts, index = num_matched[layer, some], upload(some, dense_blocks.device)
                matched = self._fit(
                    table_slot,
                    layer,
                    index,
                    int(counts.max()),
                    is_evicted[layer],
                    dense_blocks,
                    queries,
                )
                self._write(table_slot, layer, index, int(counts.sum()), matched)

    def _queries(self, layer: int, queries: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """[H, N, D] fp32, of all query heads of a group; from [n, num_q_heads, head_dim]."""
        if self._move_queries is not None:
            queries = self._move_queries(layer, queries, distances)
        return by_kv_head(queries.float(), self._geometry.num_kv_heads)

    def _evicted_pages(self, table_slot: int) -> torch.Tensor:
        """[L, H, P] bool, True where the head does not list the page."""
        table, extent = self._table, self._table.extents[table_slot]
        heads, num_pages = extent.budgets.size, extent.num_pages
        first, device = table.base(table_slot), self._memory.pool.device
        positions = table.tensors.positions[first : first + extent.num_listed].long()
        budgets = table.tensors.count[table_slot] + table.tensors.stand_in_pages[table_slot]
        head = torch.repeat_interleave(budgets.flatten().long(), output_size=extent.num_listed)
        # stand-in pages have position -1, and go to one place more
        place = torch.where(positions >= 0, head * num_pages + positions, heads * num_pages)
        is_evicted = torch.ones(heads * num_pages + 1, dtype=torch.bool, device=device)
        is_evicted[place] = False
        return is_evicted[:-1].view(*extent.budgets.shape, num_pages)

    def _fit(
        self,
        table_slot: int,
        layer: int,
        heads: torch.Tensor,
        most_matched: int,
        is_evicted: torch.Tensor,
        dense_blocks: torch.Tensor,
        queries: torch.Tensor,
    ) -> MatchedTokens:
        """Matched tokens of some heads of a layer, as many as the largest number of them all.

        Args:
            heads: [B] int64, KV heads.
            most_matched: that number.
            is_evicted: [H, P] bool.
            queries: [H, N, D] fp32.
        """
        g, pool = self._geometry, self._memory.pool
        ids = layer_page_ids(dense_blocks, layer, g.num_layers, g.num_kv_heads)[heads]
        kv = _storable(pool)[ids].view(pool.dtype).flatten(1, 2)  # [B, tokens, 2 * D]
        keys, values = kv.split(g.head_dim, dim=-1)
        scale = logit_scales(g.scale, self._memory.kv_scales, layer)
        scale = scale[heads] if torch.is_tensor(scale) else scale
        gone = is_evicted[heads].repeat_interleave(PAGE_SIZE, dim=1)
        counts = self._num_matched(table_slot, layer, heads)
        return match_tokens(keys, values, gone, queries[heads] * scale, most_matched, counts)

    def _num_matched(self, table_slot: int, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """[B] int64, on the device."""
        return self._table.tensors.stand_in_pages[table_slot, layer, heads].long() * PAGE_SIZE

    def _write(
        self,
        table_slot: int,
        layer: int,
        heads: torch.Tensor,
        total: int,
        matched: MatchedTokens,
    ) -> None:
        """Write the matched tokens of some heads, `total` in all, to their stand-in pages."""
        tensors, pool = self._table.tensors, self._memory.pool
        assert tensors.token_bias is not None and tensors.bias_start is not None
        counts = self._num_matched(table_slot, layer, heads)
        of_head = torch.repeat_interleave(counts, output_size=total)  # [total], index into `heads`
        within = torch.arange(total, device=pool.device) - (counts.cumsum(0) - counts)[of_head]
        page, token = within // PAGE_SIZE, within % PAGE_SIZE
        where = table_slot, layer, heads[of_head]
        target = tensors.entries[tensors.start[where] + tensors.count[where] + page].long()
        kv = torch.cat((matched.keys, matched.values), dim=-1)[of_head, within]
        largest = torch.finfo(pool.dtype).max
        elements = kv.clamp(-largest, largest).to(pool.dtype)
        rows = _storable(pool).view(-1, pool.shape[2])
        rows[target * PAGE_SIZE + token] = _storable(elements)
        bias = matched.bias[of_head, within] * LOG2_E
        tensors.token_bias[tensors.bias_start[where] + page, token] = bias


def _storable(elements: torch.Tensor) -> torch.Tensor:
    """The same, as bytes where torch has no indexing for the dtype (fp8 on CUDA)."""
    return elements.view(torch.uint8) if elements.itemsize == 1 else elements
