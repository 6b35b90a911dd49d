"""Page summaries: the box around each page's keys (specification: page_summaries_ref.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.values import PAGE_SIZE

NUM_WARPS = 1  # a page's keys are 2 to 8 KiB


def page_summaries(
    pages: torch.Tensor, dense_blocks: torch.Tensor, pages_per_block: int, summaries: torch.Tensor
) -> None:
    """Least and largest K of each channel over the tokens of every page of some blocks: one
    launch, a program for each page.

    Args:
        pages: [num_pages, 16, 2 * D], K then V; D is a power of two.
        dense_blocks: [n] int32 ids of full blocks.
        pages_per_block: layers times KV heads.
        summaries: [num_pages, 2, D] in the pages' dtype, written at the pages of these blocks.
    """
    head_dim = summaries.shape[2]
    assert pages.shape[1:] == (PAGE_SIZE, 2 * head_dim) and pages.dtype == summaries.dtype
    assert summaries.shape == (pages.shape[0], 2, head_dim)
    assert pages.is_contiguous() and summaries.is_contiguous()
    assert dense_blocks.ndim == 1 and dense_blocks.stride(0) == 1
    assert head_dim == triton.next_power_of_2(head_dim)
    if dense_blocks.shape[0] == 0:
        return
    # one axis, as the others end at 65,535
    _page_summaries_kernel[(pages_per_block * dense_blocks.shape[0],)](
        pages,
        dense_blocks,
        summaries,
        pages_per_block,
        HEAD_DIM=head_dim,
        PAGE_SIZE=PAGE_SIZE,
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize_on_alignment=["dense_blocks"])
def _page_summaries_kernel(
    pages,
    dense_blocks,
    summaries,
    pages_per_block,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Program i_page: one page, counted over the pages of all blocks in turn."""
    i_block, i_page = tl.program_id(0) // pages_per_block, tl.program_id(0) % pages_per_block
    page = tl.load(dense_blocks + i_block).to(tl.int64) * pages_per_block + i_page
    o_token = tl.arange(0, PAGE_SIZE)
    o_dim = tl.arange(0, HEAD_DIM)
    p_key = pages + (page * PAGE_SIZE + o_token[:, None]) * (2 * HEAD_DIM) + o_dim[None, :]
    b_key = tl.load(p_key).to(tl.float32)  # [tokens, D]
    p_summary = summaries + page * (2 * HEAD_DIM) + o_dim
    tl.store(p_summary, tl.min(b_key, 0).to(summaries.dtype.element_ty))
    tl.store(p_summary + HEAD_DIM, tl.max(b_key, 0).to(summaries.dtype.element_ty))
