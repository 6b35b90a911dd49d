"""Quantised keys of finders (specification: quantized_keys_ref.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels import quantized_keys_ref
from vllm_heterocache.kernels.tables import FinderTables, PageTables
from vllm_heterocache.kernels.values import PAGE_SIZE

KEY_BITS = tl.constexpr(quantized_keys_ref.KEY_BITS)
MAX_CODE = tl.constexpr(quantized_keys_ref.MAX_CODE)
ZERO_CODE = tl.constexpr(quantized_keys_ref.ZERO_CODE)
HALVES = tl.constexpr(quantized_keys_ref.HALVES)
NUM_WARPS = 1


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
    head_dim = finders.codes.shape[2]
    assert pages.shape[1:] == (PAGE_SIZE, 2 * head_dim) and pages.is_contiguous()
    assert finders.grids.shape[1:] == (2, head_dim)
    assert finders.codes.is_contiguous() and finders.grids.is_contiguous()
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
        finders.grids,
        table_slot,
        num_pages,
        finders.width,
        tables.count.shape[1] * tables.count.shape[2],
        HEAD_DIM=head_dim,
        PAGE_SIZE=PAGE_SIZE,
        num_warps=NUM_WARPS,
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
    grids,
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
    HALF: tl.constexpr = PAGE_SIZE // HALVES
    b_word = b_code << ((o_token % HALF) * KEY_BITS)[:, None]
    b_word = tl.sum(b_word.reshape(HALVES, HALF, HEAD_DIM), 1)
    p_code = codes + (place * HALVES + tl.arange(0, HALVES)[:, None]) * HEAD_DIM + o_dim[None, :]
    tl.store(p_code, b_word.to(tl.int16))
    b_step = (b_largest - b_least) * (1 / MAX_CODE)
    p_zero = grids + place * (2 * HEAD_DIM) + o_dim
    tl.store(p_zero, (b_least - ZERO_CODE * b_step).to(grids.dtype.element_ty))
    tl.store(p_zero + HEAD_DIM, b_step.to(grids.dtype.element_ty))
