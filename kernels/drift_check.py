"""Drift check of the leading pivots (specification: README.md and drift_check_ref.py).

A program holds one score for every page of a prompt in registers, so that ranking them takes no
memory and no further launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels import reference_set, values
from vllm_heterocache.kernels.tables import HeadMaps, PageTables
from vllm_heterocache.kernels.top_pages import score_keys, top_mask
from vllm_heterocache.kernels.values import DriftCounter, DriftRule

# Few, so that few variants are compiled. A larger one does not fit the registers of a program.
PAGE_BLOCKS = (256, 1024, 4096, 16384, values.MAX_CHECKED_PAGES)
TOP_DIVISOR = tl.constexpr(reference_set.TOP_DIVISOR)
MIN_TOP_PAGES = tl.constexpr(reference_set.MIN_TOP_PAGES)
THRESHOLD_UNIT = tl.constexpr(values.THRESHOLD_UNIT)
CHECKS, TRIGGERS = tl.constexpr(int(DriftCounter.CHECKS)), tl.constexpr(int(DriftCounter.TRIGGERS))


def page_block(max_pages: int) -> int:
    """Size of a register array with a lane for each of `max_pages` pages."""
    assert max_pages <= PAGE_BLOCKS[-1], f"prompts of {max_pages} pages are not supported"
    return next(block for block in PAGE_BLOCKS if block >= max_pages)


def block_warps(block: int) -> int:
    return min(32, max(4, block // 512))


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
    num_kv_heads = tables.count.shape[2]
    group = tables.page_lse.shape[1]
    assert table_slots.dtype == waves_left.dtype == torch.int32 and table_slots.ndim == 1
    num_pivots = maps.pivot_heads.shape[0]
    assert head_lse.shape[0] == tables.count.shape[1] and head_lse.shape[2] == group
    assert head_lse.shape[1] >= table_slots.shape[0] * num_kv_heads and head_lse[0].is_contiguous()
    assert waves_left.shape == (tables.count.shape[0], num_pivots)
    assert waves_left.is_contiguous() and counters.dtype == torch.int64
    if table_slots.shape[0] == 0 or num_pivots == 0:
        return
    block = page_block(max_pages)
    _drift_check_kernel[(table_slots.shape[0], num_pivots)](
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
        BLOCK=block,
        num_warps=block_warps(block),
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
        p_page_lse = page_lse + place * GROUP
        b_best = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
        for g in range(GROUP):
            b_lse = tl.load(p_page_lse + o_page * GROUP + g, mask=m_page, other=-float("inf"))
            b_best = tl.maximum(b_best, b_lse - tl.load(p_head_lse + g))
        b_score = tl.exp2(b_best)
        tl.store(scores + place + o_page, b_score, mask=m_page)

        num_top = num_top_pages(num_pages)
        m_current = top_mask(score_keys(b_score), m_page, num_top)
        b_reference = tl.load(is_reference + place + o_page, mask=m_page, other=0)
        num_shared = tl.sum((m_current & (b_reference != 0)).to(tl.int32), 0).to(tl.int64)
        # the corrected overlap against the threshold, both times num_top * (P - num_top)
        above_chance = num_shared * num_pages - num_top.to(tl.int64) * num_top
        range_above_chance = num_top.to(tl.int64) * (num_pages - num_top)
        drifted = above_chance * THRESHOLD_UNIT < range_above_chance * threshold
        drifted = drifted & (num_top < num_pages)

        tl.store(is_reference + place + o_page, m_current.to(tl.int8), mask=m_page & drifted)
        p_waves = waves_left + slot * tl.num_programs(1) + pivot
        fewer = tl.maximum(tl.load(p_waves) - 1, 0)
        tl.store(p_waves, tl.where(drifted, waves, fewer))
        tl.atomic_add(counters + CHECKS, 1, sem="relaxed")
        tl.atomic_add(counters + TRIGGERS, drifted.to(tl.int64), sem="relaxed")
