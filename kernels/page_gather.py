"""Copies of whole pages between (or within) page pools (specification: README.md).

The source may be a pool in pinned host memory: the kernel then reads it over the bus, which for
pages of 4 KiB and more needs no staging buffer and no copy per page.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.kept_launch import KeptLaunch

BLOCK_WORDS = 1024  # 4-byte words a program copies, where each copy has programs of its own
# A program of a counted gather has this many words under way. Few large programs keep the bus
# busy from few SMs: kernels that need whole SMs, as cuBLAS's do, would wait for small ones that
# sit everywhere.
SHARED_WORDS, SHARED_WARPS = 8192, 32


def page_gather(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
    num_copies: torch.Tensor | None = None,
    num_programs: int | None = None,
) -> None:
    """Copy page source_ids[i] of `source` to page target_ids[i] of `target`.

    Args:
        source, target: [num_pages, page_size, 2 * head_dim], contiguous, on the GPU or pinned;
            may be one tensor, as long as no copy writes a page that another one reads.
        source_ids, target_ids: [max_copies] integer page ids on the GPU; the target ids in use
            are distinct.
        num_copies: [1] int32 on the GPU, how many of the copies to make; all where None. It is
            read on the device: the host need not know it.
        num_programs: with `num_copies`, programs that share the copies, each large enough for an
            SM of its own; a kernel beside others should not take all SMs. By default each copy
            has its own.
    """
    page_gather_launch(source, source_ids, target, target_ids, num_copies, num_programs)()


def page_gather_launch(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
    num_copies: torch.Tensor | None = None,
    num_programs: int | None = None,
) -> Callable[[], None]:
    """The launch of `page_gather` with these tensors."""
    assert source.shape[1:] == target.shape[1:] and source.dtype == target.dtype
    assert source.is_contiguous() and target.is_contiguous()
    assert source_ids.shape == target_ids.shape and source_ids.ndim == 1
    assert source_ids.is_contiguous() and target_ids.is_contiguous()
    page_bytes = source[0].numel() * source.element_size()
    assert page_bytes % 4 == 0
    max_copies = source_ids.shape[0]
    if num_copies is None:
        assert num_programs is None
    page_words = page_bytes // 4
    block = triton.next_power_of_2(page_words)
    if num_programs is None:
        block = min(BLOCK_WORDS, block)
        pages, warps = 1, max(1, min(8, block // 128))
    else:
        block = min(SHARED_WORDS, block)
        pages, warps = SHARED_WORDS // block, SHARED_WARPS
    launch = KeptLaunch(
        _page_gather_kernel,
        source.view(torch.int32),
        source_ids,
        target.view(torch.int32),
        target_ids,
        source_ids if num_copies is None else num_copies,
        PAGE_WORDS=page_words,
        PAGES=pages,
        BLOCK=block,
        COUNTED=num_copies is not None,
        num_warps=warps,
    )
    programs = min(num_programs or max_copies, max_copies)
    return partial(launch, programs, triton.cdiv(page_words, block))


@triton.jit(do_not_specialize_on_alignment=["source_ids", "target_ids"])
def _page_gather_kernel(
    source,
    source_ids,
    target,
    target_ids,
    num_copies,
    PAGE_WORDS: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Program (i_program, i_block): BLOCK words of PAGES copies at a time."""
    o_word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * PAGES
    end = first + PAGES
    if COUNTED:
        end = tl.load(num_copies)
    for begin in range(first, end, tl.num_programs(0) * PAGES):
        o_copy = begin + tl.arange(0, PAGES)
        b_source = tl.load(source_ids + o_copy, mask=o_copy < end, other=0).to(tl.int64)
        b_target = tl.load(target_ids + o_copy, mask=o_copy < end, other=0).to(tl.int64)
        m_word = (o_copy < end)[:, None] & (o_word < PAGE_WORDS)[None, :]
        p_source = source + b_source[:, None] * PAGE_WORDS + o_word[None, :]
        p_target = target + b_target[:, None] * PAGE_WORDS + o_word[None, :]
        tl.store(p_target, tl.load(p_source, mask=m_word), mask=m_word)
