"""Worker side: what a prompt's evicted tokens leave behind, fitted and written to its pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.kv_scales import logit_scales
from vllm_heterocache.kernels.matched_tokens import (
    ABSENT_BIAS,
    BLOCK_ELEMENTS,
    MatchedTokens,
    attention_lse,
    evicted_attention,
    fit_chosen,
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

# Tokens of a prompt that are fitted together. Pieces are fitted independently, because the work
# of a fit grows with the square of its matched tokens.
PIECE_TOKENS = 4096
# Elements of K and V that are read at a time, but for those of one head.
MOST_ELEMENTS = 1 << 27


def fitting_bytes(geometry: Geometry, num_tokens: int) -> int:
    """Memory that fitting the matched tokens of a prompt takes at most at a time.

    K and V of some heads, once as the pool has them and once in pieces; queries, outputs and
    shares of each piece.
    """
    g = geometry
    width = 2 * g.head_dim
    heads = min(g.num_kv_heads, max(1, MOST_ELEMENTS // (num_tokens * width)))
    tokens = heads * num_tokens
    rows = MAX_POSITIONS * g.group
    pieces = heads * -(-num_tokens // PIECE_TOKENS)
    most_matched = PIECE_TOKENS // 2
    of_piece = rows * (4 * width + 2 * most_matched) + 3 * most_matched**2
    return tokens * width * 2 * g.dtype.itemsize + pieces * of_piece * 4 + 3 * 4 * BLOCK_ELEMENTS


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
            per_head = dense_blocks.shape[0] * PAGE_SIZE * 2 * self._geometry.head_dim
            at_a_time = max(1, MOST_ELEMENTS // per_head)
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
        kv = pool[ids].flatten(1, 2)  # [B, tokens, 2 * D]
        keys, values = kv.split(g.head_dim, dim=-1)
        scale = logit_scales(g.scale, self._memory.kv_scales, layer)
        scale = scale[index] if torch.is_tensor(scale) else scale
        queries = queries[index] * scale
        gone = is_evicted[index].repeat_interleave(PAGE_SIZE, dim=1)
        counts = upload(num_matched.astype(np.int32), pool.device).long()
        return match_in_pieces(keys, values, gone, queries, counts, int(num_matched.max()))

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
        rows = pool.view(-1, pool.shape[2])
        rows[target * PAGE_SIZE + within % PAGE_SIZE] = kv.clamp(-largest, largest).to(pool.dtype)
        place = (of_each(first_bias[layer, heads]) + page) * PAGE_SIZE + within % PAGE_SIZE
        tensors.token_bias.view(-1)[place] = matched.bias[head, within] * LOG2_E


def match_in_pieces(
    keys: torch.Tensor,
    values: torch.Tensor,
    is_evicted: torch.Tensor,
    queries: torch.Tensor,
    num_matched: torch.Tensor,
    most_matched: int,
    longest_piece: int = PIECE_TOKENS,
) -> MatchedTokens:
    """Matched tokens of each piece of a prompt. Each head's are shared out evenly among pieces.

    Args:
        keys, values: [B, T, D].
        is_evicted: [B, T] bool.
        queries: [B, N, D] fp32, scaled.
        num_matched: [B] int64, matched tokens of each head.
        most_matched: the largest of them.
        longest_piece: most tokens of a piece.

    Returns:
        [B, most_matched] tokens of each head, of which the first `num_matched` are its own.
    """
    num_heads, num_tokens, _ = keys.shape
    num_pieces = -(-num_tokens // longest_piece)
    piece_tokens = -(-num_tokens // num_pieces)
    padding = num_pieces * piece_tokens - num_tokens
    lse = attention_lse(keys, queries)

    def in_pieces(of_tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [B * pieces, piece_tokens, ...]; padding is evicted by nobody."""
        behind = of_tokens.new_zeros(num_heads, padding, *of_tokens.shape[2:])
        padded = torch.cat((of_tokens, behind), dim=1) if padding else of_tokens
        return padded.reshape(-1, piece_tokens, *of_tokens.shape[2:])

    keys, values, is_evicted = in_pieces(keys), in_pieces(values), in_pieces(is_evicted)
    queries = queries.repeat_interleave(num_pieces, dim=0)
    lse = lse.repeat_interleave(num_pieces, dim=0)
    evicted = evicted_attention(keys, values, is_evicted, queries, lse)
    piece = torch.arange(num_pieces + 1, device=keys.device)
    first = num_matched[:, None] * piece // num_pieces  # [B, pieces + 1]
    size = first.diff().flatten()[:, None]
    most = min(-(-most_matched // num_pieces), piece_tokens)
    importance, chosen = evicted.importance.topk(most, dim=1)
    is_present = (importance >= 0) & (torch.arange(most, device=keys.device) < size)
    fitted = fit_chosen(keys, values, queries, lse, evicted, chosen, is_present)

    # place i of a head belongs to the piece p with first[p] <= i < first[p + 1]
    place = torch.arange(most_matched, device=keys.device).expand(num_heads, -1).contiguous()
    of_piece = torch.searchsorted(first[:, 1:].contiguous(), place, right=True)
    of_piece = of_piece.clamp(max=num_pieces - 1)
    rank = place - first.gather(1, of_piece)
    is_mine = rank < most  # else a piece has fewer tokens than places
    index = of_piece * most + rank.clamp(max=most - 1)

    def of_heads(of_fit: torch.Tensor) -> torch.Tensor:
        flat = of_fit.reshape(num_heads, num_pieces * most, -1)
        return flat.gather(1, index[..., None].expand(-1, -1, flat.shape[-1]))

    bias = of_heads(fitted.bias)[..., 0].masked_fill(~is_mine, ABSENT_BIAS)
    return MatchedTokens(of_heads(fitted.keys), of_heads(fitted.values), bias)
