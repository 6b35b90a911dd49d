"""Quantised keys of finders, and what they find by them (specification: quantized_keys_ref.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels import quantized_keys_ref
from vllm_heterocache.kernels.dot_types import DOT_TYPES
from vllm_heterocache.kernels.kv_scales import KVScales
from vllm_heterocache.kernels.page_scores import MIN_GROUP
from vllm_heterocache.kernels.soft_cap import LOG2_E, soft_capped
from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, PageTables
from vllm_heterocache.kernels.values import PAGE_SIZE

KEY_BITS = tl.constexpr(quantized_keys_ref.KEY_BITS)
MAX_CODE = tl.constexpr(quantized_keys_ref.MAX_CODE)
TILE_PAGES = 4  # pages that a program of `find_pages` looks at together
MAX_PROGRAMS = 1024  # of `find_pages`; a finder's pages are split until there are as many
QUANTIZE_WARPS, FIND_WARPS = 1, 4


def quantized_keys(
    pages: torch.Tensor,
    tables: PageTables,
    finders: FinderTables,
    table_slot: int,
    dense_blocks: torch.Tensor,
) -> None:
    """Note the quantised keys of a prompt, for every finder: one launch, a program for each page.

    Args: as of `quantized_keys_ref`; D is a power of two, tensors are contiguous. `dense_blocks`
        has the prompt's blocks alone.
    """
    head_dim = finders.codes.shape[1]
    assert pages.shape[1:] == (PAGE_SIZE, 2 * head_dim) and pages.is_contiguous()
    assert finders.bounds.shape[1:] == (2, head_dim)
    assert finders.codes.is_contiguous() and finders.bounds.is_contiguous()
    assert dense_blocks.ndim == 1 and dense_blocks.stride(0) == 1
    num_finders, num_pages = finders.heads.shape[0], dense_blocks.shape[0]
    if num_finders == 0 or num_pages == 0:
        return
    # one axis, as the others end at 65,535
    _quantized_keys_kernel[(num_finders * num_pages,)](
        pages,
        dense_blocks,
        finders.heads,
        tables.first_stripe,
        finders.codes,
        finders.bounds,
        table_slot,
        num_pages,
        finders.width,
        tables.count.shape[1] * tables.count.shape[2],
        HEAD_DIM=head_dim,
        PAGE_SIZE=PAGE_SIZE,
        num_warps=QUANTIZE_WARPS,
    )


def find_pages(
    query: torch.Tensor,
    tables: PageTables,
    finders: FinderTables,
    rows: DecodeRows,
    layer: int,
    scale: float,
    kv_scales: KVScales | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Leave the log-sum-exps of a layer's finders: one launch; its grid follows from the shapes.

    Nothing is allocated and nothing waits for the device.

    Args: as of `find_pages_ref`; D is a power of two, tensors are contiguous but for a stride
        between the rows of `query`.
    """
    num_rows, num_q_heads, head_dim = query.shape
    _, num_layers, num_kv_heads = tables.count.shape
    group = num_q_heads // num_kv_heads
    assert num_q_heads == num_kv_heads * group and 0 <= layer < num_layers
    assert query.stride()[1:] == (head_dim, 1) and finders.codes.shape[1] == head_dim
    assert rows.row_to_table_slot.shape == rows.seq_lens.shape == rows.is_due.shape == (num_rows,)
    assert tables.page_lse.is_contiguous() and tables.page_lse.shape[1] == group
    assert finders.bounds.dtype == query.dtype
    first, end = finders.first_of_layer[layer : layer + 2]
    if first == end:
        return
    num_parts = max(1, MAX_PROGRAMS // (num_rows * (end - first)))
    _find_pages_kernel[(num_parts, end - first, num_rows)](
        query,
        finders.codes,
        finders.bounds,
        finders.heads,
        finders.pivots,
        tables.page_lse,
        tables.prompt_pages,
        tables.first_stripe,
        rows.row_to_table_slot,
        rows.seq_lens,
        rows.is_due,
        None if kv_scales is None else kv_scales.key,
        query.stride(0),
        finders.width,
        tables.pivot_width,
        first,
        num_kv_heads,
        scale * LOG2_E.value,
        soft_cap * LOG2_E.value if soft_cap else None,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=PAGE_SIZE,
        BLOCK_GROUP=max(MIN_GROUP, triton.next_power_of_2(group)),
        BLOCK_PAGES=TILE_PAGES,
        DOT_TYPE=DOT_TYPES[query.dtype],
        num_warps=FIND_WARPS,
    )


@triton.jit(
    do_not_specialize=["table_slot", "num_pages", "width", "heads_per_block"],
    do_not_specialize_on_alignment=["dense_blocks"],
)
def _quantized_keys_kernel(
    pages,
    dense_blocks,
    heads,
    first_stripe,
    codes,
    bounds,
    table_slot,
    num_pages,
    width,
    heads_per_block,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Program i: page i % num_pages of finder i // num_pages."""
    i_finder, i_page = tl.program_id(0) // num_pages, tl.program_id(0) % num_pages
    block = tl.load(dense_blocks + i_page).to(tl.int64)
    page = block * heads_per_block + tl.load(heads + i_finder)
    place = tl.load(first_stripe + table_slot) * width + tl.program_id(0)
    o_token = tl.arange(0, PAGE_SIZE)
    o_dim = tl.arange(0, HEAD_DIM)
    p_key = pages + (page * PAGE_SIZE + o_token[:, None]) * (2 * HEAD_DIM) + o_dim[None, :]
    b_key = tl.load(p_key).to(tl.float32)  # [tokens, D]
    b_least, b_largest = tl.min(b_key, 0), tl.max(b_key, 0)
    # a division of Triton's is not rounded as torch's
    b_span = (b_largest - b_least)[None, :]
    b_distance = 2 * MAX_CODE * (b_key - b_least[None, :])
    b_code = tl.zeros([PAGE_SIZE, HEAD_DIM], dtype=tl.int32)
    for i_middle in tl.static_range(MAX_CODE):
        b_code += (b_distance >= (2 * i_middle + 1) * b_span).to(tl.int32)
    b_code = tl.where(b_span > 0, b_code, 0)
    b_word = tl.sum(b_code << (o_token * KEY_BITS)[:, None], 0)
    tl.store(codes + place * HEAD_DIM + o_dim, b_word)
    p_bound = bounds + place * (2 * HEAD_DIM) + o_dim
    tl.store(p_bound, b_least.to(bounds.dtype.element_ty))
    tl.store(p_bound + HEAD_DIM, b_largest.to(bounds.dtype.element_ty))


@triton.jit(do_not_specialize=["width", "pivot_width", "first_finder", "num_kv_heads"])
def _find_pages_kernel(
    query,
    codes,
    bounds,
    heads,
    pivots,
    page_lse,
    prompt_pages,
    first_stripe,
    row_to_table_slot,
    seq_lens,
    is_due,
    key_scales,
    stride_query_row,
    width,
    pivot_width,
    first_finder,
    num_kv_heads,
    scale_log2,
    cap_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """Program (i_part, i_finder, i_row): every num_parts-th tile of a finder's pages. All tokens of
    a tile are multiplied together: their products one after the other would take longer."""
    row = tl.program_id(2).to(tl.int64)
    if (tl.load(seq_lens + row) > 0) & (tl.load(is_due + row) != 0):
        finder = (first_finder + tl.program_id(1)).to(tl.int64)
        head = tl.load(heads + finder)
        slot = tl.load(row_to_table_slot + row).to(tl.int64)
        num_pages = tl.load(prompt_pages + slot)
        stripe = tl.load(first_stripe + slot)
        first_place = stripe * width + finder * num_pages
        first_lse = stripe * pivot_width + tl.load(pivots + finder).to(tl.int64) * num_pages
        o_dim = tl.arange(0, HEAD_DIM)
        o_shift = tl.arange(0, PAGE_SIZE) * KEY_BITS
        o_group = tl.arange(0, BLOCK_GROUP)
        m_group = o_group < GROUP
        o_query = (head % num_kv_heads) * GROUP + o_group
        p_query = query + row * stride_query_row + o_query[None, :] * HEAD_DIM + o_dim[:, None]
        b_query = tl.load(p_query, mask=m_group[None, :], other=0.0).to(DOT_TYPE)  # [D, G]
        if key_scales is not None:  # fp8 pages
            scale_log2 *= tl.load(key_scales + head)
        first = tl.program_id(0) * BLOCK_PAGES
        for begin in tl.range(first, num_pages, tl.num_programs(0) * BLOCK_PAGES):
            o_page = begin + tl.arange(0, BLOCK_PAGES)
            m_page = o_page < num_pages
            o_place = (first_place + o_page)[:, None]
            b_code = tl.load(codes + o_place * HEAD_DIM + o_dim, mask=m_page[:, None], other=0)
            p_bound = bounds + o_place * (2 * HEAD_DIM) + o_dim
            b_least = tl.load(p_bound, mask=m_page[:, None], other=0.0).to(tl.float32)
            b_largest = tl.load(p_bound + HEAD_DIM, mask=m_page[:, None], other=0.0)
            b_step = (b_largest.to(tl.float32) - b_least) / MAX_CODE
            b_level = (b_code[:, None, :] >> o_shift[None, :, None]) & MAX_CODE
            b_key = b_least[:, None, :] + b_level.to(tl.float32) * b_step[:, None, :]
            b_key = b_key.to(DOT_TYPE).reshape(BLOCK_PAGES * PAGE_SIZE, HEAD_DIM)
            b_logit = tl.dot(b_key, b_query, input_precision="ieee") * scale_log2
            if cap_log2 is not None:
                b_logit = soft_capped(b_logit, cap_log2)
            b_logit = b_logit.reshape(BLOCK_PAGES, PAGE_SIZE, BLOCK_GROUP)
            b_max = tl.max(b_logit, 1)
            b_sum = tl.sum(tl.exp2(b_logit - b_max[:, None, :]), 1)
            p_lse = page_lse + (first_lse + o_page)[:, None] * GROUP + o_group[None, :]
            tl.store(p_lse, b_max + tl.log2(b_sum), mask=m_page[:, None] & m_group[None, :])
