"""The pages that each head reads in this step, of those that it kept (specification:
hybrid_step_select_ref.py).

Two launches a layer, of a program for each (row, KV head). The first leaves a key and the page id
of every page that the head holds at the page's place in the prompt, so that the second reads them
in ascending order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.dot_types import DOT_TYPES
from vllm_heterocache.kernels.kv_scales import KVScales, check_scales
from vllm_heterocache.kernels.page_scores import MIN_GROUP
from vllm_heterocache.kernels.step_select import check_step
from vllm_heterocache.kernels.tables import DecodeRows, PageTables, StepTables
from vllm_heterocache.kernels.top_pages import MAX_KEY, kept_mask, lowest_loaded_key, score_keys
from vllm_heterocache.kernels.values import Protected

TILE_PAGES = 64  # summaries that a program reads together
BLOCK_KEYS = 2048  # keys that a program looks at together
NUM_WARPS = 8
LOG2_E = math.log2(math.e)
NOT_HELD = tl.constexpr(-1)  # the key of a page that the head does not hold, below all others


def hybrid_step_select(
    query: torch.Tensor,
    tables: PageTables,
    step: StepTables,
    rows: DecodeRows,
    layer: int,
    scale: float,
    protected: Protected,
    channel_share: float = 1.0,
    kv_scales: KVScales | None = None,
) -> None:
    """Let each list of one layer name its head's pages of the highest approximate attention.

    Nothing is allocated and nothing waits for the device. Head geometry, dtype and whether all
    channels are looked at decide which variant is compiled; batch size, layer and prompt lengths
    do not.

    Args: as of `hybrid_step_select_ref`; `step.keys` is a workspace, of which place `H * P` and
        those behind it hold the page ids of the first `H * P` places. D is a power of two, tensors
        are contiguous but for a stride between the rows of `query`.
    """
    check_step(query, tables, step, rows, layer)
    assert tables.idle_pages is not None and tables.idle_pages.is_contiguous()
    assert tables.entries.is_contiguous() and tables.positions.is_contiguous()
    num_rows, num_q_heads, head_dim = query.shape
    _, num_layers, num_kv_heads = tables.count.shape
    check_scales(step.summaries, kv_scales, tables.count.shape[1:])
    group = num_q_heads // num_kv_heads
    num_channels = math.ceil(head_dim * channel_share)
    grid = num_kv_heads, num_rows
    held = (
        step.keys,
        tables.entries,
        tables.positions,
        tables.start,
        tables.count,
        tables.idle_pages,
        tables.prompt_pages,
        tables.first_stripe,
        rows.row_to_table_slot,
        rows.seq_lens,
    )
    _approximate_attention_kernel[grid](
        query,
        step.summaries,
        *held,
        None if kv_scales is None else kv_scales.key,
        query.stride(0),
        step.key_width,
        layer,
        scale * LOG2_E,
        num_channels,
        protected.sinks,
        protected.recent,
        NUM_LAYERS=num_layers,
        GROUP=group,
        HEAD_DIM=head_dim,
        ALL_CHANNELS=num_channels == head_dim,
        BLOCK_GROUP=max(MIN_GROUP, triton.next_power_of_2(group)),
        BLOCK_PAGES=TILE_PAGES,
        BLOCK_KEYS=BLOCK_KEYS,
        DOT_TYPE=DOT_TYPES[query.dtype],
        num_warps=NUM_WARPS,
    )
    _permute_kernel[grid](
        *held,
        step.key_width,
        layer,
        NUM_LAYERS=num_layers,
        BLOCK=BLOCK_KEYS,
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["key_width", "layer", "num_channels", "sink_pages", "recent_pages"])
def _approximate_attention_kernel(
    query,
    summaries,
    keys,
    entries,
    positions,
    start,
    count,
    idle_pages,
    prompt_pages,
    first_stripe,
    row_to_table_slot,
    seq_lens,
    key_scales,
    stride_query_row,
    key_width,
    layer,
    scale_log2,
    num_channels,
    sink_pages,
    recent_pages,
    NUM_LAYERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALL_CHANNELS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """Program (i_head, i_row): key and id of each page that a head of a request holds."""
    i_head, num_kv_heads = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(row_to_table_slot + row).to(tl.int64)
    list_index = (slot * NUM_LAYERS + layer) * num_kv_heads + i_head
    num_idle = tl.load(idle_pages + list_index)
    if (tl.load(seq_lens + row) > 0) & (num_idle > 0):
        num_pages = tl.load(prompt_pages + slot)
        num_held = tl.load(count + list_index) + num_idle
        list_start = tl.load(start + list_index)
        p_key = keys + tl.load(first_stripe + slot) * key_width + i_head.to(tl.int64) * num_pages
        p_id = p_key + num_kv_heads.to(tl.int64) * num_pages
        for begin in range(0, num_pages, BLOCK_KEYS):
            o_page = begin + tl.arange(0, BLOCK_KEYS)
            tl.store(p_key + o_page, NOT_HELD, mask=o_page < num_pages)
        tl.debug_barrier()  # other threads write to these places

        o_dim = tl.arange(0, HEAD_DIM)
        o_group = tl.arange(0, BLOCK_GROUP)
        m_group = o_group < GROUP
        p_query = query + row * stride_query_row + (i_head * GROUP + o_group[None, :]) * HEAD_DIM
        b_query = tl.load(p_query + o_dim[:, None], mask=m_group[None, :], other=0.0)  # [D, G]
        b_size = tl.abs(b_query.to(tl.float32))
        b_side = tl.where(tl.sum(b_query.to(tl.float32), 1) > 0, HEAD_DIM, 0)  # [D]
        b_share = tl.full([BLOCK_GROUP], 1.0, dtype=tl.float32)
        if not ALL_CHANNELS:
            m_channel = _largest_mask(tl.sum(b_size, 1), num_channels, HEAD_DIM)[:, None]
            b_total = tl.where(m_group, tl.sum(b_size, 0), 1.0)
            b_share = tl.sum(tl.where(m_channel, b_size, 0.0), 0) / b_total
            b_query = tl.where(m_channel, b_query, tl.zeros_like(b_query))
        if key_scales is not None:  # fp8 pages
            scale_log2 *= tl.load(key_scales + layer * num_kv_heads + i_head)
        b_scale = tl.where(m_group, scale_log2 / tl.sqrt(tl.where(m_group, b_share, 1.0)), 0.0)
        b_query = b_query.to(DOT_TYPE)

        b_max = tl.full([BLOCK_GROUP], -float("inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_GROUP], dtype=tl.float32)
        for begin in tl.range(0, num_held, BLOCK_PAGES):
            o_entry = begin + tl.arange(0, BLOCK_PAGES)
            m_entry = o_entry < num_held
            b_id = tl.load(entries + list_start + o_entry, mask=m_entry, other=0).to(tl.int64)
            p_summary = summaries + b_id[:, None] * (2 * HEAD_DIM) + (b_side + o_dim)[None, :]
            b_key = tl.load(p_summary, mask=m_entry[:, None], other=0.0).to(DOT_TYPE)
            b_logit = tl.dot(b_key, b_query, input_precision="ieee") * b_scale[None, :]
            b_logit = tl.where(m_entry[:, None], b_logit, -float("inf"))  # [pages, G]
            b_new = tl.maximum(b_max, tl.max(b_logit, 0))
            b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_logit - b_new[None, :]), 0)
            b_max = b_new
        b_weight = tl.where(m_group, 1.0 / (b_sum * GROUP), 0.0)
        for begin in tl.range(0, num_held, BLOCK_PAGES):
            o_entry = begin + tl.arange(0, BLOCK_PAGES)
            m_entry = o_entry < num_held
            b_id = tl.load(entries + list_start + o_entry, mask=m_entry, other=0)
            b_page = tl.load(positions + list_start + o_entry, mask=m_entry, other=0)
            p_summary = summaries + b_id.to(tl.int64)[:, None] * (2 * HEAD_DIM)
            p_summary += (b_side + o_dim)[None, :]
            b_key = tl.load(p_summary, mask=m_entry[:, None], other=0.0).to(DOT_TYPE)
            b_logit = tl.dot(b_key, b_query, input_precision="ieee") * b_scale[None, :]
            b_score = tl.sum(tl.exp2(b_logit - b_max[None, :]) * b_weight[None, :], 1)
            m_protected = (b_page < sink_pages) | (b_page >= num_pages - recent_pages)
            b_rank = tl.where(m_protected, MAX_KEY, score_keys(b_score))
            tl.store(p_key + b_page, b_rank, mask=m_entry)
            tl.store(p_id + b_page, b_id, mask=m_entry)


@triton.jit
def _largest_mask(b_size, num_channels, HEAD_DIM: tl.constexpr):
    """Mask [D] of the channels of the largest sizes; of equal ones the first."""
    o_dim = tl.arange(0, HEAD_DIM)
    m_before = b_size[None, :] > b_size[:, None]
    m_before |= (b_size[None, :] == b_size[:, None]) & (o_dim[None, :] < o_dim[:, None])
    return tl.sum(m_before.to(tl.int32), 1) < num_channels


@triton.jit(do_not_specialize=["key_width", "layer"])
def _permute_kernel(
    keys,
    entries,
    positions,
    start,
    count,
    idle_pages,
    prompt_pages,
    first_stripe,
    row_to_table_slot,
    seq_lens,
    key_width,
    layer,
    NUM_LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i_head, i_row): the list of one head of one request, and its idle pages."""
    i_head, num_kv_heads = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(row_to_table_slot + row).to(tl.int64)
    list_index = (slot * NUM_LAYERS + layer) * num_kv_heads + i_head
    if (tl.load(seq_lens + row) > 0) & (tl.load(idle_pages + list_index) > 0):
        num_pages = tl.load(prompt_pages + slot)
        budget = tl.load(count + list_index)
        list_start = tl.load(start + list_index)
        p_key = keys + tl.load(first_stripe + slot) * key_width + i_head.to(tl.int64) * num_pages
        p_id = p_key + num_kv_heads.to(tl.int64) * num_pages
        low, num_low = lowest_loaded_key(_load_held, (p_key, num_pages), num_pages, budget, BLOCK)
        num_kept, num_idle, num_ties = 0, 0, 0
        for begin in range(0, num_pages, BLOCK):
            o_page = begin + tl.arange(0, BLOCK)
            m_held, b_key = _load_held(begin, (p_key, num_pages), BLOCK)
            m_keep, num_ties = kept_mask(b_key, m_held, low, num_low, num_ties)
            b_keep = m_keep.to(tl.int32)
            b_idle = m_held.to(tl.int32) - b_keep
            o_kept = num_kept + tl.cumsum(b_keep, 0) - 1
            o_idle = budget + num_idle + tl.cumsum(b_idle, 0) - 1
            o_entry = list_start + tl.where(m_keep, o_kept, o_idle)
            b_id = tl.load(p_id + o_page, mask=m_held, other=0)
            tl.store(positions + o_entry, o_page, mask=m_held)
            tl.store(entries + o_entry, b_id, mask=m_held)
            num_kept += tl.sum(b_keep, 0)
            num_idle += tl.sum(b_idle, 0)


@triton.jit
def _load_held(begin, pages, BLOCK: tl.constexpr):
    """Which pages from `begin` on the head holds, and their keys."""
    p_key, num_pages = pages
    o_page = begin + tl.arange(0, BLOCK)
    b_key = tl.load(p_key + o_page, mask=o_page < num_pages, other=NOT_HELD)
    return b_key != NOT_HELD, b_key
