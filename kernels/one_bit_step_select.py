"""The prompt pages that each head reads in this step, by one-bit keys (specification:
one_bit_step_select_ref.py).

Two launches a layer, as of `step_select`, whose second one chooses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.dot_types import DOT_TYPES
from vllm_heterocache.kernels.page_scores import MIN_GROUP
from vllm_heterocache.kernels.step_select import check_step, choose_pages, num_parts
from vllm_heterocache.kernels.tables import DecodeRows, PageTables, StepTables
from vllm_heterocache.kernels.top_pages import signed_keys
from vllm_heterocache.kernels.values import PAGE_SIZE, Protected

TILE_PAGES = 64  # pages whose keys a program looks at together, a token of each at a time
NUM_WARPS = 4


def one_bit_step_select(
    query: torch.Tensor,
    tables: PageTables,
    step: StepTables,
    rows: DecodeRows,
    layer: int,
    protected: Protected,
) -> None:
    """Fill the lists of one layer with the pages of the largest one-bit logits.

    Nothing is allocated and nothing waits for the device. Head geometry and dtype decide which
    variant is compiled; batch size, layer and prompt lengths do not.

    Args: as of `one_bit_step_select_ref`; `step.keys` is a workspace. D is a power of two, tensors
        are contiguous but for a stride between the rows of `query` and of the block table.
    """
    write_one_bit_keys(query, tables, step, rows, layer)
    choose_pages(tables, step, rows, layer, protected)


def write_one_bit_keys(
    query: torch.Tensor, tables: PageTables, step: StepTables, rows: DecodeRows, layer: int
) -> None:
    """The first launch: a key for each prompt page of every head that reads a part of them."""
    check_step(query, tables, step, rows, layer)
    num_rows, num_q_heads, head_dim = query.shape
    _, num_layers, num_kv_heads = tables.count.shape
    group = num_q_heads // num_kv_heads
    bits = step.bits
    assert bits is not None and bits.dtype == torch.uint8 and bits.is_contiguous()
    assert bits.shape == (step.summaries.shape[0], PAGE_SIZE // 8 * head_dim)
    _one_bit_keys_kernel[(num_parts(num_rows, num_kv_heads), num_kv_heads, num_rows)](
        query,
        step.summaries,
        bits,
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
        BYTES=PAGE_SIZE // 8,
        BLOCK_GROUP=max(MIN_GROUP, triton.next_power_of_2(group)),
        BLOCK_PAGES=TILE_PAGES,
        DOT_TYPE=DOT_TYPES[query.dtype],
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["stride_table_row", "key_width", "layer"])
def _one_bit_keys_kernel(
    query,
    summaries,
    bits,
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
    BYTES: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """Program (i_part, i_head, i_row): every num_parts-th tile of a head's pages. A channel has
    `BYTES` bytes of bits, one behind the other."""
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
        p_key = keys + tl.load(first_stripe + slot) * key_width + i_head.to(tl.int64) * num_pages
        first = i_part * BLOCK_PAGES
        for begin in tl.range(first, num_pages, tl.num_programs(0) * BLOCK_PAGES):
            o_page = begin + o_tile
            m_page = o_page < num_pages
            p_block = block_table + row * stride_table_row + o_page
            b_block = tl.load(p_block, mask=m_page, other=0).to(tl.int64)
            b_id = (b_block * NUM_LAYERS + layer) * num_kv_heads + i_head
            p_least = summaries + b_id[:, None] * (2 * HEAD_DIM) + o_dim[None, :]
            b_least = tl.load(p_least, mask=m_page[:, None], other=0.0).to(DOT_TYPE)  # [pages, D]
            b_largest = tl.load(p_least + HEAD_DIM, mask=m_page[:, None], other=0.0).to(DOT_TYPE)
            p_bits = bits + (b_id[:, None] * HEAD_DIM + o_dim[None, :]) * BYTES
            b_best = tl.full([BLOCK_PAGES, BLOCK_GROUP], -float("inf"), dtype=tl.float32)
            for i_byte in tl.static_range(BYTES):
                b_bits = tl.load(p_bits + i_byte, mask=m_page[:, None], other=0)
                for i_bit in tl.range(8):  # tokens 8 * i_byte + i_bit of all pages
                    b_key = tl.where(((b_bits >> i_bit) & 1) != 0, b_largest, b_least)
                    b_logit = tl.dot(b_key, b_query, input_precision="ieee")  # [pages, G]
                    b_best = tl.maximum(b_best, b_logit)
            b_best = tl.where(m_group[None, :], b_best, -float("inf"))
            tl.store(p_key + o_page, signed_keys(tl.max(b_best, 1)), mask=m_page)
