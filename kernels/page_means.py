"""Mean pages: what evicted pages leave behind (specification: page_means_ref.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.tables import PageTables
from vllm_heterocache.kernels.values import PAGE_SIZE

NUM_WARPS = 4  # a page is 4 to 16 KiB
INT32_MAX = tl.constexpr(2147483647)


def page_means(
    pages: torch.Tensor, tables: PageTables, table_slot: int, dense_blocks: torch.Tensor
) -> None:
    """Fill the mean pages of a slot: one launch, which reads every evicted page once.

    Args:
        pages: [num_pages, 16, 2 * D], K then V; D is a power of two.
        tables: the lists of the slot are those that page_select chose, in ascending order.
        table_slot: its index.
        dense_blocks: [at least P] int32 block ids of the prompt.
    """
    num_layers, num_kv_heads = tables.count.shape[1:]
    width = pages.shape[2]
    assert pages.shape[1] == PAGE_SIZE and pages.is_contiguous()
    assert width == triton.next_power_of_2(width)
    assert dense_blocks.ndim == 1 and dense_blocks.stride(0) == 1
    assert tables.start.is_contiguous() and tables.count.is_contiguous()
    assert (
        tables.stand_in_pages.shape == tables.count.shape and tables.stand_in_pages.is_contiguous()
    )
    _page_means_kernel[(num_layers * num_kv_heads, PAGE_SIZE)](
        pages,
        tables.entries,
        tables.positions,
        tables.start,
        tables.count,
        tables.stand_in_pages,
        tables.prompt_pages,
        dense_blocks,
        table_slot,
        WIDTH=width,
        PAGE_SIZE=PAGE_SIZE,
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["table_slot"], do_not_specialize_on_alignment=["dense_blocks"])
def _page_means_kernel(
    pages,
    entries,
    positions,
    start,
    count,
    stand_in_pages,
    prompt_pages,
    dense_blocks,
    table_slot,
    WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Program (i_head, i_token): token i_token of every mean page of one head, l * H + h."""
    i_head, i_token = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(0)
    list_index = table_slot.to(tl.int64) * num_heads + i_head
    list_start = tl.load(start + list_index)
    num_listed = tl.load(count + list_index)
    num_means = tl.load(stand_in_pages + list_index)
    num_evicted = (tl.load(prompt_pages + table_slot) - num_listed).to(tl.int64)
    num_runs = num_means * PAGE_SIZE
    p_held = positions + list_start
    o_token = tl.arange(0, PAGE_SIZE)
    o_column = tl.arange(0, WIDTH)
    for mean in range(0, num_means):
        run = mean * PAGE_SIZE + i_token
        begin = (num_evicted * run // num_runs).to(tl.int32)
        end = (num_evicted * (run + 1) // num_runs).to(tl.int32)
        # evicted page number r is page r + k, if k listed pages lie before it
        k, high = 0, num_listed
        while k < high:
            middle = (k + high) // 2
            if tl.load(p_held + middle) - middle <= begin:
                k = middle + 1
            else:
                high = middle
        held = tl.load(p_held + k, mask=k < num_listed, other=INT32_MAX)
        b_sum = tl.zeros([WIDTH], dtype=tl.float32)
        for number in range(begin, end):
            while held - k <= number:
                k += 1
                held = tl.load(p_held + k, mask=k < num_listed, other=INT32_MAX)
            page = tl.load(dense_blocks + number + k).to(tl.int64) * num_heads + i_head
            o_row = page * PAGE_SIZE + o_token
            b_page = tl.load(pages + o_row[:, None] * WIDTH + o_column[None, :])
            b_sum += tl.sum(b_page.to(tl.float32), 0)
        b_mean = b_sum / ((end - begin) * PAGE_SIZE).to(tl.float32)
        target = tl.load(entries + list_start + num_listed + mean).to(tl.int64)
        p_target = pages + (target * PAGE_SIZE + i_token) * WIDTH + o_column
        tl.store(p_target, b_mean.to(pages.dtype.element_ty))
