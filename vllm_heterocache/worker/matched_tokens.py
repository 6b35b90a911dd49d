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
from vllm_heterocache.worker.tables.upload import exclusive_sum, upload

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
        is_evicted = self._evicted_pages(table_slot)
        for layer in range(self._geometry.num_layers):
            queries = self._queries(layer, references)
            heads = np.flatnonzero(num_matched[layer])
            num_tokens, most = dense_blocks.shape[0] * PAGE_SIZE, int(num_matched[layer].max())
            at_a_time = max(1, MOST_BYTES // head_bytes(self._geometry, num_tokens, most))
            for first in range(0, heads.size, at_a_time):
                some = heads[first : first + at_a_time]
                matched = self._fit(
                    layer,
                    some,
                    num_matched[layer, some],
                    is_evicted[layer],
                    dense_blocks,
                    queries,
                )
                self._write(table_slot, layer, some, num_matched[layer, some], matched)

    def _queries(self, layer: int, references: References) -> torch.Tensor:
        """[H, N, D] fp32, of all query heads of a group."""
        queries = references.queries[:, layer]
        if self._move_queries is not None:
            queries = self._move_queries(layer, queries, distances_behind(references))
        return by_kv_head(queries.float(), self._geometry.num_kv_heads)

    def _evicted_pages(self, table_slot: int) -> torch.Tensor:
        """[L, H, P] bool, True where the head does not list the page."""
        table, extent = self._table, self._table.extents[table_slot]
        heads, num_pages = extent.budgets.size, extent.num_pages
        first, device = table.base(table_slot), self._memory.pool.device
        positions = table.tensors.positions[first : first + extent.num_listed].long()
        head = torch.repeat_interleave(
            upload(extent.budgets.ravel(), device).long(), output_size=extent.num_listed
        )
        # stand-in pages have position -1, and go to one place more
        place = torch.where(positions >= 0, head * num_pages + positions, heads * num_pages)
        is_evicted = torch.ones(heads * num_pages + 1, dtype=torch.bool, device=device)
        is_evicted[place] = False
        return is_evicted[:-1].view(*extent.budgets.shape, num_pages)

    def _fit(
        self,
        layer: int,
        heads: np.ndarray,
        num_matched: np.ndarray,
        is_evicted: torch.Tensor,
        dense_blocks: torch.Tensor,
        queries: torch.Tensor,
    ) -> MatchedTokens:
        """Matched tokens of some heads of a layer, as many as the largest number of them all.

        Args:
            heads: [B] int, KV heads.
            num_matched: [B] int, above 0.
            is_evicted: [H, P] bool.
            queries: [H, N, D] fp32.
        """
        g, pool = self._geometry, self._memory.pool
        index = upload(heads.astype(np.int32), pool.device).long()
        ids = layer_page_ids(dense_blocks, layer, g.num_layers, g.num_kv_heads)[index]
        kv = _storable(pool)[ids].view(pool.dtype).flatten(1, 2)  # [B, tokens, 2 * D]
        keys, values = kv.split(g.head_dim, dim=-1)
        scale = logit_scales(g.scale, self._memory.kv_scales, layer)
        scale = scale[index] if torch.is_tensor(scale) else scale
        queries = queries[index] * scale
        gone = is_evicted[index].repeat_interleave(PAGE_SIZE, dim=1)
        counts = upload(num_matched.astype(np.int32), pool.device).long()
        return match_tokens(keys, values, gone, queries, int(num_matched.max()), counts)

    def _write(
        self,
        table_slot: int,
        layer: int,
        heads: np.ndarray,
        num_matched: np.ndarray,
        matched: MatchedTokens,
    ) -> None:
        """Write the first `num_matched` [B] tokens of each head to its stand-in pages."""
        tensors, extent = self._table.tensors, self._table.extents[table_slot]
        pool = self._memory.pool
        assert tensors.token_bias is not None
        total, device = int(num_matched.sum()), pool.device
        offsets = self._table.base(table_slot) + exclusive_sum(extent.budgets) + extent.count
        first_bias = extent.first_stripe * tensors.bias_width + exclusive_sum(extent.stand_in_pages)

        def of_each(values: np.ndarray) -> torch.Tensor:
            """[total], the value of each token's head."""
            return upload(np.ascontiguousarray(values, np.int64), device)[head]

        repeats = upload(num_matched.astype(np.int64), device)
        head = torch.repeat_interleave(repeats, output_size=total)
        within = torch.arange(total, device=device) - of_each(exclusive_sum(num_matched))
        page = within // PAGE_SIZE
        target = tensors.entries[of_each(offsets[layer, heads]) + page].long()
        kv = torch.cat((matched.keys, matched.values), dim=-1)[head, within]
        largest = torch.finfo(pool.dtype).max
        elements = kv.clamp(-largest, largest).to(pool.dtype)
        rows = _storable(pool).view(-1, pool.shape[2])
        rows[target * PAGE_SIZE + within % PAGE_SIZE] = _storable(elements)
        place = (of_each(first_bias[layer, heads]) + page) * PAGE_SIZE + within % PAGE_SIZE
        tensors.token_bias.view(-1)[place] = matched.bias[head, within] * LOG2_E


def _storable(elements: torch.Tensor) -> torch.Tensor:
    """The same, as bytes where torch has no indexing for the dtype (fp8 on CUDA)."""
    return elements.view(torch.uint8) if elements.itemsize == 1 else elements
