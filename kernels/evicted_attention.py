"""What evicted tokens do to reference queries (specification: evicted_attention_ref.py)."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.dot_types import DOT_TYPES
from vllm_heterocache.kernels.evicted_attention_ref import EvictedAttention
from vllm_heterocache.kernels.soft_cap import LOG2_E, soft_capped

QUERIES, TOKENS = 64, 64  # of a tile
TILE_ELEMENTS = 64 * 128  # of keys, at most: a tile and the two before it lie in shared memory
NUM_WARPS, NUM_STAGES = 4, 3
PROGRAMS = 1024  # at least, where the prompt is long enough: several times what a GPU runs at once
LEAST_SPLIT = 1024  # tokens of a program


def evicted_attention(
    keys: torch.Tensor,
    values: torch.Tensor,
    is_evicted: torch.Tensor,
    queries: torch.Tensor,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> EvictedAttention:
    """Two launches: attention, which reads keys and values, and importance, which reads keys.

    Products are of bf16 or fp16. Each query is the sum of two such vectors, so that it is rounded
    by no more than 2**-16 of itself. Shares are rounded to the dtype of the values before they are
    multiplied by them.

    Args:
        keys, values: [B, T, D], bf16, fp16 or fp8; rows of D elements are contiguous, D a power of
            two and at least 16.
        is_evicted: [B, T] bool.
        queries: [B, N, D] fp32.
        sink_logits: [B, N] fp32; None: no sinks.
        soft_cap: of the logits (soft_cap_ref.py); 0: none.

    Returns:
        fp32 all.
    """
    num_heads, num_tokens, head_dim = keys.shape
    num_queries = queries.shape[1]
    assert head_dim == triton.next_power_of_2(head_dim) >= 16
    assert keys.stride(2) == values.stride(2) == 1 and is_evicted.is_contiguous()
    assert queries.dtype == torch.float32 and values.shape == keys.shape
    dtype = torch.float16 if keys.dtype == torch.float16 else torch.bfloat16
    assert sink_logits is None or sink_logits.shape == queries.shape[:2]
    assert keys.itemsize <= 2, f"no kernel for keys of {keys.dtype}"
    high = queries.to(dtype).contiguous()
    low = (queries - high.float()).to(dtype).contiguous()
    flags = is_evicted.view(torch.uint8)
    tokens = min(TOKENS, TILE_ELEMENTS // head_dim)
    tiles = triton.cdiv(num_queries, QUERIES)
    wanted = min(triton.cdiv(PROGRAMS, tiles * num_heads), triton.cdiv(num_tokens, LEAST_SPLIT))
    split = tokens * triton.cdiv(num_tokens, tokens * wanted)
    num_splits = triton.cdiv(num_tokens, split)
    largest = queries.new_empty(num_heads, num_splits, num_queries)
    total, evicted = torch.empty_like(largest), torch.empty_like(largest)
    partial = queries.new_empty(num_heads, num_splits, num_queries, head_dim)
    sizes = num_tokens, num_queries
    strides = keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)
    tile = {"DOT_TYPE": DOT_TYPES[dtype], "D": head_dim, "QUERIES": QUERIES, "TOKENS": tokens}
    launch = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
    cap_log2 = soft_cap * LOG2_E.value if soft_cap else None
    _attention_kernel[(tiles, num_splits, num_heads)](
        high, low, keys, values, flags, largest, total, evicted, partial,
        *sizes, split, *strides, cap_log2, **tile, **launch,
    )  # fmt: skip
    lse, share, output = _merge(largest, total, evicted, partial, sink_logits)
    importance = queries.new_empty(num_heads, num_tokens)
    _importance_kernel[(triton.cdiv(num_tokens, tokens), num_heads)](
        high, low, keys, flags, lse, importance, *sizes, *strides[:2], cap_log2, **tile, **launch
    )
    return EvictedAttention(lse, share, output, importance)


def _merge(
    largest: torch.Tensor,
    total: torch.Tensor,
    evicted: torch.Tensor,
    partial: torch.Tensor,
    sink_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LSE, share and output [B, N] from those of the splits [B, splits, N], powers of two."""
    most = largest.amax(1)
    if sink_logits is not None:
        sink = sink_logits * LOG2_E.value
        most = most.maximum(sink)
    scale = (largest - most[:, None]).exp2_()
    whole = (total * scale).sum(1)
    if sink_logits is not None:
        whole += (sink - most).exp2_()
    share = (evicted * scale).sum(1) / whole
    output = (partial * scale[..., None]).sum(1) / whole[..., None]
    return (most + whole.log2()) * math.log(2), share, output


@triton.jit(do_not_specialize=["num_tokens", "num_queries", "split"])
def _attention_kernel(
    high,
    low,
    keys,
    values,
    is_evicted,
    largest,
    total,
    evicted,
    partial,
    num_tokens,
    num_queries,
    split,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    cap_log2,
    DOT_TYPE: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program (i_tile, i_split, i_head): some queries of a head over some tokens."""
    i_tile, i_split, i_head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_splits = tl.num_programs(1)
    o_query = i_tile * QUERIES + tl.arange(0, QUERIES)
    o_column = tl.arange(0, D)
    is_query = o_query < num_queries
    o_high = (i_head * num_queries + o_query)[:, None] * D + o_column[None, :]
    b_high = tl.load(high + o_high, mask=is_query[:, None], other=0.0).to(DOT_TYPE)
    b_low = tl.load(low + o_high, mask=is_query[:, None], other=0.0).to(DOT_TYPE)
    b_largest = tl.full([QUERIES], float("-inf"), tl.float32)
    b_total = tl.zeros([QUERIES], tl.float32)
    b_evicted = tl.zeros([QUERIES], tl.float32)
    b_output = tl.zeros([QUERIES, D], tl.float32)
    first = i_split * split
    end = tl.minimum(first + split, num_tokens)
    p_key, p_value = keys + i_head * key_head_stride, values + i_head * value_head_stride
    p_flag = is_evicted + i_head * num_tokens
    for start in range(first, end, TOKENS):
        o_token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        is_token = o_token < end
        o_key = o_token[None, :] * key_stride + o_column[:, None]
        b_key = tl.load(p_key + o_key, mask=is_token[None, :], other=0.0)
        is_mine = tl.load(p_flag + o_token, mask=is_token, other=0) != 0
        o_value = o_token[:, None] * value_stride + o_column[None, :]
        b_value = tl.load(p_value + o_value, mask=is_mine[:, None], other=0.0)
        b_key = b_key.to(DOT_TYPE)
        b_logit = tl.dot(b_high, b_key, input_precision="ieee")
        b_logit = tl.dot(b_low, b_key, b_logit, input_precision="ieee") * LOG2_E
        if cap_log2 is not None:
            b_logit = soft_capped(b_logit, cap_log2)
        b_logit = tl.where(is_token[None, :], b_logit, float("-inf"))
        b_new = tl.maximum(b_largest, tl.max(b_logit, 1))
        b_scale = tl.exp2(b_largest - b_new)
        b_share = tl.exp2(b_logit - b_new[:, None])
        b_total = b_total * b_scale + tl.sum(b_share, 1)
        b_share = tl.where(is_mine[None, :], b_share, 0.0)
        b_evicted = b_evicted * b_scale + tl.sum(b_share, 1)
        b_share, b_value = b_share.to(high.dtype.element_ty).to(DOT_TYPE), b_value.to(DOT_TYPE)
        b_output = b_output * b_scale[:, None]
        b_output = tl.dot(b_share, b_value, b_output, input_precision="ieee")
        b_largest = b_new
    o_partial = (i_head * num_splits + i_split) * num_queries + o_query
    tl.store(largest + o_partial, b_largest, mask=is_query)
    tl.store(total + o_partial, b_total, mask=is_query)
    tl.store(evicted + o_partial, b_evicted, mask=is_query)
    p_partial = partial + o_partial[:, None] * D + o_column[None, :]
    tl.store(p_partial, b_output, mask=is_query[:, None])


@triton.jit(do_not_specialize=["num_tokens", "num_queries"])
def _importance_kernel(
    high,
    low,
    keys,
    is_evicted,
    lse,
    importance,
    num_tokens,
    num_queries,
    key_head_stride,
    key_stride,
    cap_log2,
    DOT_TYPE: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program (i_tile, i_head): some tokens of a head under all queries."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_token = (i_tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    o_column = tl.arange(0, D)
    is_token = o_token < num_tokens
    p_key = keys + i_head * key_head_stride + o_token[:, None] * key_stride + o_column[None, :]
    b_key = tl.load(p_key, mask=is_token[:, None], other=0.0).to(DOT_TYPE)
    b_sum = tl.zeros([TOKENS], tl.float32)
    for start in range(0, num_queries, QUERIES):
        o_query = i_head * num_queries + start + tl.arange(0, QUERIES)
        is_query = start + tl.arange(0, QUERIES) < num_queries
        o_high = o_query[None, :] * D + o_column[:, None]
        b_high = tl.load(high + o_high, mask=is_query[None, :], other=0.0).to(DOT_TYPE)
        b_low = tl.load(low + o_high, mask=is_query[None, :], other=0.0).to(DOT_TYPE)
        b_lse = tl.load(lse + o_query, mask=is_query, other=float("inf"))
        b_logit = tl.dot(b_key, b_high, input_precision="ieee")
        b_logit = tl.dot(b_key, b_low, b_logit, input_precision="ieee") * LOG2_E
        if cap_log2 is not None:
            b_logit = soft_capped(b_logit, cap_log2)
        b_sum += tl.sum(tl.exp2(2 * (b_logit - b_lse[None, :] * LOG2_E)), 1)
    o_flag = i_head * num_tokens + o_token
    is_mine = tl.load(is_evicted + o_flag, mask=is_token, other=0) != 0
    b_mean = tl.where(is_mine, b_sum / num_queries, -1.0)
    tl.store(importance + o_flag, b_mean, mask=is_token)
