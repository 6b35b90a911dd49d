"""How finders fetch: a program for each of them (specification: exchange_pages_ref.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels import exchange_pages_ref, top_pages_ref
from vllm_heterocache.kernels.dependent_launch import has_dependent_launch, wait_for_last
from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, PageTables
from vllm_heterocache.kernels.top_pages import MAX_KEY, score_keys
from vllm_heterocache.kernels.values import PAGE_SIZE, DriftCounter, Protected

MAX_EXCHANGED = tl.constexpr(exchange_pages_ref.MAX_EXCHANGED)
PAGES_FETCHED = tl.constexpr(int(DriftCounter.PAGES_FETCHED))
# Log-sum-exps that a program looks at together, of all heads of a group. One look at 64K tokens is
# worth the registers: each further one is another round to the cache.
BLOCK_LSES = 16384
BLOCK_ENTRIES = 1024  # of a list
BLOCK_WORDS = 2048  # of each page under way from the host
NUM_WARPS = 16
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
    _, num_layers, num_kv_heads = tables.count.shape
    assert 0 <= layer < num_layers and tables.page_lse.is_contiguous()
    assert pages.shape[1:] == host_pages.shape[1:] and pages.dtype == host_pages.dtype
    assert pages.is_contiguous() and host_pages.is_contiguous() and pages.shape[1] == PAGE_SIZE
    assert rows.seq_lens.shape == rows.is_due.shape == (num_rows,)
    first, end = finders.first_of_layer[layer : layer + 2]
    if first == end:
        return
    page_words = pages.view(torch.int32)[0].numel()
    block_group = triton.next_power_of_2(group)
    is_dependent = has_dependent_launch()
    _exchange_pages_kernel[(end - first, num_rows)](
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
        finders.heads,
        finders.pivots,
        rows.row_to_table_slot,
        rows.seq_lens,
        rows.is_due,
        counters,
        tables.pivot_width,
        tables.satellite_width,
        tables.host_width,
        finders.heads.shape[0],
        first,
        num_layers * num_kv_heads,
        protected.sinks,
        protected.recent,
        GROUP=group,
        BLOCK_GROUP=block_group,
        BLOCK=max(MAX_EXCHANGED.value, BLOCK_LSES // block_group),
        BLOCK_ENTRIES=BLOCK_ENTRIES,
        PAGE_WORDS=page_words,
        BLOCK_WORDS=min(BLOCK_WORDS, triton.next_power_of_2(page_words)),
        IS_DEPENDENT=is_dependent,
        launch_pdl=is_dependent,
        num_warps=NUM_WARPS,
    )


@triton.jit(
    do_not_specialize=[
        "pivot_width", "satellite_width", "host_width", "num_finders", "first_finder",
        "heads_per_block", "sink_pages", "recent_pages",
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
    heads,
    pivots,
    row_to_table_slot,
    seq_lens,
    is_due,
    counters,
    pivot_width,
    satellite_width,
    host_width,
    num_finders,
    first_finder,
    heads_per_block,
    sink_pages,
    recent_pages,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Program (i_finder, i_row): the list of one finder of one request."""
    row = tl.program_id(1).to(tl.int64)
    finder = (first_finder + tl.program_id(0)).to(tl.int64)
    # asked for together: each answer takes a tenth of the time of the program
    num_tokens, row_is_due = tl.load(seq_lens + row), tl.load(is_due + row)
    slot = tl.load(row_to_table_slot + row).to(tl.int64)
    head, pivot = tl.load(heads + finder), tl.load(pivots + finder).to(tl.int64)
    num_pages, stripe = tl.load(prompt_pages + slot), tl.load(first_stripe + slot)
    if (num_tokens > 0) & (row_is_due != 0) & (num_pages > 0):
        list_index = slot * heads_per_block + head
        list_start, num_listed = tl.load(start + list_index), tl.load(count + list_index)
        first = stripe * pivot_width + pivot * num_pages
        wait_for_last(IS_DEPENDENT)  # for what `find_pages` found
        p_lse, p_score = page_lse + first * GROUP, scores + first
        p_resident = is_resident + stripe * satellite_width + finder * num_pages
        b_total = _total_lse(p_lse, num_pages, GROUP, BLOCK_GROUP, BLOCK)
        b_best = tl.full([BLOCK], BELOW_ALL, dtype=tl.int64)
        b_worst = tl.full([BLOCK], ABOVE_ALL, dtype=tl.int64)
        for begin in range(0, num_pages, BLOCK):
            o_page = begin + tl.arange(0, BLOCK)
            m_page = o_page < num_pages
            b_lse = _load_lse(p_lse, begin, num_pages, GROUP, BLOCK_GROUP, BLOCK)
            b_held = tl.load(p_resident + o_page, mask=m_page, other=0)
            b_score = tl.exp2(tl.max(b_lse - b_total[None, :], 1))
            tl.store(p_score + o_page, b_score, mask=m_page)
            m_protected = (o_page < sink_pages) | (o_page >= num_pages - recent_pages)
            b_key = tl.where(m_protected, MAX_KEY, score_keys(b_score)).to(tl.int64) << 32
            b_missing = b_key | (o_page.to(tl.int64) ^ LOW_BITS)
            b_missing = tl.where(m_page & (b_held == 0), b_missing, BELOW_ALL)
            b_listed = tl.where(m_page & (b_held != 0), b_key | o_page.to(tl.int64), ABOVE_ALL)
            b_best, b_worst = tl.maximum(b_best, b_missing), tl.minimum(b_worst, b_listed)
        b_best = tl.max(b_best.reshape(BLOCK // MAX_EXCHANGED, MAX_EXCHANGED), 0)
        b_worst = tl.min(b_worst.reshape(BLOCK // MAX_EXCHANGED, MAX_EXCHANGED), 0)
        b_best, b_worst = tl.sort(b_best, descending=True), tl.sort(b_worst)
        # a part that offers nothing to come is below all, one that offers none to go above all
        m_move = (b_best >> 32) > (b_worst >> 32)
        b_page = ((b_best & LOW_BITS) ^ LOW_BITS).to(tl.int32)
        b_gone = (b_worst & LOW_BITS).to(tl.int32)
        p_host_block = host_blocks + stripe * host_width + b_page
        b_source = tl.load(p_host_block, mask=m_move, other=0).to(tl.int64) * num_finders + finder
        b_entry = list_start + _entries_of(
            positions + list_start, b_gone, num_listed, BLOCK_ENTRIES
        )
        b_target = tl.load(entries + b_entry, mask=m_move, other=0).to(tl.int64)
        for begin in tl.static_range(0, PAGE_WORDS, BLOCK_WORDS):
            o_word = begin + tl.arange(0, BLOCK_WORDS)
            m_word = m_move[:, None] & (o_word < PAGE_WORDS)[None, :]
            p_source = host_pages + b_source[:, None] * PAGE_WORDS + o_word[None, :]
            p_target = pages + b_target[:, None] * PAGE_WORDS + o_word[None, :]
            tl.store(p_target, tl.load(p_source, mask=m_word, other=0), mask=m_word)
        tl.store(p_resident + b_gone, tl.zeros_like(b_gone).to(tl.int8), mask=m_move)
        tl.store(p_resident + b_page, (tl.zeros_like(b_page) + 1).to(tl.int8), mask=m_move)
        tl.store(positions + b_entry, b_page, mask=m_move)
        num_moves = tl.sum(m_move.to(tl.int64), 0)
        tl.atomic_add(counters + PAGES_FETCHED, num_moves, sem="relaxed")


@triton.jit
def _total_lse(
    p_lse, num_pages, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK_GROUP]: log-sum-exps over all pages."""
    b_max = tl.full([BLOCK_GROUP], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_GROUP], dtype=tl.float32)
    for begin in range(0, num_pages, BLOCK):
        b_lse = _load_lse(p_lse, begin, num_pages, GROUP, BLOCK_GROUP, BLOCK)
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_lse - b_new[None, :]), 0)
        b_max = b_new
    return b_max + tl.log2(b_sum)


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
def _entries_of(p_position, b_page, num_listed, BLOCK: tl.constexpr):
    """Where in a list pages are; a page stands there once at most."""
    b_found = tl.zeros([BLOCK, MAX_EXCHANGED], dtype=tl.int32)
    for begin in range(0, num_listed, BLOCK):
        o_entry = begin + tl.arange(0, BLOCK)
        b_listed = tl.load(p_position + o_entry, mask=o_entry < num_listed, other=-1)
        b_found += tl.where(b_listed[:, None] == b_page[None, :], o_entry[:, None], 0)
    return tl.sum(b_found, 0)
