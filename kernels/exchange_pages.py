"""How finders fetch: a program for each part of a prompt (specification: exchange_pages_ref.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels import exchange_pages_ref, top_pages_ref
from vllm_heterocache.kernels.dependent_launch import (
    has_dependent_launch,
    let_next_begin,
    wait_for_last,
)
from vllm_heterocache.kernels.find_pages import programs_per_finder
from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, PageTables
from vllm_heterocache.kernels.top_pages import MAX_KEY, score_keys
from vllm_heterocache.kernels.values import PAGE_SIZE, DriftCounter, Protected

MAX_EXCHANGED = tl.constexpr(exchange_pages_ref.MAX_EXCHANGED)
PAGES_FETCHED = tl.constexpr(int(DriftCounter.PAGES_FETCHED))
# Log-sum-exps that a program looks at together, of all heads of a group: in a group of 4 its part
# of 64K tokens, and those of all programs that searched
BLOCK_LSES = 4096
BLOCK_ENTRIES = 1024  # of a list
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
    *,
    program_lse: torch.Tensor,
) -> None:
    """Fetch what the finders of one layer attend to: one launch, whose grid follows from shapes.

    Nothing is allocated and nothing waits for the device, so a CUDA graph may hold it.

    Args: as of `exchange_pages_ref`; tensors are contiguous and on the GPU, but for `host_pages`,
        which is pinned. A page has a power of two of bytes.
        program_lse: as `find_pages` left it for this layer and these rows.
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
    num_programs = programs_per_finder(num_rows, end - first)
    assert program_lse.is_contiguous() and program_lse.dtype == torch.float32
    assert program_lse.numel() >= num_rows * (end - first) * num_programs * group
    block_group = triton.next_power_of_2(group)
    is_dependent = has_dependent_launch()
    _exchange_pages_kernel[(MAX_EXCHANGED.value, end - first, num_rows)](
        pages.view(torch.int32),
        host_pages.view(torch.int32),
        tables.entries,
        tables.positions,
        tables.start,
        tables.count,
        tables.page_lse,
        program_lse,
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
        num_programs,
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
        BLOCK=BLOCK_LSES // block_group,
        BLOCK_ENTRIES=BLOCK_ENTRIES,
        PAGE_WORDS=pages.view(torch.int32)[0].numel(),
        IS_DEPENDENT=is_dependent,
        launch_pdl=is_dependent,
        num_warps=NUM_WARPS,
    )


@triton.jit(
    do_not_specialize=[
        "num_programs", "pivot_width", "satellite_width", "host_width", "num_finders",
        "first_finder", "heads_per_block", "sink_pages", "recent_pages",
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
    program_lse,
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
    num_programs,
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
    IS_DEPENDENT: tl.constexpr,
):
    """Program (i_part, i_finder, i_row): a part of the pages of one finder of one request.

    Parts share no page, and no entry whose page they would find."""
    row = tl.program_id(2).to(tl.int64)
    finder = (first_finder + tl.program_id(1)).to(tl.int64)
    let_next_begin(IS_DEPENDENT)
    # asked for together: each answer takes a tenth of the time of the program
    num_tokens, row_is_due = tl.load(seq_lens + row), tl.load(is_due + row)
    slot = tl.load(row_to_table_slot + row).to(tl.int64)
    head, pivot = tl.load(heads + finder), tl.load(pivots + finder).to(tl.int64)
    num_pages, stripe = tl.load(prompt_pages + slot), tl.load(first_stripe + slot)
    list_index = slot * heads_per_block + head
    list_start, num_listed = tl.load(start + list_index), tl.load(count + list_index)
    # For what `find_pages` found. Programs without work wait too, so that a kernel that waits for
    # this one has that as well.
    wait_for_last(IS_DEPENDENT)
    if (num_tokens > 0) & (row_is_due != 0) & (num_pages > 0):
        part, stride = tl.program_id(0), BLOCK * MAX_EXCHANGED
        o_page = part + tl.arange(0, BLOCK) * MAX_EXCHANGED
        first = stripe * pivot_width + pivot * num_pages
        p_lse, p_score = page_lse + first * GROUP, scores + first
        p_resident = is_resident + stripe * satellite_width + finder * num_pages
        search = row * tl.num_programs(1) + tl.program_id(1)
        p_program = program_lse + search * num_programs * GROUP
        # what is known of a block's pages is under way while something else is computed
        b_lse = _load_lse(p_lse, o_page, num_pages, GROUP, BLOCK_GROUP)
        b_held = tl.load(p_resident + o_page, mask=o_page < num_pages, other=0)
        b_total = _total_lse(p_program, num_programs, GROUP, BLOCK_GROUP, BLOCK)
        b_best = tl.full([BLOCK], BELOW_ALL, dtype=tl.int64)
        b_worst = tl.full([BLOCK], ABOVE_ALL, dtype=tl.int64)
        for _ in range(part, num_pages, stride):
            m_page = o_page < num_pages
            b_score = tl.exp2(tl.max(b_lse - b_total[None, :], 1))
            b_lse = _load_lse(p_lse, o_page + stride, num_pages, GROUP, BLOCK_GROUP)
            tl.store(p_score + o_page, b_score, mask=m_page)
            m_protected = (o_page < sink_pages) | (o_page >= num_pages - recent_pages)
            b_key = tl.where(m_protected, MAX_KEY, score_keys(b_score)).to(tl.int64) << 32
            b_missing = b_key | (o_page.to(tl.int64) ^ LOW_BITS)
            b_missing = tl.where(m_page & (b_held == 0), b_missing, BELOW_ALL)
            b_listed = tl.where(m_page & (b_held != 0), b_key | o_page.to(tl.int64), ABOVE_ALL)
            b_best, b_worst = tl.maximum(b_best, b_missing), tl.minimum(b_worst, b_listed)
            o_page += stride
            b_held = tl.load(p_resident + o_page, mask=o_page < num_pages, other=0)
        best, worst = tl.max(b_best, 0), tl.min(b_worst, 0)
        # a part that has nothing to come is below all, one that has nothing to go above all
        if (best >> 32) > (worst >> 32):
            page = (best & LOW_BITS) ^ LOW_BITS
            gone = worst & LOW_BITS
            o_word = tl.arange(0, PAGE_WORDS)
            host_block = tl.load(host_blocks + stripe * host_width + page).to(tl.int64)
            source = host_block * num_finders + finder
            # the page is under way from the host while its place is looked for
            b_word = tl.load(host_pages + source * PAGE_WORDS + o_word)
            entry = list_start + _entry_of(positions + list_start, gone, num_listed, BLOCK_ENTRIES)
            target = tl.load(entries + entry).to(tl.int64)
            tl.store(pages + target * PAGE_WORDS + o_word, b_word)
            tl.store(p_resident + gone, 0)
            tl.store(p_resident + page, 1)
            tl.store(positions + entry, page.to(tl.int32))
            tl.atomic_add(counters + PAGES_FETCHED, 1, sem="relaxed")


@triton.jit
def _total_lse(p_lse, num_lse, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK_GROUP]: the log-sum-exp of all; not all of the first block are -inf."""
    b_max = tl.full([BLOCK_GROUP], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_GROUP], dtype=tl.float32)
    for begin in range(0, num_lse, BLOCK):
        b_lse = _load_lse(p_lse, begin + tl.arange(0, BLOCK), num_lse, GROUP, BLOCK_GROUP)
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_lse - b_new[None, :]), 0)
        b_max = b_new
    return b_max + tl.log2(b_sum)


@triton.jit
def _load_lse(p_lse, o_lse, num_lse, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr):
    """[BLOCK, BLOCK_GROUP]; those that are not there are -inf, and a group's rest repeats it."""
    o_group = tl.arange(0, BLOCK_GROUP) % GROUP
    p_group = p_lse + o_lse[:, None] * GROUP + o_group[None, :]
    return tl.load(p_group, mask=(o_lse < num_lse)[:, None], other=-float("inf"))


@triton.jit
def _entry_of(p_position, page, num_listed, BLOCK: tl.constexpr):
    """Where in a list a page is; it stands there once."""
    b_found = tl.zeros([BLOCK], dtype=tl.int32)
    for begin in range(0, num_listed, BLOCK):
        o_entry = begin + tl.arange(0, BLOCK)
        b_listed = tl.load(p_position + o_entry, mask=o_entry < num_listed, other=-1)
        b_found += tl.where(b_listed == page, o_entry, 0)
    return tl.sum(b_found, 0)
