"""Decode attention over per-head page lists (specification: README.md and paged_decode_ref.py).

A *segment* is all that one (row, KV head) reads: its listed pages, then the live tail of the
row's block table. The segments of a layer, laid end to end, make one flat list of pages. It is
cut into equal shares, one for each program, wherever the segments begin and end, so that heads of
very unequal lengths keep every SM equally busy:

    segment      0            1    2       3
    pages   |............|....|.|..........|
    program |  0   |   1   |   2   |   3   |      `share` pages each

A program that holds a whole segment writes its output. Otherwise it leaves a partial softmax in
the workspace, and a second launch merges. A program has at most two partials: one of a segment
that began before its share and one of a segment that goes on behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels import tuning

PAGE_SIZE = 16
MIN_DOT = 8  # a group's query heads are padded to at least these many rows of a tile
DOT_TYPES = {
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    # Triton's interpreter multiplies bfloat16 as if it were uint16
    torch.bfloat16: tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
}
LOG2_E = 1.4426950408889634
MERGE_PARTIALS = 64
MERGE_DIM = 32
SCORE_PAGES = 256


class PageTables(NamedTuple):
    """The page lists of all slots, as `PageTable` holds them."""

    entries: torch.Tensor  # [num_entries] int32 page ids
    start: torch.Tensor  # [num_slots + 1, num_layers, num_kv_heads] int64
    count: torch.Tensor  # [num_slots + 1, num_layers, num_kv_heads] int32
    prompt_pages: torch.Tensor  # [num_slots + 1] int32, first block-table index of the tail


class DecodeRows(NamedTuple):
    """The rows of a decode batch. A padded row has `seq_lens` 0."""

    row_to_slot: torch.Tensor  # [num_rows] int32 or int64
    block_table: torch.Tensor  # [num_rows, max_blocks] int32
    seq_lens: torch.Tensor  # [num_rows] int32, tokens, the current one included


@dataclass(frozen=True)
class DecodeWorkspace:
    """Everything the launches need besides inputs and outputs, at addresses that never change."""

    num_programs: int
    first_page: torch.Tensor  # [num_layers, max_rows * H + 1] int32, prefix sum of segment pages
    first_score: torch.Tensor  # same shape, int32, prefix sum of listed pages of scored heads
    partial_out: torch.Tensor  # [2 * num_programs, G, D] fp32
    partial_lse: torch.Tensor  # [2 * num_programs, G] fp32, base 2
    head_lse: torch.Tensor  # [max_rows * H, G] fp32, base 2
    page_lse: torch.Tensor  # [max_scored_pages, G] fp32, base 2

    @classmethod
    def allocate(
        cls,
        max_rows: int,
        num_layers: int,
        num_kv_heads: int,
        group: int,
        head_dim: int,
        max_scored_pages: int,
        device: torch.device,
        num_programs: int | None = None,
    ) -> DecodeWorkspace:
        """Take the memory for batches of up to `max_rows` rows.

        Args:
            max_scored_pages: most listed pages that the scored heads of one layer have together
                in one batch.
            num_programs: programs of the launch; by default as many as the tuned launch keeps
                resident on the device.
        """
        if num_programs is None:
            sms = torch.cuda.get_device_properties(device).multi_processor_count
            num_programs = sms * tuning.PAGED_DECODE[head_dim].programs_per_sm
        segments = max_rows * num_kv_heads

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            num_programs,
            zeros(num_layers, segments + 1, dtype=torch.int32),
            zeros(num_layers, segments + 1, dtype=torch.int32),
            zeros(2 * num_programs, group, head_dim, dtype=torch.float32),
            zeros(2 * num_programs, group, dtype=torch.float32),
            zeros(segments, group, dtype=torch.float32),
            zeros(max(max_scored_pages, 1), group, dtype=torch.float32),
        )


def plan_decode(
    tables: PageTables,
    rows: DecodeRows,
    is_scored: torch.Tensor,
    workspace: DecodeWorkspace,
) -> None:
    """Lay out the work of all layers: once a step, before the first `paged_decode` of the step.

    Args:
        is_scored: [num_layers, num_kv_heads] bool, heads whose page scores are wanted.
    """
    num_rows = rows.seq_lens.shape[0]
    _, num_layers, num_kv_heads = tables.count.shape
    num_segments = num_rows * num_kv_heads
    assert tables.start.shape == tables.count.shape and is_scored.shape == tables.count.shape[1:]
    assert rows.row_to_slot.shape == rows.seq_lens.shape
    assert num_segments < workspace.first_page.shape[1]
    assert workspace.first_page.shape == workspace.first_score.shape
    assert tables.count.is_contiguous() and is_scored.is_contiguous()
    _plan_kernel[(num_layers,)](
        tables.count,
        tables.prompt_pages,
        rows.row_to_slot,
        rows.seq_lens,
        is_scored.view(torch.int8),
        workspace.first_page,
        workspace.first_score,
        workspace.first_page.stride(0),
        num_segments,
        NUM_LAYERS=num_layers,
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=PAGE_SIZE,
        BLOCK_SEGMENTS=triton.next_power_of_2(num_segments),
        num_warps=4 if num_segments <= 1024 else 8,
    )


def paged_decode(
    query: torch.Tensor,
    pages: torch.Tensor,
    tables: PageTables,
    rows: DecodeRows,
    workspace: DecodeWorkspace,
    layer: int,
    scale: float,
    output: torch.Tensor,
    scores: torch.Tensor | None = None,
    launch: tuning.PagedDecodeLaunch | None = None,
) -> None:
    """Decode attention in which each KV head reads only its own pages and the live tail.

    `plan_decode` must have run for these tables and rows. Nothing is allocated and nothing waits
    for the device; shapes alone decide the grid.

    Args:
        query: [num_rows, num_q_heads, head_dim].
        pages: [num_pages, page_size, 2 * head_dim], K then V.
        layer: index of this layer, 0 <= layer < num_layers.
        scale: softmax scale.
        output: [num_rows, num_q_heads, head_dim], written; rows without tokens become zeros.
        scores: [num_entries] fp32; the entries of heads that `plan_decode` was told to score
            receive their page scores, others stay as they are. None: no scores are wanted.
        launch: launch settings other than the tuned ones.
    """
    num_rows, num_q_heads, head_dim = query.shape
    _, num_layers, num_kv_heads = tables.count.shape
    group = num_q_heads // num_kv_heads
    num_segments = num_rows * num_kv_heads
    launch = launch or tuning.PAGED_DECODE[head_dim]
    assert output.shape == query.shape and output.dtype == query.dtype == pages.dtype
    assert pages.shape[1:] == (PAGE_SIZE, 2 * head_dim) and pages.is_contiguous()
    assert num_q_heads % num_kv_heads == 0 and group <= 16
    assert query.stride()[1:] == output.stride()[1:] == (head_dim, 1)
    assert rows.block_table.stride(1) == 1 and rows.block_table.shape[0] == num_rows
    assert rows.row_to_slot.shape == rows.seq_lens.shape == (num_rows,)
    assert tables.start.is_contiguous() and tables.count.is_contiguous()
    assert workspace.partial_out.shape == (2 * workspace.num_programs, group, head_dim)
    assert num_segments < workspace.first_page.shape[1] and 0 <= layer < num_layers
    assert launch.tile_tokens % PAGE_SIZE == 0
    _decode_kernel[(workspace.num_programs,)](
        query,
        pages,
        tables.entries,
        tables.start,
        tables.count,
        tables.prompt_pages,
        rows.row_to_slot,
        rows.block_table,
        rows.seq_lens,
        workspace.first_page,
        workspace.first_score,
        workspace.partial_out,
        workspace.partial_lse,
        workspace.head_lse,
        workspace.page_lse,
        output,
        workspace.first_page.stride(0),
        query.stride(0),
        output.stride(0),
        rows.block_table.stride(0),
        layer,
        num_segments,
        scale * LOG2_E,
        NUM_LAYERS=num_layers,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=PAGE_SIZE,
        BLOCK_SEGMENTS=triton.next_power_of_2(num_segments),
        BLOCK_GROUP=max(MIN_DOT, triton.next_power_of_2(group)),
        BLOCK_TOKENS=launch.tile_tokens,
        WITH_SCORES=scores is not None,
        DOT_TYPE=DOT_TYPES[pages.dtype],
        SCORE_TYPE=DOT_TYPES[torch.bfloat16],
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    _merge_kernel[(num_segments * group, head_dim // MERGE_DIM)](
        workspace.first_page,
        workspace.partial_out,
        workspace.partial_lse,
        workspace.head_lse,
        output,
        workspace.first_page.stride(0),
        output.stride(0),
        layer,
        num_segments,
        workspace.num_programs,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        TILE_PAGES=launch.tile_tokens // PAGE_SIZE,
        BLOCK_PARTIALS=MERGE_PARTIALS,
        BLOCK_DIM=MERGE_DIM,
        num_warps=4,
    )
    if scores is not None:
        programs = max(1, workspace.num_programs // num_segments)
        _score_kernel[(num_segments, programs)](
            tables.start,
            rows.row_to_slot,
            workspace.first_score,
            workspace.head_lse,
            workspace.page_lse,
            scores,
            workspace.first_score.stride(0),
            layer,
            NUM_LAYERS=num_layers,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            BLOCK_GROUP=triton.next_power_of_2(group),
            BLOCK_PAGES=SCORE_PAGES,
            num_warps=4,
        )


@triton.jit
def _plan_kernel(
    count,
    prompt_pages,
    row_to_slot,
    seq_lens,
    is_scored,
    first_page,
    first_score,
    stride_first_layer,
    num_segments,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
):
    """Program i_layer: prefix sums over the segments of one layer."""
    i_layer = tl.program_id(0)
    o_segment = tl.arange(0, BLOCK_SEGMENTS)
    m_segment = o_segment < num_segments
    o_row = o_segment // NUM_KV_HEADS
    o_head = o_segment % NUM_KV_HEADS
    b_tokens = tl.load(seq_lens + o_row, mask=m_segment, other=0)
    b_slot = tl.load(row_to_slot + o_row, mask=m_segment, other=0).to(tl.int64)
    p_count = count + (b_slot * NUM_LAYERS + i_layer) * NUM_KV_HEADS + o_head
    m_row = m_segment & (b_tokens > 0)
    b_count = tl.load(p_count, mask=m_row, other=0)
    b_tail = b_tokens - tl.load(prompt_pages + b_slot, mask=m_row, other=0) * PAGE_SIZE
    b_pages = tl.where(m_row, b_count + (b_tail + PAGE_SIZE - 1) // PAGE_SIZE, 0)
    b_scored = tl.load(is_scored + i_layer * NUM_KV_HEADS + o_head, mask=m_row, other=0)
    b_score_pages = tl.where(b_scored != 0, b_count, 0)
    p_first = i_layer * stride_first_layer + 1 + o_segment
    tl.store(first_page + p_first, tl.cumsum(b_pages, 0), mask=m_segment)
    tl.store(first_score + p_first, tl.cumsum(b_score_pages, 0), mask=m_segment)
    # element 0 of each prefix sum stays zero from allocation


@triton.jit
def _decode_kernel(
    query,
    pages,
    entries,
    start,
    count,
    prompt_pages,
    row_to_slot,
    block_table,
    seq_lens,
    first_page,
    first_score,
    partial_out,
    partial_lse,
    head_lse,
    page_lse,
    output,
    stride_first_layer,
    stride_query_row,
    stride_output_row,
    stride_table_row,
    layer,
    num_segments,
    scale_log2,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WITH_SCORES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    SCORE_TYPE: tl.constexpr,
):
    """Program i_program: `share` pages of the flat list of all segments, segment by segment.

    Page ids are loaded inside the loop on purpose: Triton pipelines the two dependent loads, ids
    then K and V, by half of `num_stages - 1` each, which is why odd stage counts pay.
    """
    i_program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    TILE_PAGES: tl.constexpr = BLOCK_TOKENS // PAGE_SIZE
    SCORE_COLUMNS: tl.constexpr = TILE_PAGES if TILE_PAGES > 8 else 8
    first_page += layer * stride_first_layer
    first_score += layer * stride_first_layer
    o_segment = tl.arange(0, BLOCK_SEGMENTS)
    o_token = tl.arange(0, BLOCK_TOKENS)
    o_dim = tl.arange(0, HEAD_DIM)
    o_group = tl.arange(0, BLOCK_GROUP)
    m_group = o_group < GROUP
    # [T, pages]: a product with it sums over the tokens of each page of a tile, which are spread
    # over the threads of several warps
    o_tile_page = tl.arange(0, SCORE_COLUMNS)
    b_member = (o_token[:, None] // PAGE_SIZE == o_tile_page[None, :]).to(SCORE_TYPE)

    b_first = tl.load(first_page + o_segment, mask=o_segment < num_segments, other=2147483647)
    num_pages = tl.load(first_page + num_segments)
    share = tl.cdiv(tl.cdiv(num_pages, num_programs), TILE_PAGES) * TILE_PAGES
    page = i_program * share
    share_end = tl.minimum(page + share, num_pages)
    # the last segment that begins at or before the share, which is never an empty one
    segment = tl.sum((b_first <= page).to(tl.int32), 0) - 1

    while page < share_end:
        segment_begin = tl.load(first_page + segment)
        segment_end = tl.load(first_page + segment + 1)
        stop = tl.minimum(segment_end, share_end)
        if stop > page:
            row = (segment // NUM_KV_HEADS).to(tl.int64)
            head = segment % NUM_KV_HEADS
            slot = tl.load(row_to_slot + row).to(tl.int64)
            list_index = (slot * NUM_LAYERS + layer) * NUM_KV_HEADS + head
            num_listed = tl.load(count + list_index)
            tail_block = tl.load(prompt_pages + slot)
            num_tokens = tl.load(seq_lens + row) + (num_listed - tail_block) * PAGE_SIZE
            p_listed = entries + tl.load(start + list_index)
            p_tail = block_table + row * stride_table_row + tail_block - num_listed
            score_row = tl.load(first_score + segment)
            is_scored = tl.load(first_score + segment + 1) > score_row

            p_query = query + row * stride_query_row + head * GROUP * HEAD_DIM
            p_query = p_query + o_group[:, None] * HEAD_DIM + o_dim[None, :]
            b_query = tl.load(p_query, mask=m_group[:, None], other=0.0).to(DOT_TYPE)  # [G, D]
            b_max = tl.full([BLOCK_GROUP], -float("inf"), dtype=tl.float32)
            b_sum = tl.zeros([BLOCK_GROUP], dtype=tl.float32)
            b_out = tl.zeros([BLOCK_GROUP, HEAD_DIM], dtype=tl.float32)
            first = page - segment_begin
            last = stop - segment_begin
            token_end = tl.minimum(num_tokens, last * PAGE_SIZE)
            factor = NUM_LAYERS * NUM_KV_HEADS
            offset = layer * NUM_KV_HEADS + head
            p_score = page_lse + score_row.to(tl.int64) * GROUP
            p_score = p_score + o_tile_page[None, :] * GROUP + o_group[:, None]
            score_end = tl.where(is_scored, tl.minimum(last, num_listed), 0)
            for tile in tl.range(first, last, TILE_PAGES):
                o_page = tile + o_token // PAGE_SIZE
                b_id = _page_ids(p_listed, p_tail, o_page, num_listed, last, factor, offset)
                o_row = b_id.to(tl.int64) * PAGE_SIZE + o_token % PAGE_SIZE
                m_token = tile * PAGE_SIZE + o_token < token_end
                p_key = pages + o_row[:, None] * (2 * HEAD_DIM) + o_dim[None, :]
                b_key = tl.load(p_key, mask=m_token[:, None], other=0.0)  # [T, D]
                b_value = tl.load(p_key + HEAD_DIM, mask=m_token[:, None], other=0.0)  # [T, D]
                b_key = tl.trans(b_key.to(DOT_TYPE))  # [D, T]
                b_logit = tl.dot(b_query, b_key, input_precision="ieee")  # [G, T]
                b_logit = tl.where(m_token[None, :], b_logit * scale_log2, -float("inf"))
                b_new_max = tl.maximum(b_max, tl.max(b_logit, 1))
                b_weight = tl.exp2(b_logit - b_new_max[:, None])
                b_shrink = tl.exp2(b_max - b_new_max)
                b_sum = b_sum * b_shrink + tl.sum(b_weight, 1)
                b_max = b_new_max
                b_weight_low = b_weight.to(pages.dtype.element_ty).to(DOT_TYPE)
                b_out = b_out * b_shrink[:, None]
                b_out = tl.dot(b_weight_low, b_value.to(DOT_TYPE), b_out, input_precision="ieee")
                if WITH_SCORES:
                    b_rounded = b_weight.to(tl.bfloat16).to(SCORE_TYPE)
                    b_page_sum = tl.dot(b_rounded, b_member)  # [G, pages]
                    b_page_lse = tl.log2(b_page_sum) + b_max[:, None]
                    m_page = (o_tile_page < TILE_PAGES) & (tile + o_tile_page < score_end)
                    m_store = m_page[None, :] & m_group[:, None]
                    tl.store(p_score + tile * GROUP, b_page_lse, mask=m_store)

            b_out = b_out / b_sum[:, None]
            b_lse = b_max + tl.log2(b_sum)
            p_output = output + row * stride_output_row + head * GROUP * HEAD_DIM
            p_head_lse = head_lse + segment * GROUP
            if stop - page == segment_end - segment_begin:
                p_store = p_output + o_group[:, None] * HEAD_DIM + o_dim[None, :]
                tl.store(p_store, b_out.to(output.dtype.element_ty), mask=m_group[:, None])
                if WITH_SCORES:
                    tl.store(p_head_lse + o_group, b_lse, mask=m_group)
            else:
                partial = 2 * i_program + (page == segment_begin).to(tl.int32)
                p_partial = partial_out + partial * GROUP * HEAD_DIM
                p_partial = p_partial + o_group[:, None] * HEAD_DIM + o_dim[None, :]
                tl.store(p_partial, b_out, mask=m_group[:, None])
                tl.store(partial_lse + partial * GROUP + o_group, b_lse, mask=m_group)
        page = stop
        segment += 1


@triton.jit
def _page_ids(p_listed, p_tail, o_page, num_listed, last, factor, offset):
    """Ids of the segment's pages `o_page`, from the head's list or from the live tail."""
    m_listed = o_page < num_listed
    p_id = tl.where(m_listed, p_listed + o_page, p_tail + o_page)
    b_id = tl.load(p_id, mask=o_page < last, other=0)
    return tl.where(m_listed, b_id, b_id * factor + offset)


@triton.jit
def _merge_kernel(
    first_page,
    partial_out,
    partial_lse,
    head_lse,
    output,
    stride_first_layer,
    stride_output_row,
    layer,
    num_segments,
    num_programs,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Program (i_head, i_part): BLOCK_DIM columns of one query head of one segment.

    Merges the partials of a segment that was cut; writes the zeros of an empty one.
    """
    segment = tl.program_id(0) // GROUP
    group_head = tl.program_id(0) % GROUP
    o_dim = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    o_partial = tl.arange(0, BLOCK_PARTIALS)
    first_page += layer * stride_first_layer
    num_pages = tl.load(first_page + num_segments)
    segment_begin = tl.load(first_page + segment)
    segment_end = tl.load(first_page + segment + 1)
    share = tl.cdiv(tl.cdiv(num_pages, num_programs), TILE_PAGES) * TILE_PAGES
    share = tl.maximum(share, 1)
    first_program = segment_begin // share
    num_partials = (segment_end + share - 1) // share - first_program
    p_output = output + (segment // NUM_KV_HEADS) * stride_output_row
    p_output += (segment % NUM_KV_HEADS * GROUP + group_head) * HEAD_DIM + o_dim
    if segment_begin == segment_end:
        tl.store(p_output, tl.zeros([BLOCK_DIM], dtype=output.dtype.element_ty))
    elif num_partials > 1:
        b_max = tl.full([BLOCK_PARTIALS], -float("inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_PARTIALS], dtype=tl.float32)
        b_out = tl.zeros([BLOCK_PARTIALS, BLOCK_DIM], dtype=tl.float32)
        for i in range(0, num_partials, BLOCK_PARTIALS):
            m_partial = i + o_partial < num_partials
            # only the first program of a segment saw its beginning
            o_place = 2 * (first_program + i + o_partial) + (i + o_partial == 0).to(tl.int32)
            o_place = o_place * GROUP + group_head
            b_lse = tl.load(partial_lse + o_place, mask=m_partial, other=-float("inf"))
            p_part = partial_out + o_place[:, None] * HEAD_DIM + o_dim[None, :]
            b_part = tl.load(p_part, mask=m_partial[:, None], other=0.0)  # [partials, D]
            b_new_max = tl.where(m_partial, tl.maximum(b_max, b_lse), b_max)
            b_floor = tl.where(b_new_max > -float("inf"), b_new_max, 0.0)
            b_weight = tl.exp2(b_lse - b_floor)
            b_shrink = tl.exp2(b_max - b_floor)
            b_sum = b_sum * b_shrink + b_weight
            b_out = b_out * b_shrink[:, None] + b_part * b_weight[:, None]
            b_max = b_new_max
        # each lane merged every BLOCK_PARTIALS-th partial; now the lanes
        head_max = tl.max(b_max, 0)
        b_weight = tl.exp2(b_max - head_max)
        head_sum = tl.sum(b_sum * b_weight, 0)
        b_merged = tl.sum(b_out * b_weight[:, None], 0) / head_sum
        tl.store(p_output, b_merged.to(output.dtype.element_ty))
        # equal in all parts
        tl.store(head_lse + segment * GROUP + group_head, head_max + tl.log2(head_sum))


@triton.jit
def _score_kernel(
    start,
    row_to_slot,
    first_score,
    head_lse,
    page_lse,
    scores,
    stride_first_layer,
    layer,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
):
    """Program (i_segment, i_part): every part-th block of the segment's page scores."""
    i_segment = tl.program_id(0)
    first_score += layer * stride_first_layer + i_segment
    row = tl.load(first_score).to(tl.int64)
    num_pages = tl.load(first_score + 1) - row
    if num_pages > 0:
        slot = tl.load(row_to_slot + i_segment // NUM_KV_HEADS).to(tl.int64)
        head = i_segment % NUM_KV_HEADS
        p_scores = scores + tl.load(start + (slot * NUM_LAYERS + layer) * NUM_KV_HEADS + head)
        o_group = tl.arange(0, BLOCK_GROUP)
        m_group = o_group < GROUP
        b_lse = tl.load(head_lse + i_segment * GROUP + o_group, mask=m_group, other=0.0)
        step = tl.num_programs(1) * BLOCK_PAGES
        for page in range(tl.program_id(1) * BLOCK_PAGES, num_pages, step):
            o_page = page + tl.arange(0, BLOCK_PAGES)
            m_page = o_page < num_pages
            p_lse = page_lse + (row + o_page[:, None]) * GROUP + o_group[None, :]
            m_load = m_page[:, None] & m_group[None, :]
            b_page = tl.load(p_lse, mask=m_load, other=-float("inf"))  # [pages, G]
            b_score = tl.max(tl.exp2(b_page - b_lse[None, :]), 1)
            tl.store(p_scores + o_page, b_score, mask=m_page)
