"""The prompt pages that each head reads in this step (specification: step_select_ref.py).

Two launches a layer, whose grids follow from the shapes alone. The programs of the first share
the summaries of a (row, KV head) and leave a key for each page; those of the second choose.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.dot_types import DOT_TYPES
from vllm_heterocache.kernels.kv_scales import FP8_DTYPES
from vllm_heterocache.kernels.page_scores import MIN_GROUP
from vllm_heterocache.kernels.tables import DecodeRows, PageTables, StepTables
from vllm_heterocache.kernels.top_pages import kept_mask, load_keys, lowest_key, signed_keys
from vllm_heterocache.kernels.values import Protected

TILE_PAGES = 64  # summaries that a program reads together
MAX_PROGRAMS = 1024  # of the first launch; a head's summaries are split until there are as many
# Keys that a program of the second launch looks at together. Holding all of them in registers,
# 16,384 at most, takes as long at 224K and four times as long at 32K (docs/performance.md).
BLOCK_KEYS = 2048
KEY_WARPS, CHOOSE_WARPS = 4, 8


def step_select(
    query: torch.Tensor,
    tables: PageTables,
    step: StepTables,
    rows: DecodeRows,
    layer: int,
    protected: Protected,
) -> None:
    """Fill the lists of one layer with the pages of the largest bounds on a logit.

    Nothing is allocated and nothing waits for the device. Head geometry and dtype decide which
    variant is compiled; batch size, layer and prompt lengths do not.

    Args: as of `step_select_ref`; D is a power of two, tensors are contiguous but for a stride
        between the rows of `query` and of the block table.
    """
    write_keys(query, tables, step, rows, layer)
    choose_pages(tables, step, rows, layer, protected)


def write_keys(
    query: torch.Tensor, tables: PageTables, step: StepTables, rows: DecodeRows, layer: int
) -> None:
    """The first launch: a key for each prompt page of every head that reads a part of them."""
    check_step(query, tables, step, rows, layer)
    num_rows, num_q_heads, head_dim = query.shape
    _, num_layers, num_kv_heads = tables.count.shape
    group = num_q_heads // num_kv_heads
    _keys_kernel[(num_parts(num_rows, num_kv_heads), num_kv_heads, num_rows)](
        query,
        step.summaries,
        step.keys,
        tables.count,
        tables.prompt_pages,
        tables.first_stripe,
        rows.row_to_table_slot,
        rows.block_table,
        rows.seq_lens,
        query.stride(0),
        rows.block_table.stride(0),
        step.key_width,
        layer,
        NUM_LAYERS=num_layers,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_GROUP=max(MIN_GROUP, triton.next_power_of_2(group)),
        BLOCK_PAGES=TILE_PAGES,
        DOT_TYPE=DOT_TYPES[query.dtype],
        num_warps=KEY_WARPS,
    )


def check_step(
    query: torch.Tensor, tables: PageTables, step: StepTables, rows: DecodeRows, layer: int
) -> None:
    """Raise AssertionError for tensors that a choice of pages cannot take."""
    num_rows, num_q_heads, head_dim = query.shape
    _, num_layers, num_kv_heads = tables.count.shape
    assert num_q_heads % num_kv_heads == 0 and 0 <= layer < num_layers
    assert query.stride()[1:] == (head_dim, 1)
    assert step.summaries.dtype in (query.dtype, *FP8_DTYPES)
    assert step.summaries.shape[1:] == (2, head_dim) and step.summaries.is_contiguous()
    assert step.keys.dtype == torch.int32 and step.keys.is_contiguous()
    assert rows.row_to_table_slot.shape == rows.seq_lens.shape == (num_rows,)
    assert rows.block_table.shape[0] == num_rows and rows.block_table.stride(1) == 1
    assert tables.start.is_contiguous() and tables.count.is_contiguous()


def num_parts(num_rows: int, num_kv_heads: int) -> int:
    """Programs that share the pages of a (row, KV head)."""
    return max(1, MAX_PROGRAMS // (num_rows * num_kv_heads))


def choose_pages(
    tables: PageTables,
    step: StepTables,
    rows: DecodeRows,
    layer: int,
    protected: Protected,
) -> None:
    """The second launch: the lists, by the keys of the first."""
    _, num_layers, num_kv_heads = tables.count.shape
    _choose_kernel[(num_kv_heads, rows.row_to_table_slot.shape[0])](
        step.keys,
        tables.entries,
        tables.positions,
        tables.start,
        tables.count,
        tables.prompt_pages,
        tables.first_stripe,
        rows.row_to_table_slot,
        rows.block_table,
        rows.seq_lens,
        rows.block_table.stride(0),
        step.key_width,
        layer,
        protected.sinks,
        protected.recent,
        NUM_LAYERS=num_layers,
        BLOCK=BLOCK_KEYS,
        num_warps=CHOOSE_WARPS,
    )


@triton.jit(do_not_specialize=["stride_table_row", "key_width", "layer"])
def _keys_kernel(
    query,
    summaries,
    keys,
    count,
    prompt_pages,
    first_stripe,
    row_to_table_slot,
    block_table,
    seq_lens,
    stride_query_row,
    stride_table_row,
    key_width,
    layer,
    NUM_LAYERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """Program (i_part, i_head, i_row): every num_parts-th tile of a head's summaries."""
    i_part, i_head = tl.program_id(0), tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    slot = tl.load(row_to_table_slot + row).to(tl.int64)
    num_pages = tl.load(prompt_pages + slot)
    budget = tl.load(count + (slot * NUM_LAYERS + layer) * num_kv_heads + i_head)
    if (tl.load(seq_lens + row) > 0) & (budget < num_pages):
        o_dim = tl.arange(0, HEAD_DIM)
        o_group = tl.arange(0, BLOCK_GROUP)
        o_tile = tl.arange(0, BLOCK_PAGES)
        m_group = o_group < GROUP
        p_query = query + row * stride_query_row + (i_head * GROUP + o_group[None, :]) * HEAD_DIM
        b_query = tl.load(p_query + o_dim[:, None], mask=m_group[None, :], other=0.0)  # [D, G]
        b_query = b_query.to(DOT_TYPE)
        b_zero = tl.zeros([HEAD_DIM, BLOCK_GROUP], dtype=DOT_TYPE)
        b_positive = tl.where(b_query > b_zero, b_query, b_zero)
        b_negative = tl.where(b_query < b_zero, b_query, b_zero)
        p_key = keys + tl.load(first_stripe + slot) * key_width + i_head.to(tl.int64) * num_pages
        first = i_part * BLOCK_PAGES
        for begin in tl.range(first, num_pages, tl.num_programs(0) * BLOCK_PAGES):
            o_page = begin + o_tile
            m_page = o_page < num_pages
            p_block = block_table + row * stride_table_row + o_page
            b_block = tl.load(p_block, mask=m_page, other=0).to(tl.int64)
            b_id = (b_block * NUM_LAYERS + layer) * num_kv_heads + i_head
            p_least = summaries + b_id[:, None] * (2 * HEAD_DIM) + o_dim[None, :]
            b_least = tl.load(p_least, mask=m_page[:, None], other=0.0)  # [pages, D]
            b_largest = tl.load(p_least + HEAD_DIM, mask=m_page[:, None], other=0.0)
            b_bound = tl.dot(b_largest.to(DOT_TYPE), b_positive, input_precision="ieee")
            b_bound = tl.dot(b_least.to(DOT_TYPE), b_negative, b_bound, input_precision="ieee")
            b_bound = tl.where(m_group[None, :], b_bound, -float("inf"))  # [pages, G]
            tl.store(p_key + o_page, signed_keys(tl.max(b_bound, 1)), mask=m_page)


@triton.jit(
    do_not_specialize=["stride_table_row", "key_width", "layer", "sink_pages", "recent_pages"]
)
def _choose_kernel(
    keys,
    entries,
    positions,
    start,
    count,
    prompt_pages,
    first_stripe,
    row_to_table_slot,
    block_table,
    seq_lens,
    stride_table_row,
    key_width,
    layer,
    sink_pages,
    recent_pages,
    NUM_LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i_head, i_row): the list of one head of one request."""
    i_head, num_kv_heads = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(row_to_table_slot + row).to(tl.int64)
    num_pages = tl.load(prompt_pages + slot)
    list_index = (slot * NUM_LAYERS + layer) * num_kv_heads + i_head
    budget = tl.load(count + list_index)
    if (tl.load(seq_lens + row) > 0) & (budget < num_pages):
        list_start = tl.load(start + list_index)
        p_key = keys + tl.load(first_stripe + slot) * key_width + i_head.to(tl.int64) * num_pages
        low, num_low = lowest_key(p_key, num_pages, sink_pages, recent_pages, budget, BLOCK)
        num_kept, num_ties = 0, 0
        for begin in range(0, num_pages, BLOCK):
            o_page, m_page, b_key = load_keys(
                p_key, begin, num_pages, sink_pages, recent_pages, BLOCK
            )
            m_keep, num_ties = kept_mask(b_key, m_page, low, num_low, num_ties)
            o_entry = list_start + num_kept + tl.cumsum(m_keep.to(tl.int32), 0) - 1
            p_block = block_table + row * stride_table_row + o_page
            b_block = tl.load(p_block, mask=m_keep, other=0)
            b_id = (b_block * NUM_LAYERS + layer) * num_kv_heads + i_head
            tl.store(positions + o_entry, o_page, mask=m_keep)
            tl.store(entries + o_entry, b_id, mask=m_keep)
            num_kept += tl.sum(m_keep.to(tl.int32), 0)
