"""The device tensors that describe compacted requests, batches and retrievals, as every kernel
reads them.

Letters: S table slots, L layers, H KV heads, G query heads a KV head, P full pages of a slot's
prompt.

A request has a table slot, which is its index in the tensors [S + 1, ...]. A slot compacted into n
blocks owns n consecutive stripes of every arena, from stripe `first_stripe` on. An arena of width w
has w places in a stripe. That is enough for what the arena holds: n stripes of pivot places hold
num_pivots * P pages, because n >= gpu_budget * P.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_heterocache.kernels.values import DriftCounter


class PageTables(NamedTuple):
    """Page lists, and what is known of every prompt page of a pivot and of a satellite.

    Entries of a slot lie behind one another: the lists of its heads in (layer, head) order, each
    followed by the head's stand-in or idle pages, then the slot's spare pages; the first is
    `start[slot, 0, 0]`, which is `first_stripe[slot] * L * H`. Tokens of stand-in pages stand in
    for evicted ones: they are means (page_means_ref.py), or matched tokens (matched_tokens.py),
    each with a bias of its own.
    Place of a slot's pivot i and prompt page p: `first_stripe * pivot_width + i * P + p`; of its
    satellite s: `first_stripe * satellite_width + s * P + p`; of a host block: `first_stripe *
    host_width + p`.
    """

    entries: torch.Tensor  # [num_stripes * L * H] int32 page ids
    positions: torch.Tensor  # [num_stripes * L * H] int32 prompt page an entry holds, -1 none
    start: torch.Tensor  # [S + 1, L, H] int64, first entry of a head's list
    # [S + 1, L, H] int32, entries in it
    count: torch.Tensor  # type: ignore[assignment]  # hides tuple.count
    stand_in_pages: torch.Tensor  # [S + 1, L, H] int32, those behind it; only if has_stand_ins
    prompt_pages: torch.Tensor  # [S + 1] int32, P; 0 for a free slot
    first_stripe: torch.Tensor  # [S + 1] int64, first stripe
    page_lse: torch.Tensor  # [num_stripes * pivot_width, G] fp32 base 2, by-product of paged_decode
    scores: torch.Tensor  # [num_stripes * pivot_width] fp32 page scores of the last check
    is_reference: torch.Tensor  # [num_stripes * pivot_width] int8, 1: in the reference set
    is_resident: torch.Tensor  # [num_stripes * satellite_width] int8, 1: in the satellite's list
    host_blocks: torch.Tensor  # [num_stripes * host_width] int32, host block of a prompt page
    pivot_width: int
    satellite_width: int
    host_width: int
    has_stand_ins: bool = False  # whether slots may have stand-in pages
    # Only where stand-in pages hold matched tokens: place of the biases of a head's first such
    # page, [S + 1, L, H] int64; those of the others follow in the order of the pages
    bias_start: torch.Tensor | None = None
    # [num_stripes * bias_width, page_size] fp32 base 2, added to the logits of a page's tokens
    token_bias: torch.Tensor | None = None
    bias_width: int = 0
    # Only where steps read a part of what heads keep: [S + 1, L, H] int32, pages of a head behind
    # its list, in place of stand-in pages
    idle_pages: torch.Tensor | None = None


class StepTables(NamedTuple):
    """What choosing the pages to read at each step needs beside the page lists.

    Place of KV head h and prompt page p of a slot: `first_stripe * key_width + h * P + p`. Where
    the choice is among kept pages, the page's id stands H * P places behind it. The keys of one
    layer are overwritten by the next one's.
    """

    summaries: torch.Tensor  # [num_pages, 2, D], least and largest K of each channel of a page
    # [num_stripes * key_width] int32, in the order of the page scores; only for kernels
    keys: torch.Tensor
    key_width: int
    # [num_pages, 2 * D] uint8, only for one-bit keys: bit i of element 2 * d (of its tokens 0 to 7)
    # or 2 * d + 1 (8 to 15) is 1 where the key of a token in channel d is next to the largest
    bits: torch.Tensor | None = None


class FinderTables(NamedTuple):
    """The quantised keys by which finders choose among all pages of a prompt.

    Place of finder s and prompt page p of a slot: `first_stripe * width + s * P + p`.
    """

    # [num_stripes * width, 2, D] int16, of the first 8 tokens and of the others: bits 2 * t and
    # 2 * t + 1 are the key of the half's token t
    codes: torch.Tensor
    # [num_stripes * width, 2, D], zero point and step of each channel, in the queries' dtype
    grids: torch.Tensor
    width: int
    heads: torch.Tensor  # [num_finders] int32 flat heads, ascending
    pivots: torch.Tensor  # [num_finders] int32: its index among the pivots, as it leads itself
    first_of_layer: tuple[int, ...]  # [L + 1], the first finder of each layer, and their number


def first_finders(heads: Sequence[int], num_layers: int, num_kv_heads: int) -> tuple[int, ...]:
    """`FinderTables.first_of_layer` for flat heads in ascending order."""
    ends = (layer * num_kv_heads for layer in range(num_layers + 1))
    return tuple(bisect_left(heads, end) for end in ends)


class HeadOrder(NamedTuple):
    """The order in which decode reads a layer's heads: those whose pages come in the same step last
    (finders)."""

    heads: torch.Tensor  # [L, H] int32
    num_late: tuple[int, ...]  # [L], heads of each layer that come last

    @classmethod
    def of(
        cls, late_heads: Sequence[int], num_layers: int, num_kv_heads: int, device: torch.device
    ) -> HeadOrder:
        """
        Args:
            late_heads: flat heads l * H + h.
        """
        is_late = torch.zeros(num_layers * num_kv_heads, dtype=torch.int32)
        is_late[list(late_heads)] = 1
        is_late = is_late.view(num_layers, num_kv_heads)
        order = is_late.argsort(dim=1, stable=True).int()
        return cls(order.to(device), tuple(is_late.sum(1).tolist()))


class DecodeRows(NamedTuple):
    """The rows of a decode batch. A padded row has `seq_lens` 0.

    A row has one query, or up to `max_queries` where drafts are verified: those of its last
    tokens. Only the first of them is certain to stay, so by-products are of the first one.
    """

    row_to_table_slot: torch.Tensor  # [num_rows] int32 or int64, table slot
    block_table: torch.Tensor  # [num_rows, max_blocks] int32
    seq_lens: torch.Tensor  # [num_rows] int32, tokens, those of its queries included
    query_place: torch.Tensor  # [num_queries] int32, index into `last_queries` or -1
    is_due: torch.Tensor  # [num_rows] int32, 1: its pivots' drift is checked after this step
    # [num_rows + 1] int32, first query of each row, and their number; None: a query a row
    query_start: torch.Tensor | None = None
    max_queries: int = 1  # Q, of a row


class HeadMaps(NamedTuple):
    """Which heads lead and which follow; a flat head is l * H + h."""

    pivot_of_head: torch.Tensor  # [L, H] int32, index of the leading pivot, -1 for other heads
    satellite_of_head: torch.Tensor  # [L, H] int32, index of the satellite, -1 for other heads
    pivot_heads: torch.Tensor  # [num_pivots] int32 flat heads
    satellite_heads: torch.Tensor  # [num_satellites] int32 flat heads
    leaders: torch.Tensor  # [num_satellites] int32, index of the pivot that leads


class Moves(NamedTuple):
    """A retrieval under way: move i puts one prompt page of a satellite into a spare page, which
    later takes the place of a listed one. Entries are relative to the slot's first one."""

    row: torch.Tensor  # [max_moves] int32, row of the batch
    satellite: torch.Tensor  # [max_moves] int32
    listed: torch.Tensor  # [max_moves] int32 entry of the page that leaves the list
    spare: torch.Tensor  # [max_moves] int32 entry of the spare page
    page: torch.Tensor  # [max_moves] int32 prompt page that comes in
    host_page: torch.Tensor  # [max_moves] int32 page of the host pool to read
    gpu_page: torch.Tensor  # [max_moves] int32 page of the GPU pool to write
    total: torch.Tensor  # [1] int32, moves in use

    @classmethod
    def allocate(cls, max_moves: int, device: torch.device) -> Moves:
        fields = [torch.zeros(max_moves, dtype=torch.int32, device=device) for _ in range(7)]
        return cls._make([*fields, torch.zeros(1, dtype=torch.int32, device=device)])


def layer_page_ids(
    blocks: torch.Tensor, layer: int, num_layers: int, num_kv_heads: int
) -> torch.Tensor:
    """[H, n] int64: the pages of one layer in `blocks` ([n] int), as numbers of the packed pool."""
    heads = torch.arange(num_kv_heads, device=blocks.device)
    return (blocks.long() * num_layers + layer) * num_kv_heads + heads[:, None]


def drift_counters(device: torch.device | str, pin_memory: bool = False) -> torch.Tensor:
    """[3] int64 zeros, indexed by `DriftCounter`."""
    return torch.zeros(len(DriftCounter), dtype=torch.int64, device=device, pin_memory=pin_memory)
