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

from vllm_heterocache.kernels.top_pages import (
    MAX_KEY,
    kept_mask,
    load_keys,
    lowest_key,
    lowest_loaded_key,
    score_keys,
    top_mask,
)
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
    total,
    pivot_width,
    satellite_width,
    sink_pages,
    recent_pages,
    num_pivots,
    NUM_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """Program (i_row, satellite): what one satellite wants, and how much of it is missing.

    The first one sets the number of all moves to 0, to which the next launch adds.
    """
    i_row, satellite = tl.program_id(0), tl.program_id(1)
    if (i_row == 0) & (satellite == 0):
        tl.store(total, 0)
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
        if LOOPED:
            num_missing, low_key, last_tie = _missing_in_blocks(
                p_scores, p_resident, num_pages, num_listed, sink_pages, recent_pages, BLOCK
            )
        else:
            num_missing, low_key, last_tie = _missing_in_registers(
                p_scores, p_resident, num_pages, num_listed, sink_pages, recent_pages, BLOCK
            )
        tl.store(workspace, num_missing)
        tl.store(workspace + n, low_key)
        tl.store(workspace + 2 * n, last_tie)
    else:
        tl.store(workspace, 0)


@triton.jit
def _missing_in_registers(
    p_scores, p_resident, num_pages, num_listed, sink_pages, recent_pages, BLOCK: tl.constexpr
):
    """Of a prompt of at most BLOCK pages: how many of the `num_listed` best are not resident, and
    which is the last of them, by key and page."""
    o_page = tl.arange(0, BLOCK)
    m_page = o_page < num_pages
    b_key = _ranking_keys(p_scores, o_page, m_page, num_pages, sink_pages, recent_pages)
    m_wanted = top_mask(b_key, m_page, num_listed)
    b_resident = tl.load(p_resident + o_page, mask=m_page, other=1)
    low_key = tl.min(tl.where(m_wanted, b_key, MAX_KEY + 1), 0)
    last_tie = tl.max(tl.where(m_wanted & (b_key == low_key), o_page, -1), 0)
    return tl.sum((m_wanted & (b_resident == 0)).to(tl.int32), 0), low_key, last_tie


@triton.jit
def _missing_in_blocks(
    p_scores, p_resident, num_pages, num_listed, sink_pages, recent_pages, BLOCK: tl.constexpr
):
    """As `_missing_in_registers`, of any number of pages, BLOCK at a time."""
    low_key, num_low = lowest_key(p_scores, num_pages, sink_pages, recent_pages, num_listed, BLOCK)
    num_ties = 0
    b_missing = tl.zeros([BLOCK], dtype=tl.int32)
    b_last_tie = tl.full([BLOCK], -1, dtype=tl.int32)
    for begin in range(0, num_pages, BLOCK):
        o_page, m_page, b_key = load_keys(
            p_scores, begin, num_pages, sink_pages, recent_pages, BLOCK
        )
        m_wanted, num_ties = kept_mask(b_key, m_page, low_key, num_low, num_ties)
        b_resident = tl.load(p_resident + o_page, mask=m_page, other=1)
        b_missing += (m_wanted & (b_resident == 0)).to(tl.int32)
        b_last_tie = tl.where(m_wanted & (b_key == low_key), o_page, b_last_tie)
    return tl.sum(b_missing, 0), low_key, tl.max(b_last_tie, 0)


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
    LOOPED: tl.constexpr,
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
        pages = p_scores, num_pages, sink_pages, recent_pages, low_key, last_tie
        incoming = p_resident, num_pages, pages
        numbers = i_row, satellite, tl.num_programs(1), move, begin
        p_moves = move_row, move_satellite, move_spare, move_page, move_host_page, move_gpu_page
        tables = spares, entries, first_entry, host_blocks, row, host_width
        if LOOPED:
            low, num_low = lowest_loaded_key(_load_incoming, incoming, num_pages, number, BLOCK)
            num_before, num_ties = 0, 0
            for first in range(0, num_pages, BLOCK):
                m_missing, b_key = _load_incoming(first, incoming, BLOCK)
                m_in, num_ties = kept_mask(b_key, m_missing, low, num_low, num_ties)
                _write_incoming(first, m_in, num_before, numbers, p_moves, tables, BLOCK)
                num_before += tl.sum(m_in.to(tl.int32), 0)
        else:
            m_missing, b_key = _load_incoming(0, incoming, BLOCK)
            m_in = top_mask(b_key, m_missing, number)
            _write_incoming(0, m_in, 0, numbers, p_moves, tables, BLOCK)

        # a list is not longer than the prompt
        num_listed = tl.load(count + list_index)
        leaving = positions + list_begin, num_listed, pages
        listed = move_listed, move, list_begin, first_entry
        if LOOPED:
            low, num_low = lowest_loaded_key(_load_leaving, leaving, num_listed, number, BLOCK)
            num_before, num_ties = 0, 0
            for first in range(0, num_listed, BLOCK):
                m_leaves, b_key = _load_leaving(first, leaving, BLOCK)
                m_out, num_ties = kept_mask(b_key, m_leaves, low, num_low, num_ties)
                _write_leaving(first, m_out, num_before, listed, BLOCK)
                num_before += tl.sum(m_out.to(tl.int32), 0)
        else:
            m_leaves, b_key = _load_leaving(0, leaving, BLOCK)
            m_out = top_mask(b_key, m_leaves, number)
            _write_leaving(0, m_out, 0, listed, BLOCK)


@triton.jit
def _load_incoming(begin, source, BLOCK: tl.constexpr):
    """Which pages of a block are wanted and not resident, and their keys."""
    p_resident, num_pages, pages = source
    p_scores, _, sink_pages, recent_pages, low_key, last_tie = pages
    o_page = begin + tl.arange(0, BLOCK)
    m_page = o_page < num_pages
    b_key = _ranking_keys(p_scores, o_page, m_page, num_pages, sink_pages, recent_pages)
    b_resident = tl.load(p_resident + o_page, mask=m_page, other=1)
    return (b_resident == 0) & _wanted(b_key, o_page, low_key, last_tie), b_key


@triton.jit
def _load_leaving(begin, source, BLOCK: tl.constexpr):
    """Which entries of a list hold pages that are not wanted, and keys that are largest for the
    worst pages."""
    p_held, num_listed, pages = source
    p_scores, num_pages, sink_pages, recent_pages, low_key, last_tie = pages
    o_entry = begin + tl.arange(0, BLOCK)
    m_listed = o_entry < num_listed
    b_held = tl.load(p_held + o_entry, mask=m_listed, other=0)
    b_key = _ranking_keys(p_scores, b_held, m_listed, num_pages, sink_pages, recent_pages)
    return m_listed & (_wanted(b_key, b_held, low_key, last_tie) == 0), MAX_KEY - b_key


@triton.jit
def _write_incoming(first, m_in, num_before, numbers, p_moves, tables, BLOCK: tl.constexpr):
    """The moves of a block's pages that come in, of which `num_before` were in the blocks before;
    all but their listed entries."""
    i_row, satellite, num_satellites, move, begin = numbers
    p_row, p_satellite, p_spare, p_page, p_host_page, p_gpu_page = p_moves
    spares, entries, first_entry, host_blocks, row, host_width = tables
    o_page = first + tl.arange(0, BLOCK)
    b_turn = num_before + tl.cumsum(m_in.to(tl.int32), 0) - 1
    b_spare = tl.load(spares + 2 * i_row) + begin + b_turn
    b_block = tl.load(host_blocks + row * host_width + o_page, mask=m_in, other=0)
    b_gpu_page = tl.load(entries + first_entry + b_spare, mask=m_in, other=0)
    o_move = move + b_turn
    b_zero = tl.zeros([BLOCK], dtype=tl.int32)
    tl.store(p_row + o_move, b_zero + i_row, mask=m_in)
    tl.store(p_satellite + o_move, b_zero + satellite, mask=m_in)
    tl.store(p_spare + o_move, b_spare, mask=m_in)
    tl.store(p_page + o_move, o_page, mask=m_in)
    tl.store(p_host_page + o_move, b_block * num_satellites + satellite, mask=m_in)
    tl.store(p_gpu_page + o_move, b_gpu_page, mask=m_in)


@triton.jit
def _write_leaving(first, m_out, num_before, listed, BLOCK: tl.constexpr):
    """The entries of a block that leave, of which `num_before` were in the blocks before."""
    move_listed, move, list_begin, first_entry = listed
    b_turn = num_before + tl.cumsum(m_out.to(tl.int32), 0) - 1
    b_listed = (list_begin - first_entry).to(tl.int32) + (first + tl.arange(0, BLOCK))
    tl.store(move_listed + move + b_turn, b_listed, mask=m_out)
