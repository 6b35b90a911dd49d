"""The launches of retrieval_moves.py.

In the workspace lie, for n = num_rows * num_satellites, five arrays [n] and one [num_rows], all
int32:

    missing   pages that the satellite wants and lacks
    low_key   lowest key of a wanted page
    last_tie  last wanted page of that key; later ones of the same key are not wanted
    begin     first move of the satellite among those of its row
    number    its moves
    base      first move of the row
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_heterocache.kernels.top_pages import MAX_KEY, score_keys, top_mask
from vllm_heterocache.kernels.values import DriftCounter

PAGES_FETCHED = tl.constexpr(int(DriftCounter.PAGES_FETCHED))


@triton.jit
def _ranking_keys(p_scores, o_page, m_page, num_pages, sink_pages, recent_pages):
    b_key = score_keys(tl.load(p_scores + o_page, mask=m_page, other=0.0))
    m_protected = (o_page < sink_pages) | (o_page >= num_pages - recent_pages)
    return tl.where(m_protected, MAX_KEY, b_key)


@triton.jit
def _wanted(b_key, o_page, low_key, last_tie):
    return (b_key > low_key) | ((b_key == low_key) & (o_page <= last_tie))


@triton.jit(do_not_specialize=["table_slots"])
def count_kernel(
    table_slots,
    leaders,
    satellite_heads,
    start,
    count,
    prompt_pages,
    first_stripe,
    scores,
    is_resident,
    waves_left,
    workspace,
    pivot_width,
    satellite_width,
    sink_pages,
    recent_pages,
    num_pivots,
    NUM_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i_row, satellite): what one satellite wants, and how much of it is missing."""
    i_row, satellite = tl.program_id(0), tl.program_id(1)
    n = tl.num_programs(0) * tl.num_programs(1)
    workspace += i_row * tl.num_programs(1) + satellite
    slot = tl.load(table_slots + i_row).to(tl.int64)
    pivot = tl.load(leaders + satellite)
    is_wanted = tl.load(waves_left + tl.maximum(slot, 0) * num_pivots + pivot) > 0
    if (slot >= 0) & is_wanted:
        num_listed = tl.load(count + slot * NUM_HEADS + tl.load(satellite_heads + satellite))
        num_pages = tl.load(prompt_pages + slot)
        row = tl.load(first_stripe + slot)
        p_scores = scores + row * pivot_width + pivot * num_pages
        p_resident = is_resident + row * satellite_width + satellite * num_pages
        o_page = tl.arange(0, BLOCK)
        m_page = o_page < num_pages
        b_key = _ranking_keys(p_scores, o_page, m_page, num_pages, sink_pages, recent_pages)
        m_wanted = top_mask(b_key, m_page, num_listed)
        b_resident = tl.load(p_resident + o_page, mask=m_page, other=1)
        low_key = tl.min(tl.where(m_wanted, b_key, MAX_KEY + 1), 0)
        last_tie = tl.max(tl.where(m_wanted & (b_key == low_key), o_page, -1), 0)
        tl.store(workspace, tl.sum((m_wanted & (b_resident == 0)).to(tl.int32), 0))
        tl.store(workspace + n, low_key)
        tl.store(workspace + 2 * n, last_tie)
    else:
        tl.store(workspace, 0)


@triton.jit(do_not_specialize=["spares", "rotations", "num_satellites"])
def share_kernel(
    spares,
    rotations,
    total,
    counters,
    workspace,
    num_satellites,
    BLOCK: tl.constexpr,
):
    """Program i_row: divide the moves of one row among its satellites."""
    i_row = tl.program_id(0)
    n = tl.num_programs(0) * num_satellites
    missing = workspace + i_row * num_satellites
    rotation = tl.load(rotations + i_row) % num_satellites
    allowed = tl.load(spares + 2 * i_row + 1)
    o_block = tl.arange(0, BLOCK)
    num_needy = 0
    for first in range(0, num_satellites, BLOCK):
        o_satellite = first + o_block
        m_block = o_satellite < num_satellites
        b_missing = tl.load(missing + o_satellite, mask=m_block, other=0)
        num_needy += tl.sum((b_missing > 0).to(tl.int32), 0)
    level = tl.maximum(1, allowed // tl.maximum(1, num_needy))
    used = 0
    for first in range(0, num_satellites, BLOCK):
        o_turn = first + o_block
        m_turn = o_turn < num_satellites
        o_satellite = (o_turn - rotation + num_satellites) % num_satellites
        b_missing = tl.load(missing + o_satellite, mask=m_turn, other=0)
        b_number = tl.minimum(b_missing, level)
        b_begin = tl.minimum(used + tl.cumsum(b_number, 0) - b_number, allowed)
        b_number = tl.minimum(b_number, allowed - b_begin)
        tl.store(missing + 3 * n + o_satellite, b_begin, mask=m_turn)
        tl.store(missing + 4 * n + o_satellite, b_number, mask=m_turn)
        used += tl.sum(b_number, 0)
    tl.store(workspace + 5 * n + i_row, tl.atomic_add(total, used, sem="relaxed"))
    # `used` is a block of Triton's by now
    fetched = used.to(tl.int64)  # type: ignore[attr-defined]
    tl.atomic_add(counters + PAGES_FETCHED, fetched, sem="relaxed")


@triton.jit(do_not_specialize=["table_slots", "spares"])
def choose_kernel(
    table_slots,
    leaders,
    satellite_heads,
    start,
    count,
    prompt_pages,
    first_stripe,
    scores,
    is_resident,
    spares,
    entries,
    positions,
    host_blocks,
    move_row,
    move_satellite,
    move_listed,
    move_spare,
    move_page,
    move_host_page,
    move_gpu_page,
    workspace,
    pivot_width,
    satellite_width,
    host_width,
    sink_pages,
    recent_pages,
    NUM_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i_row, satellite): the moves of one satellite.

    The i-th page in page order, the i-th entry in list order and the i-th spare entry meet in one
    move, so that pages and entries can be numbered, and written, without each other.
    """
    i_row, satellite = tl.program_id(0), tl.program_id(1)
    n = tl.num_programs(0) * tl.num_programs(1)
    p_mine = workspace + i_row * tl.num_programs(1) + satellite
    number = tl.load(p_mine + 4 * n)
    if number > 0:
        low_key = tl.load(p_mine + n)
        last_tie = tl.load(p_mine + 2 * n)
        begin = tl.load(p_mine + 3 * n)
        move = tl.load(workspace + 5 * n + i_row) + begin
        slot = tl.load(table_slots + i_row).to(tl.int64)
        num_pages = tl.load(prompt_pages + slot)
        row = tl.load(first_stripe + slot)
        p_scores = scores + row * pivot_width + tl.load(leaders + satellite) * num_pages
        p_resident = is_resident + row * satellite_width + satellite * num_pages
        list_index = slot * NUM_HEADS + tl.load(satellite_heads + satellite)
        first_entry = tl.load(start + slot * NUM_HEADS)
        list_begin = tl.load(start + list_index)
        o_page = tl.arange(0, BLOCK)

        # pages that come in
        m_page = o_page < num_pages
        b_key = _ranking_keys(p_scores, o_page, m_page, num_pages, sink_pages, recent_pages)
        b_resident = tl.load(p_resident + o_page, mask=m_page, other=1)
        m_missing = (b_resident == 0) & _wanted(b_key, o_page, low_key, last_tie)
        m_in = top_mask(b_key, m_missing, number)
        b_turn = tl.cumsum(m_in.to(tl.int32), 0) - 1
        b_spare = tl.load(spares + 2 * i_row) + begin + b_turn
        b_block = tl.load(host_blocks + row * host_width + o_page, mask=m_in, other=0)
        b_gpu_page = tl.load(entries + first_entry + b_spare, mask=m_in, other=0)
        o_move = move + b_turn
        b_zero = tl.zeros([BLOCK], dtype=tl.int32)
        tl.store(move_row + o_move, b_zero + i_row, mask=m_in)
        tl.store(move_satellite + o_move, b_zero + satellite, mask=m_in)
        tl.store(move_spare + o_move, b_spare, mask=m_in)
        tl.store(move_page + o_move, o_page, mask=m_in)
        tl.store(move_host_page + o_move, b_block * tl.num_programs(1) + satellite, mask=m_in)
        tl.store(move_gpu_page + o_move, b_gpu_page, mask=m_in)

        # entries whose pages leave; a list is not longer than the prompt
        m_listed = o_page < tl.load(count + list_index)
        b_held = tl.load(positions + list_begin + o_page, mask=m_listed, other=0)
        b_key = _ranking_keys(p_scores, b_held, m_listed, num_pages, sink_pages, recent_pages)
        m_leaves = m_listed & (_wanted(b_key, b_held, low_key, last_tie) == 0)
        m_out = top_mask(MAX_KEY - b_key, m_leaves, number)
        b_turn = tl.cumsum(m_out.to(tl.int32), 0) - 1
        b_listed = (list_begin - first_entry).to(tl.int32) + o_page
        tl.store(move_listed + move + b_turn, b_listed, mask=m_out)
