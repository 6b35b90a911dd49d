"""Kernels that call the ranking functions of top_pages.py alone, for their test.

Not in the test file: triton_mode must be imported before Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_heterocache.kernels.top_pages import score_keys, top_mask


@triton.jit
def key_kernel(scores, keys, num_pages, BLOCK: tl.constexpr):
    o_page = tl.arange(0, BLOCK)
    m_page = o_page < num_pages
    b_score = tl.load(scores + o_page, mask=m_page, other=0.0)
    tl.store(keys + o_page, score_keys(b_score), mask=m_page)


@triton.jit(do_not_specialize=["num_pages", "k"])
def mask_kernel(keys, is_valid, mask, num_pages, k, BLOCK: tl.constexpr):
    o_page = tl.arange(0, BLOCK)
    m_page = o_page < num_pages
    b_key = tl.load(keys + o_page, mask=m_page, other=1 << 19)
    m_valid = m_page & (tl.load(is_valid + o_page, mask=m_page, other=1) != 0)
    tl.store(mask + o_page, top_mask(b_key, m_valid, k).to(tl.int8))
