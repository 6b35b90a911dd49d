"""How finders fetch: a program for each of them (specification: exchange_pages_ref.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels import exchange_pages_ref, top_pages_ref
from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, PageTables
from vllm_heterocache.kernels.top_pages import MAX_KEY, load_keys, score_keys
from vllm_heterocache.kernels.values import PAGE_SIZE, DriftCounter, Protected

MAX_EXCHANGED = tl.constexpr(exchange_pages_ref.MAX_EXCHANGED)
PAGES_FETCHED = tl.constexpr(int(DriftCounter.PAGES_FETCHED))
BLOCK_PAGES = 1024  # pages, or entries of a list, that a program looks at together
BLOCK_WORDS = 2048  # of each page under way from the host
NUM_WARPS = 8
# A page in the order of its key and, of equal keys, of its place: key << 32 | place. None is above
# the first or below the last.
ABOVE_ALL = tl.constexpr((top_pages_ref.MAX_KEY + 1) << 32)
BELOW_ALL = tl.constexpr(-1)
LOW_BITS = tl.constexpr((1 << 32) - 1)


def exchange_pages(
    pages: torch.Tensor,
    host_pages: torch.Tensor,
    tables: PageTables,
    finders: FinderTables,
    rows: DecodeRows,
    layer: int,
    protected: Protected,
    counters: torch.Tensor,
) -> None:
    """Fetch what the finders of one layer attend to: one launch, whose grid follows from shapes.

    Nothing is allocated and nothing waits for the device, so a CUDA graph may hold it.

    Args: as of `exchange_pages_ref`; tensors are contiguous and on the GPU, but for `host_pages`,
        which is pinned.
    """
    num_rows, group = rows.row_to_table_slot.shape[0], tables.page_lse.shape[1]
    num_finders = finders.heads.shape[0]
    _, num_layers, num_kv_heads = tables.count.shape
    assert 0 <= layer < num_layers and tables.page_lse.is_contiguous()
    assert pages.shape[1:] == host_pages.shape[1:] and pages.dtype == host_pages.dtype
    assert pages.is_contiguous() and host_pages.is_contiguous() and pages.shape[1] == PAGE_SIZE
    assert rows.seq_lens.shape == rows.is_due.shape == (num_rows,)
    assert finders.finder_of_head.shape == (num_layers, num_kv_heads)
    page_words = pages.view(torch.int32)[0].numel()
    _exchange_pages_kernel[(num_kv_heads, num_rows)](
        pages.view(torch.int32),
        host_pages.view(torch.int32),
        tables.entries,
        tables.positions,
        tables.start,
        tables.count,
        tables.page_lse,
        tables.scores,
        tables.is_resident,
        tables.host_blocks,
        tables.prompt_pages,
        tables.first_stripe,
        finders.finder_of_head,
        finders.pivots,
        rows.row_to_table_slot,
        rows.seq_lens,
        rows.is_due,
        counters,
        tables.pivot_width,
        tables.satellite_width,
        tables.host_width,
        num_finders,
        layer,
        protected.sinks,
        protected.recent,
        NUM_LAYERS=num_layers,
        GROUP=group,
        BLOCK_GROUP=triton.next_power_of_2(group),
        BLOCK=BLOCK_PAGES,
        PAGE_WORDS=page_words,
        BLOCK_WORDS=min(BLOCK_WORDS, triton.next_power_of_2(page_words)),
        num_warps=NUM_WARPS,
    )


@triton.jit(
    do_not_specialize=[
        "pivot_width", "satellite_width", "host_width", "num_finders", "layer", "sink_pages",
        "recent_pages",
    ]
)  # fmt: skip
def _exchange_pages_kernel(
    pages,
    host_pages,
    entries,
    positions,
    start,
    count,
    page_lse,
    scores,
    is_resident,
    host_blocks,
    prompt_pages,
    first_stripe,
    finder_of_head,
    pivots,
    row_to_table_slot,
    seq_lens,
    is_due,
    counters,
    pivot_width,
    satellite_width,
    host_width,
    num_finders,
    layer,
    sink_pages,
    recent_pages,
    NUM_LAYERS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Program (i_head, i_row): the list of one finder of one request."""
    i_head, num_kv_heads = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    finder = tl.load(finder_of_head + layer * num_kv_heads + i_head).to(tl.int64)
    slot = tl.load(row_to_table_slot + row).to(tl.int64)
    num_pages = tl.load(prompt_pages + slot)
    looks = (finder >= 0) & (tl.load(seq_lens + row) > 0) & (tl.load(is_due + row) != 0)
    if looks & (num_pages > 0):
        stripe = tl.load(first_stripe + slot)
        list_index = (slot * NUM_LAYERS + layer) * num_kv_heads + i_head
        list_start, num_listed = tl.load(start + list_index), tl.load(count + list_index)
        first = stripe * pivot_width + tl.load(pivots + finder).to(tl.int64) * num_pages
        p_score = scores + first
        _score_pages(page_lse + first * GROUP, p_score, num_pages, GROUP, BLOCK_GROUP, BLOCK)
        tl.debug_barrier()  # what other threads of the program wrote is read
        p_resident = is_resident + stripe * satellite_width + finder * num_pages
        p_position = positions + list_start
        o_move = tl.arange(0, MAX_EXCHANGED)
        b_page = tl.zeros([MAX_EXCHANGED], dtype=tl.int32)
        b_entry = tl.zeros([MAX_EXCHANGED], dtype=tl.int32)
        b_gain = tl.zeros([MAX_EXCHANGED], dtype=tl.int32)
        best = tl.full([], ABOVE_ALL, dtype=tl.int64)
        worst = tl.full([], BELOW_ALL, dtype=tl.int64)
        for i_move in range(MAX_EXCHANGED):
            best = _next_missing(
                p_score, p_resident, best, num_pages, sink_pages, recent_pages, BLOCK
            )
            worst = _next_held(
                p_score, p_position, worst, num_listed, num_pages, sink_pages, recent_pages, BLOCK
            )
            m_move = o_move == i_move
            b_page = tl.where(m_move, ((best & LOW_BITS) ^ LOW_BITS).to(tl.int32), b_page)
            b_entry = tl.where(m_move, (worst & LOW_BITS).to(tl.int32), b_entry)
            # where nothing is missing, or no entry is left, this is not above 0
            b_gain = tl.where(m_move, ((best >> 32) - (worst >> 32)).to(tl.int32), b_gain)
        m_move = b_gain > 0
        p_host_block = host_blocks + stripe * host_width + b_page
        b_source = tl.load(p_host_block, mask=m_move, other=0).to(tl.int64) * num_finders + finder
        b_target = tl.load(entries + list_start + b_entry, mask=m_move, other=0).to(tl.int64)
        b_gone = tl.load(p_position + b_entry, mask=m_move, other=0)
        for begin in tl.static_range(0, PAGE_WORDS, BLOCK_WORDS):
            o_word = begin + tl.arange(0, BLOCK_WORDS)
            m_word = m_move[:, None] & (o_word < PAGE_WORDS)[None, :]
            p_source = host_pages + b_source[:, None] * PAGE_WORDS + o_word[None, :]
            p_target = pages + b_target[:, None] * PAGE_WORDS + o_word[None, :]
            tl.store(p_target, tl.load(p_source, mask=m_word, other=0), mask=m_word)
        tl.store(p_resident + b_gone, tl.zeros_like(b_gone).to(tl.int8), mask=m_move)
        tl.store(p_resident + b_page, (tl.zeros_like(b_page) + 1).to(tl.int8), mask=m_move)
        tl.store(p_position + b_entry, b_page, mask=m_move)
        num_moves = tl.sum(m_move.to(tl.int64), 0)
        tl.atomic_add(counters + PAGES_FETCHED, num_moves, sem="relaxed")


@triton.jit
def _score_pages(
    p_lse, p_score, num_pages, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Write each page's share of the attention on all, the largest of the group."""
    b_max = tl.full([BLOCK_GROUP], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_GROUP], dtype=tl.float32)
    for begin in range(0, num_pages, BLOCK):
        b_lse = _load_lse(p_lse, begin, num_pages, GROUP, BLOCK_GROUP, BLOCK)
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_lse - b_new[None, :]), 0)
        b_max = b_new
    b_total = b_max + tl.log2(b_sum)
    for begin in range(0, num_pages, BLOCK):
        o_page = begin + tl.arange(0, BLOCK)
        b_lse = _load_lse(p_lse, begin, num_pages, GROUP, BLOCK_GROUP, BLOCK)
        b_share = tl.max(tl.exp2(b_lse - b_total[None, :]), 1)
        tl.store(p_score + o_page, b_share, mask=o_page < num_pages)


@triton.jit
def _load_lse(
    p_lse,
    begin,
    num_pages,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BLOCK, BLOCK_GROUP]; pages that are not there have -inf, and a group's rest repeats it."""
    o_page = begin + tl.arange(0, BLOCK)
    o_group = tl.arange(0, BLOCK_GROUP) % GROUP
    p_page = p_lse + o_page[:, None] * GROUP + o_group[None, :]
    return tl.load(p_page, mask=(o_page < num_pages)[:, None], other=-float("inf"))


@triton.jit
def _next_missing(
    p_score, p_resident, best, num_pages, sink_pages, recent_pages, BLOCK: tl.constexpr
):
    """The best page below `best` that is not held; BELOW_ALL: none. Of equal pages the first."""
    b_found = tl.full([BLOCK], BELOW_ALL, dtype=tl.int64)
    for begin in range(0, num_pages, BLOCK):
        o_page, m_page, b_key = load_keys(
            p_score, begin, num_pages, sink_pages, recent_pages, BLOCK
        )
        b_held = tl.load(p_resident + o_page, mask=m_page, other=1)
        b_place = (b_key.to(tl.int64) << 32) | (o_page.to(tl.int64) ^ LOW_BITS)
        b_place = tl.where(m_page & (b_held == 0) & (b_place < best), b_place, BELOW_ALL)
        b_found = tl.maximum(b_found, b_place)
    return tl.max(b_found, 0)


@triton.jit
def _next_held(
    p_score, p_position, worst, num_listed, num_pages, sink_pages, recent_pages, BLOCK: tl.constexpr
):
    """The worst entry above `worst`; ABOVE_ALL: none. Of equal entries the first."""
    b_found = tl.full([BLOCK], ABOVE_ALL, dtype=tl.int64)
    for begin in range(0, num_listed, BLOCK):
        o_entry = begin + tl.arange(0, BLOCK)
        m_entry = o_entry < num_listed
        b_page = tl.load(p_position + o_entry, mask=m_entry, other=0)
        b_key = score_keys(tl.load(p_score + b_page, mask=m_entry, other=0.0))
        m_protected = (b_page < sink_pages) | (b_page >= num_pages - recent_pages)
        b_place = tl.where(m_protected, MAX_KEY, b_key).to(tl.int64) << 32 | o_entry.to(tl.int64)
        b_place = tl.where(m_entry & (b_place > worst), b_place, ABOVE_ALL)
        b_found = tl.minimum(b_found, b_place)
    return tl.min(b_found, 0)
