"""Reference of page selection: which pages each head keeps, and what is noted of the others."""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.reference_set import num_top_pages
from vllm_heterocache.kernels.tables import HeadMaps, PageTables
from vllm_heterocache.kernels.top_pages_ref import protect_ref, score_keys_ref, top_mask_ref
from vllm_heterocache.kernels.values import Protected


def choose_pages_ref(scores: torch.Tensor, budget: int, protected: Protected) -> torch.Tensor:
    """The protected pages and the highest-scored others, exactly `budget` of them.

    The choice is by score alone, never by position (the paper's code cuts a position-sorted
    list, which loses the latest pages). Of equal score keys the earlier page is kept.

    Args:
        scores: [P] fp32, not negative.
        budget: pages to keep, 0 <= budget <= P.
        protected: pages that come before all others.

    Returns:
        [budget] int64, pages in ascending order.
    """
    return choose_keys_ref(score_keys_ref(scores), budget, protected)


def choose_keys_ref(keys: torch.Tensor, budget: int, protected: Protected) -> torch.Tensor:
    """As `choose_pages_ref`, by keys [P] int32."""
    return top_mask_ref(protect_ref(keys, protected), budget).nonzero().flatten()


def page_select_ref(
    scores: torch.Tensor,
    tables: PageTables,
    maps: HeadMaps,
    table_slot: int,
    dense_blocks: torch.Tensor,
    protected: Protected,
    source: torch.Tensor,
) -> None:
    """Fill the lists of a slot by the prompt's page scores, and its stripes of the arenas.

    Each head keeps tables.count[table_slot] pages, in ascending order. The tables note which
    pages of a satellite are resident, and of a pivot the scores and its best pages, which become
    the reference set.

    Args:
        scores: [L, H, P] fp32 page scores of the prompt.
        tables: `positions`, and for pivots and satellites `scores`, `is_reference` and
            `is_resident`, are written where the slot has its places; all else stays as it is.
        table_slot: a slot whose start, count, prompt_pages and first_stripe are set.
        dense_blocks: [at least P] integer block ids of the prompt.
        protected: pages that every head keeps first.
        source: [at least the slot's listed entries] int32, written: the dense page that holds
            what the entry (counted from the slot's first) is to hold. The rest stays as it is.
    """
    num_layers, num_kv_heads, num_pages = scores.shape
    num_top = num_top_pages(num_pages)
    first_entry, first_stripe = (
        int(tables.start[table_slot, 0, 0]),
        int(tables.first_stripe[table_slot]),
    )
    for flat_head in range(num_layers * num_kv_heads):
        layer, head = divmod(flat_head, num_kv_heads)
        mine = scores[layer, head]
        count = int(tables.count[table_slot, layer, head])
        chosen = choose_pages_ref(mine, count, protected)
        start = int(tables.start[table_slot, layer, head])
        tables.positions[start : start + count] = chosen.int()
        begin = start - first_entry
        dense = dense_blocks[chosen].long() * (num_layers * num_kv_heads) + flat_head
        source[begin : begin + count] = dense.int()
        satellite = int(maps.satellite_of_head[layer, head])
        if satellite >= 0:
            place = first_stripe * tables.satellite_width + satellite * num_pages
            resident = tables.is_resident[place : place + num_pages]
            resident.zero_().index_fill_(0, chosen, 1)
        pivot = int(maps.pivot_of_head[layer, head])
        if pivot >= 0:
            place = first_stripe * tables.pivot_width + pivot * num_pages
            tables.scores[place : place + num_pages] = mine
            best = top_mask_ref(score_keys_ref(mine), num_top)
            tables.is_reference[place : place + num_pages] = best.to(torch.int8)
