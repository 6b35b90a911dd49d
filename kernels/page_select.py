"""The pages each head keeps after compaction (specification: page_select_ref.py).

A program finds the lowest key that a kept page of its head may have, and then keeps all pages above
it and as many of that key as are missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.reference_set import num_top_pages
from vllm_heterocache.kernels.tables import HeadMaps, PageTables
from vllm_heterocache.kernels.top_pages import kept_mask, load_keys, lowest_key
from vllm_heterocache.kernels.values import Protected

BLOCK_PAGES = 2048  # pages that a program looks at together
NUM_WARPS = 8


def page_select(
    scores: torch.Tensor,
    tables: PageTables,
    maps: HeadMaps,
    table_slot: int,
    dense_blocks: torch.Tensor,
    protected: Protected,
    source: torch.Tensor,
) -> None:
    """Fill the lists of a slot by the prompt's page scores, and its stripes of the arenas.

    Args:
        scores: [L, H, P] fp32 page scores of the prompt, P > 0.
        tables: `positions`, and for pivots and satellites `scores`, `is_reference` and
            `is_resident`, are written where the slot has its places.
        table_slot: a slot whose start, count, prompt_pages and first_stripe are set.
        dense_blocks: [at least P] int32 block ids of the prompt.
        protected: pages that every head keeps first.
        source: [at least the slot's listed entries] int32, written: the dense page that holds
            what the entry (counted from the slot's first) is to hold.
    """
    num_layers, num_kv_heads, num_pages = scores.shape
    assert scores.dtype == torch.float32 and scores.is_contiguous()
    assert num_pages > 0 and dense_blocks.shape[0] >= num_pages
    assert dense_blocks.stride(0) == source.stride(0) == 1 and source.dtype == torch.int32
    assert tables.start.shape[1:] == tables.count.shape[1:] == (num_layers, num_kv_heads)
    assert maps.pivot_of_head.shape == maps.satellite_of_head.shape == (num_layers, num_kv_heads)
    assert tables.start.is_contiguous() and tables.count.is_contiguous()
    assert maps.pivot_of_head.is_contiguous() and maps.satellite_of_head.is_contiguous()
    _page_select_kernel[(num_layers * num_kv_heads,)](
        scores,
        tables.start,
        tables.count,
        tables.first_stripe,
        tables.positions,
        tables.scores,
        tables.is_reference,
        tables.is_resident,
        maps.pivot_of_head,
        maps.satellite_of_head,
        dense_blocks,
        source,
        table_slot,
        num_pages,
        num_top_pages(num_pages),
        protected.sinks,
        protected.recent,
        tables.pivot_width,
        tables.satellite_width,
        BLOCK=BLOCK_PAGES,
        num_warps=NUM_WARPS,
    )


@triton.jit(
    do_not_specialize=[
        "table_slot",
        "num_pages",
        "num_top",
        "sink_pages",
        "recent_pages",
        "pivot_width",
        "satellite_width",
    ],
    do_not_specialize_on_alignment=["scores", "dense_blocks", "source"],
)
def _page_select_kernel(
    scores,
    start,
    count,
    first_stripe,
    positions,
    arena_scores,
    is_reference,
    is_resident,
    pivot_of_head,
    satellite_of_head,
    dense_blocks,
    source,
    table_slot,
    num_pages,
    num_top,
    sink_pages,
    recent_pages,
    pivot_width,
    satellite_width,
    BLOCK: tl.constexpr,
):
    """Program i_head: one head of one layer, l * H + h, with BLOCK pages at a time."""
    i_head = tl.program_id(0)
    num_heads = tl.num_programs(0)
    p_slot = table_slot.to(tl.int64) * num_heads
    first_entry = tl.load(start + p_slot)
    list_start = tl.load(start + p_slot + i_head)
    budget = tl.load(count + p_slot + i_head)
    row = tl.load(first_stripe + table_slot)
    pivot = tl.load(pivot_of_head + i_head)
    satellite = tl.load(satellite_of_head + i_head)

    p_score = scores + i_head.to(tl.int64) * num_pages
    low, num_low = lowest_key(p_score, num_pages, sink_pages, recent_pages, budget, BLOCK)
    num_kept, num_ties = 0, 0
    for begin in range(0, num_pages, BLOCK):
        o_page, m_page, b_key = load_keys(
            p_score, begin, num_pages, sink_pages, recent_pages, BLOCK
        )
        m_keep, num_ties = kept_mask(b_key, m_page, low, num_low, num_ties)
        b_rank = num_kept + tl.cumsum(m_keep.to(tl.int32), 0) - 1
        b_block = tl.load(dense_blocks + o_page, mask=m_keep, other=0)
        tl.store(positions + list_start + b_rank, o_page, mask=m_keep)
        p_source = source + (list_start - first_entry) + b_rank
        tl.store(p_source, b_block * num_heads + i_head, mask=m_keep)
        if satellite >= 0:
            p_resident = is_resident + row * satellite_width + satellite.to(tl.int64) * num_pages
            tl.store(p_resident + o_page, m_keep.to(tl.int8), mask=m_page)
        num_kept += tl.sum(m_keep.to(tl.int32), 0)

    if pivot >= 0:
        place = row * pivot_width + pivot.to(tl.int64) * num_pages
        low, num_low = lowest_key(p_score, num_pages, 0, 0, num_top, BLOCK)
        num_ties = 0
        for begin in range(0, num_pages, BLOCK):
            o_page, m_page, b_key = load_keys(p_score, begin, num_pages, 0, 0, BLOCK)
            m_best, num_ties = kept_mask(b_key, m_page, low, num_low, num_ties)
            tl.store(is_reference + place + o_page, m_best.to(tl.int8), mask=m_page)
            b_score = tl.load(p_score + o_page, mask=m_page, other=0.0)
            tl.store(arena_scores + place + o_page, b_score, mask=m_page)
