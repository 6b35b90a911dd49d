"""Drift check of the leading pivots (specification: README.md and drift_check_ref.py).

A program holds one score for every page of a prompt in registers, so that ranking them takes no
memory and no further launch. Of a prompt with more pages than registers, a program looks at a block
of pages at a time, and reads the scores again and again.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels import reference_set, values
from vllm_heterocache.kernels.kept_launch import KeptLaunch
from vllm_heterocache.kernels.tables import HeadMaps, PageTables
from vllm_heterocache.kernels.top_pages import (
    kept_mask,
    load_keys,
    lowest_key,
    score_keys,
    top_mask,
)
from vllm_heterocache.kernels.values import (
    MAX_CHECKED_PAGES,
    PAGE_BLOCKS,
    DriftCounter,
    DriftRule,
)

# Pages that a program looks at together, where a prompt has more than its registers hold.
LOOP_BLOCK = 8192
TOP_DIVISOR = tl.constexpr(reference_set.TOP_DIVISOR)
MIN_TOP_PAGES = tl.constexpr(reference_set.MIN_TOP_PAGES)
THRESHOLD_UNIT = tl.constexpr(values.THRESHOLD_UNIT)
CHECKS, TRIGGERS = tl.constexpr(int(DriftCounter.CHECKS)), tl.constexpr(int(DriftCounter.TRIGGERS))


class PageLaunch(NamedTuple):
    """How a kernel that ranks the pages of a prompt is launched."""

    block: int  # pages that a program looks at together
    looped: bool  # whether a prompt may have more
    num_warps: int


def page_launch(max_pages: int) -> PageLaunch:
    """The launch for prompts of up to `max_pages` pages."""
    assert max_pages <= MAX_CHECKED_PAGES, f"prompts of {max_pages} pages are not supported"
    looped = max_pages > PAGE_BLOCKS[-1]
    block = LOOP_BLOCK if looped else PAGE_BLOCKS[bisect_left(PAGE_BLOCKS, max_pages)]
    return PageLaunch(block, looped, min(32, max(4, block // 512)))


def drift_check(
    tables: PageTables,
    maps: HeadMaps,
    table_slots: torch.Tensor,
    head_lse: torch.Tensor,
    rule: DriftRule,
    max_pages: int,
    waves_left: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Score the pages of the leading pivots, and find those whose attention drifted: one launch.

    Args: as of `drift_check_ref`; tensors are contiguous and on the GPU.
    """
    launch = drift_check_launch(
        tables, maps, table_slots, head_lse, rule, max_pages, waves_left, counters
    )
    launch(table_slots.shape[0], maps.pivot_heads.shape[0])


def drift_check_launch(
    tables: PageTables,
    maps: HeadMaps,
    table_slots: torch.Tensor,
    head_lse: torch.Tensor,
    rule: DriftRule,
    max_pages: int,
    waves_left: torch.Tensor,
    counters: torch.Tensor,
) -> KeptLaunch:
    """The launch of `drift_check`, to be called with a number of rows and that of all pivots. The
    rows may be more than `table_slots` has, where there are more of them behind it."""
    num_kv_heads = tables.count.shape[2]
    group = tables.page_lse.shape[1]
    assert table_slots.dtype == waves_left.dtype == torch.int32 and table_slots.ndim == 1
    num_pivots = maps.pivot_heads.shape[0]
    assert head_lse.shape[0] == tables.count.shape[1] and head_lse.shape[2] == group
    assert head_lse.shape[1] >= table_slots.shape[0] * num_kv_heads and head_lse[0].is_contiguous()
    assert waves_left.shape == (tables.count.shape[0], num_pivots)
    assert waves_left.is_contiguous() and counters.dtype == torch.int64
    launch = page_launch(max_pages)
    return KeptLaunch(
        _drift_check_kernel,
        table_slots,
        maps.pivot_heads,
        tables.prompt_pages,
        tables.first_stripe,
        tables.page_lse,
        head_lse,
        tables.scores,
        tables.is_reference,
        waves_left,
        counters,
        head_lse.stride(0),
        tables.pivot_width,
        rule.threshold_units,
        rule.waves,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK=launch.block,
        LOOPED=launch.looped,
        num_warps=launch.num_warps,
    )


@triton.jit
def num_top_pages(num_pages):
    return tl.minimum(num_pages, tl.maximum(MIN_TOP_PAGES, tl.cdiv(num_pages, TOP_DIVISOR)))


@triton.jit(do_not_specialize=["table_slots", "threshold", "waves"])
def _drift_check_kernel(
    table_slots,
    pivot_heads,
    prompt_pages,
    first_stripe,
    page_lse,
    head_lse,
    scores,
    is_reference,
    waves_left,
    counters,
    stride_lse_layer,
    pivot_width,
    threshold,
    waves,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """Program (i_row, pivot): one pivot of one request."""
    i_row, pivot = tl.program_id(0), tl.program_id(1)
    slot = tl.load(table_slots + i_row).to(tl.int64)
    if slot >= 0:
        flat_head = tl.load(pivot_heads + pivot)
        num_pages = tl.load(prompt_pages + slot)
        place = tl.load(first_stripe + slot) * pivot_width + pivot * num_pages
        o_page = tl.arange(0, BLOCK)
        m_page = o_page < num_pages

        p_head_lse = head_lse + (flat_head // NUM_KV_HEADS).to(tl.int64) * stride_lse_layer
        p_head_lse += (i_row * NUM_KV_HEADS + flat_head % NUM_KV_HEADS) * GROUP
        arenas = page_lse, scores, is_reference, place
        if LOOPED:
            drifted = _check_in_blocks(arenas, p_head_lse, num_pages, threshold, GROUP, BLOCK)
        else:
            drifted = _check_in_registers(
                arenas, p_head_lse, o_page, m_page, num_pages, threshold, GROUP, BLOCK
            )

        p_waves = waves_left + slot * tl.num_programs(1) + pivot
        fewer = tl.maximum(tl.load(p_waves) - 1, 0)
        tl.store(p_waves, tl.where(drifted, waves, fewer))
        tl.atomic_add(counters + CHECKS, 1, sem="relaxed")
        tl.atomic_add(counters + TRIGGERS, drifted.to(tl.int64), sem="relaxed")


@triton.jit
def _check_in_registers(
    arenas,
    p_head_lse,
    o_page,
    m_page,
    num_pages,
    threshold,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Score the pages of one pivot, at most BLOCK, and move its reference set if it drifted.

    Returns:
        whether it did.
    """
    page_lse, scores, is_reference, place = arenas
    b_score = _page_scores(page_lse + place * GROUP, p_head_lse, o_page, m_page, GROUP, BLOCK)
    tl.store(scores + place + o_page, b_score, mask=m_page)

    num_top = num_top_pages(num_pages)
    m_current = top_mask(score_keys(b_score), m_page, num_top)
    b_reference = tl.load(is_reference + place + o_page, mask=m_page, other=0)
    num_shared = tl.sum((m_current & (b_reference != 0)).to(tl.int32), 0)
    drifted = _has_drifted(num_shared, num_top, num_pages, threshold)
    tl.store(is_reference + place + o_page, m_current.to(tl.int8), mask=m_page & drifted)
    return drifted


@triton.jit
def _check_in_blocks(
    arenas, p_head_lse, num_pages, threshold, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """As `_check_in_registers`, of any number of pages, BLOCK at a time."""
    page_lse, scores, is_reference, place = arenas
    for begin in range(0, num_pages, BLOCK):
        o_page = begin + tl.arange(0, BLOCK)
        m_page = o_page < num_pages
        b_score = _page_scores(page_lse + place * GROUP, p_head_lse, o_page, m_page, GROUP, BLOCK)
        tl.store(scores + place + o_page, b_score, mask=m_page)
    # a thread may read what another one wrote
    tl.debug_barrier()

    num_top = num_top_pages(num_pages)
    low, num_low = lowest_key(scores + place, num_pages, 0, 0, num_top, BLOCK)
    num_ties = 0
    b_shared = tl.zeros([BLOCK], dtype=tl.int32)
    for begin in range(0, num_pages, BLOCK):
        o_page, m_page, b_key = load_keys(scores + place, begin, num_pages, 0, 0, BLOCK)
        m_current, num_ties = kept_mask(b_key, m_page, low, num_low, num_ties)
        b_reference = tl.load(is_reference + place + o_page, mask=m_page, other=0)
        b_shared += (m_current & (b_reference != 0)).to(tl.int32)
    drifted = _has_drifted(tl.sum(b_shared, 0), num_top, num_pages, threshold)
    if drifted:
        num_ties = 0
        for begin in range(0, num_pages, BLOCK):
            o_page, m_page, b_key = load_keys(scores + place, begin, num_pages, 0, 0, BLOCK)
            m_current, num_ties = kept_mask(b_key, m_page, low, num_low, num_ties)
            tl.store(is_reference + place + o_page, m_current.to(tl.int8), mask=m_page)
    return drifted


@triton.jit
def _page_scores(p_page_lse, p_head_lse, o_page, m_page, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    b_best = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    for g in range(GROUP):
        b_lse = tl.load(p_page_lse + o_page * GROUP + g, mask=m_page, other=-float("inf"))
        b_best = tl.maximum(b_best, b_lse - tl.load(p_head_lse + g))
    return tl.exp2(b_best)


@triton.jit
def _has_drifted(num_shared, num_top, num_pages, threshold):
    """The corrected overlap against the threshold, both times num_top * (P - num_top)."""
    above_chance = num_shared.to(tl.int64) * num_pages - num_top.to(tl.int64) * num_top
    range_above_chance = num_top.to(tl.int64) * (num_pages - num_top)
    drifted = above_chance * THRESHOLD_UNIT < range_above_chance * threshold
    return drifted & (num_top < num_pages)
