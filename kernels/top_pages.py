"""Ranking of pages inside a program, without a sort (specification: top_pages_ref.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_heterocache.kernels import top_pages_ref

KEY_SHIFT = tl.constexpr(top_pages_ref.KEY_SHIFT)
MAX_KEY = tl.constexpr(top_pages_ref.MAX_KEY)
KEY_BITS = tl.constexpr(20)
SIGNED_SHIFT = tl.constexpr(top_pages_ref.SIGNED_SHIFT)
SIGNED_OFFSET = tl.constexpr(top_pages_ref.SIGNED_OFFSET)


@triton.jit
def score_keys(b_score):
    """int32 keys in the order of fp32 scores that are not negative."""
    return b_score.to(tl.int32, bitcast=True) >> KEY_SHIFT


@triton.jit
def signed_keys(b_score):
    """int32 keys in the order of fp32 scores of any sign."""
    b_bits = b_score.to(tl.int32, bitcast=True)
    return ((b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)) >> SIGNED_SHIFT) + SIGNED_OFFSET


@triton.jit
def load_keys(p_rank, begin, num_pages, sink_pages, recent_pages, BLOCK: tl.constexpr):
    """Pages of a block, which of them are there, and their keys; protected pages rank first.

    `p_rank` points to the pages' fp32 scores, which are not negative, or to int32 keys.
    """
    o_page = begin + tl.arange(0, BLOCK)
    m_page = o_page < num_pages
    b_key = tl.load(p_rank + o_page, mask=m_page, other=0)
    if p_rank.dtype.element_ty == tl.float32:
        b_key = score_keys(b_key)
    m_protected = (o_page < sink_pages) | (o_page >= num_pages - recent_pages)
    return o_page, m_page, tl.where(m_protected, MAX_KEY, b_key)


@triton.jit
def lowest_key(p_rank, num_pages, sink_pages, recent_pages, k, BLOCK: tl.constexpr):
    """Lowest key of the k best pages, and how many pages of that key are among them. Arguments as
    of `load_keys`."""
    pages = p_rank, num_pages, sink_pages, recent_pages
    return lowest_loaded_key(_load_pages, pages, num_pages, k, BLOCK)


@triton.jit
def _load_pages(begin, pages, BLOCK: tl.constexpr):
    p_rank, num_pages, sink_pages, recent_pages = pages
    o_page, m_page, b_key = load_keys(p_rank, begin, num_pages, sink_pages, recent_pages, BLOCK)
    return m_page, b_key


@triton.jit
def lowest_loaded_key(load: tl.constexpr, source, num_places, k, BLOCK: tl.constexpr):
    """Lowest of the k largest keys, and how many of that key are among them.

    By bisection, reading from the cache again and again, so that one compiled variant serves
    prompts of all lengths.

    `load(begin, source, BLOCK)` returns which of the places from `begin` on count, and their keys.
    """
    low, high = 0, MAX_KEY + 1
    num_above = 0
    for _ in range(KEY_BITS):
        # low: at least k keys are as large; high: num_above are, which are fewer than k
        middle = (low + high) // 2
        b_count = tl.zeros([BLOCK], dtype=tl.int32)
        for begin in range(0, num_places, BLOCK):
            m_valid, b_key = load(begin, source, BLOCK)
            b_count += (m_valid & (b_key >= middle)).to(tl.int32)
        count = tl.sum(b_count, 0)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        num_above = tl.where(enough, num_above, count)
    return low, k - num_above


@triton.jit
def kept_mask(b_key, m_valid, low, num_low, num_ties):
    """Mask of a block's pages above key `low` and of the first `num_low` of that key, and the
    pages of that key so far; `num_ties` were in the blocks before."""
    m_tie = m_valid & (b_key == low)
    b_tie = num_ties + tl.cumsum(m_tie.to(tl.int32), 0)
    m_keep = (m_valid & (b_key > low)) | (m_tie & (b_tie <= num_low))
    return m_keep, num_ties + tl.sum(m_tie.to(tl.int32), 0)


@triton.jit
def top_mask(b_key, m_valid, k):
    """Mask of the k largest valid keys; of equal ones the first. k is at most the valid ones."""
    low = 0
    high = MAX_KEY + 1
    for _ in range(KEY_BITS):
        # low: enough keys are at least as large; high: too few are
        middle = (low + high) // 2
        enough = tl.sum((m_valid & (b_key >= middle)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    num_above = tl.sum((m_valid & (b_key > low)).to(tl.int32), 0)
    m_top, m_tie = kept_mask(b_key, m_valid, low, k - num_above, 0)
    return m_top
