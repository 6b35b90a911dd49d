"""The Triton kernels of paged_decode.py, where the scheme and the arguments are explained."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_heterocache.kernels.dependent_launch import wait_for_last
from vllm_heterocache.kernels.paged_merge_kernels import (
    merge_partials,
    row_and_head,
    share_of_program,
)
from vllm_heterocache.kernels.soft_cap import LOG2_E, soft_capped

INT32_MAX = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["stride_first_layer", "num_rows"])
def split_kernel(
    count,
    stand_in_pages,
    prompt_pages,
    row_to_table_slot,
    seq_lens,
    head_order,
    first_page,
    stride_first_layer,
    num_rows,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    WITH_STAND_INS: tl.constexpr,
):
    """Program i_layer: prefix sum over the segments of one layer."""
    i_layer = tl.program_id(0)
    # element 0 of a layer stays zero from allocation
    p_first = first_page + i_layer * stride_first_layer + 1
    if head_order is not None:
        head_order += i_layer * NUM_KV_HEADS
    num_segments = num_rows * NUM_KV_HEADS
    pages_before = 0
    for begin in range(0, num_segments, BLOCK_SEGMENTS):
        o_segment = begin + tl.arange(0, BLOCK_SEGMENTS)
        m_segment = o_segment < num_segments
        o_row, o_head = row_and_head(o_segment, num_rows, head_order, m_segment)
        b_tokens = tl.load(seq_lens + o_row, mask=m_segment, other=0)
        m_row = m_segment & (b_tokens > 0)
        b_slot = tl.load(row_to_table_slot + o_row, mask=m_row, other=0).to(tl.int64)
        o_list = (b_slot * NUM_LAYERS + i_layer) * NUM_KV_HEADS + o_head
        b_count = tl.load(count + o_list, mask=m_row, other=0)
        if WITH_STAND_INS:
            b_count += tl.load(stand_in_pages + o_list, mask=m_row, other=0)
        b_tail = b_tokens - tl.load(prompt_pages + b_slot, mask=m_row, other=0) * PAGE_SIZE
        b_pages = tl.where(m_row, b_count + (b_tail + PAGE_SIZE - 1) // PAGE_SIZE, 0)
        tl.store(p_first + o_segment, pages_before + tl.cumsum(b_pages, 0), mask=m_segment)
        pages_before += tl.sum(b_pages, 0)


@triton.jit(
    do_not_specialize=[
        "stride_first_layer",
        "stride_lse_layer",
        "stride_table_row",
        "pivot_width",
        "layer",
        "num_rows",
        "num_late",
    ]
)
def decode_kernel(
    query,
    pages,
    key_scales,
    value_scales,
    sink_logits,
    entries,
    start,
    count,
    stand_in_pages,
    bias_start,
    token_bias,
    prompt_pages,
    first_stripe,
    row_to_table_slot,
    block_table,
    seq_lens,
    query_start,
    query_place,
    is_due,
    pivot_of_head,
    head_order,
    first_page,
    partial_out,
    partial_lse,
    finished,
    head_lse,
    page_lse,
    last_queries,
    output,
    stride_first_layer,
    stride_lse_layer,
    stride_query_row,
    stride_output_row,
    stride_table_row,
    pivot_width,
    layer,
    num_rows,
    num_late,
    scale_log2,
    cap_log2,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    WITH_SCORES: tl.constexpr,
    WITH_STAND_INS: tl.constexpr,
    FUSED_MERGE: tl.constexpr,
    NUM_PHASES: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    SCORE_TYPE: tl.constexpr,
):
    """Program i_program: `share` pages of the flat list of a phase's segments, segment by segment.

    A segment has GROUP query vectors for each of up to QUERIES queries: vector q * GROUP + g.
    """
    i_program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    TILE_PAGES: tl.constexpr = BLOCK_TOKENS // PAGE_SIZE
    first_page += layer * stride_first_layer
    head_lse += layer.to(tl.int64) * stride_lse_layer
    o_dim = tl.arange(0, HEAD_DIM)
    o_vector = tl.arange(0, BLOCK_VECTORS)
    m_group = o_vector < GROUP  # the vectors of a segment's first query
    VECTORS: tl.constexpr = QUERIES * GROUP

    num_segments = num_rows * NUM_KV_HEADS
    num_early = num_segments - num_late * num_rows
    if head_order is not None:
        head_order += layer * NUM_KV_HEADS
    for phase in range(NUM_PHASES):
        phase_begin = 0
        phase_end = tl.load(first_page + num_early)
        if phase == 1:
            phase_begin = phase_end
            phase_end = tl.load(first_page + num_segments)
        share = share_of_program(phase_end - phase_begin, num_programs, phase == 1, TILE_PAGES)
        page = phase_begin + i_program * share
        share_end = tl.minimum(page + share, phase_end)
        # the last segment that begins at or before the share, which is never an empty one
        b_before = tl.zeros([BLOCK_SEGMENTS], dtype=tl.int32)
        for begin in range(0, num_segments, BLOCK_SEGMENTS):
            o_segment = begin + tl.arange(0, BLOCK_SEGMENTS)
            b_first = tl.load(
                first_page + o_segment, mask=o_segment < num_segments, other=INT32_MAX
            )
            b_before += (b_first <= page).to(tl.int32)
        segment = tl.sum(b_before, 0) - 1

        while page < share_end:
            segment_begin = tl.load(first_page + segment)
            segment_end = tl.load(first_page + segment + 1)
            stop = tl.minimum(segment_end, share_end)
            if stop > page:
                row, head = row_and_head(segment, num_rows, head_order, None)
                row = row.to(tl.int64)
                slot = tl.load(row_to_table_slot + row).to(tl.int64)
                list_index = (slot * NUM_LAYERS + layer) * NUM_KV_HEADS + head
                num_listed = tl.load(count + list_index)
                tail_block = tl.load(prompt_pages + slot)
                num_own = num_listed
                mean_bias = 0.0
                first_bias = num_listed.to(tl.int64)
                if WITH_STAND_INS:
                    num_stand_ins = tl.load(stand_in_pages + list_index)
                    num_own += num_stand_ins
                    if token_bias is None:
                        num_evicted = tl.maximum(tail_block - num_listed, 1).to(tl.float32)
                        mean_bias = tl.log2(
                            num_evicted / tl.maximum(num_stand_ins, 1).to(tl.float32)
                        )
                    else:
                        first_bias = tl.load(bias_start + list_index) - num_listed
                num_tokens = tl.load(seq_lens + row) + (num_own - tail_block) * PAGE_SIZE
                p_own = entries + tl.load(start + list_index)
                p_tail = block_table + row * stride_table_row + tail_block - num_own

                if QUERIES == 1:
                    first_query = row
                    m_vector = m_group
                    o_query = o_vector[:, None] * HEAD_DIM + o_dim[None, :]
                    o_output = o_query
                    b_seen = num_tokens
                    b_place = tl.load(query_place + row).to(tl.int64)
                    p_last = last_queries + (
                        (b_place * NUM_LAYERS + layer) * NUM_KV_HEADS * GROUP * HEAD_DIM
                    )
                    p_last = p_last + head * GROUP * HEAD_DIM + o_query
                else:
                    first_query = tl.load(query_start + row).to(tl.int64)
                    num_queries = tl.load(query_start + row + 1) - first_query.to(tl.int32)
                    o_token = o_vector // GROUP
                    m_vector = o_token < num_queries
                    o_head_dim = (o_vector % GROUP)[:, None] * HEAD_DIM + o_dim[None, :]
                    o_query = o_token[:, None] * stride_query_row + o_head_dim
                    o_output = o_token[:, None] * stride_output_row + o_head_dim
                    b_seen = num_tokens - num_queries + 1 + o_token
                    b_place = tl.load(query_place + first_query + o_token, mask=m_vector, other=-1)
                    b_place = b_place.to(tl.int64)
                    o_last = (b_place * NUM_LAYERS + layer) * NUM_KV_HEADS * GROUP * HEAD_DIM
                    p_last = last_queries + o_last[:, None] + head * GROUP * HEAD_DIM + o_head_dim
                p_query = query + first_query * stride_query_row + head * GROUP * HEAD_DIM + o_query
                b_query = tl.load(p_query, mask=m_vector[:, None], other=0.0)  # [V, D]
                m_kept = m_vector & (b_place >= 0) & (page == segment_begin)
                tl.store(p_last, b_query.to(last_queries.dtype.element_ty), mask=m_kept[:, None])
                if tl.float16 == DOT_TYPE and query.dtype.element_ty == tl.bfloat16:
                    b_query = b_query.to(tl.float32)
                    b_query = tl.clamp(
                        b_query, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL
                    )
                b_query = b_query.to(DOT_TYPE)

                first = page - segment_begin
                last = stop - segment_begin
                token_end = tl.minimum(num_tokens, last * PAGE_SIZE)
                offset = layer * NUM_KV_HEADS + head
                head_scale = scale_log2
                if key_scales is not None:  # fp8 pages
                    head_scale *= tl.load(key_scales + offset)
                # counted where the segment begins, so that merging knows of no sink
                if sink_logits is None:
                    b_sink = None
                else:
                    p_sink = sink_logits + offset * GROUP + o_vector % GROUP
                    m_sink = m_vector & (page == segment_begin)
                    b_sink = (
                        tl.load(p_sink, mask=m_sink, other=-float("inf")).to(tl.float32) * LOG2_E
                    )
                if phase == 1:
                    wait_for_last(IS_DEPENDENT)  # for what `exchange_pages` changed
                is_scored = False
                p_score = page_lse
                if WITH_SCORES:
                    pivot = tl.load(pivot_of_head + layer * NUM_KV_HEADS + head).to(tl.int64)
                    is_scored = (pivot >= 0) & (tl.load(is_due + row) != 0)
                    place = tl.load(first_stripe + slot) * pivot_width + pivot * tail_block
                    p_score += place * GROUP
                if is_scored:
                    b_max, b_sum, b_out = _attend(
                        b_query, pages, p_own, p_tail, p_score, first, last, num_listed,
                        num_own, token_end, b_seen, b_sink, offset, head_scale, cap_log2,
                        mean_bias, token_bias, first_bias, NUM_LAYERS * NUM_KV_HEADS, GROUP,
                        HEAD_DIM, PAGE_SIZE, QUERIES, BLOCK_VECTORS, BLOCK_TOKENS, True,
                        WITH_STAND_INS, query.dtype.element_ty, DOT_TYPE, SCORE_TYPE,
                    )  # fmt: skip
                else:
                    b_max, b_sum, b_out = _attend(
                        b_query, pages, p_own, p_tail, p_score, first, last, num_listed,
                        num_own, token_end, b_seen, b_sink, offset, head_scale, cap_log2,
                        mean_bias, token_bias, first_bias, NUM_LAYERS * NUM_KV_HEADS, GROUP,
                        HEAD_DIM, PAGE_SIZE, QUERIES, BLOCK_VECTORS, BLOCK_TOKENS, False,
                        WITH_STAND_INS, query.dtype.element_ty, DOT_TYPE, SCORE_TYPE,
                    )  # fmt: skip

                if QUERIES > 1:  # an early query may see no token of this share
                    b_sum = tl.where(b_sum > 0, b_sum, 1.0)
                b_out = b_out / b_sum[:, None]
                if value_scales is not None:
                    b_out *= tl.load(value_scales + offset)
                b_lse = b_max + tl.log2(b_sum)
                p_output = output + first_query * stride_output_row + head * GROUP * HEAD_DIM
                p_head_lse = head_lse + (row * NUM_KV_HEADS + head) * GROUP
                if stop - page == segment_end - segment_begin:
                    b_typed = b_out.to(output.dtype.element_ty)
                    tl.store(p_output + o_output, b_typed, mask=m_vector[:, None])
                    if WITH_SCORES:
                        tl.store(p_head_lse + o_vector, b_lse, mask=m_group & is_scored)
                else:
                    partial = 2 * (phase * num_programs + i_program) + (page == segment_begin).to(
                        tl.int32
                    )
                    o_partial = o_vector[:, None] * HEAD_DIM + o_dim[None, :]
                    p_partial = partial_out + partial * VECTORS * HEAD_DIM + o_partial
                    tl.store(p_partial, b_out, mask=m_vector[:, None])
                    tl.store(partial_lse + partial * VECTORS + o_vector, b_lse, mask=m_vector)
                    if FUSED_MERGE:
                        # every thread's partial is written before one thread counts it, and the
                        # last program to count reads what the others wrote before they did
                        tl.debug_barrier()
                        before = tl.atomic_add(finished + segment, 1, sem="acq_rel")
                        first_program = (segment_begin - phase_begin) // share
                        num_partials = tl.cdiv(segment_end - phase_begin, share) - first_program
                        if before == num_partials - 1:
                            tl.store(finished + segment, 0)
                            o_head = tl.arange(0, BLOCK_HEADS)
                            b_merged, b_merged_lse = merge_partials(
                                partial_out, partial_lse,
                                phase * num_programs + first_program, num_partials,
                                o_head, o_dim,
                                GROUP, HEAD_DIM, BLOCK_PARTIALS, BLOCK_HEADS, HEAD_DIM,
                            )  # fmt: skip
                            m_head = o_head < GROUP
                            p_store = p_output + o_head[:, None] * HEAD_DIM + o_dim[None, :]
                            b_typed = b_merged.to(output.dtype.element_ty)
                            tl.store(p_store, b_typed, mask=m_head[:, None])
                            if WITH_SCORES:
                                tl.store(p_head_lse + o_head, b_merged_lse, mask=m_head & is_scored)
            page = stop
            segment += 1

    if NUM_PHASES > 1:
        wait_for_last(IS_DEPENDENT)  # the next launch relies on nothing but this one
    if FUSED_MERGE:
        i_segment = i_program
        while i_segment < num_segments:
            if tl.load(first_page + i_segment) == tl.load(first_page + i_segment + 1):
                row, head = row_and_head(i_segment, num_rows, head_order, None)
                p_zero = output + row.to(tl.int64) * stride_output_row + head * GROUP * HEAD_DIM
                p_zero = p_zero + o_vector[:, None] * HEAD_DIM + o_dim[None, :]
                b_zero = tl.zeros([BLOCK_VECTORS, HEAD_DIM], dtype=output.dtype.element_ty)
                tl.store(p_zero, b_zero, mask=m_group[:, None])
            i_segment += num_programs


@triton.jit
def _attend(
    b_query,
    pages,
    p_own,
    p_tail,
    p_score,
    first,
    last,
    num_listed,
    num_own,
    token_end,
    b_seen,
    b_sink,
    offset,
    scale_log2,
    cap_log2,
    mean_bias,
    token_bias,
    first_bias,
    FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SCORED: tl.constexpr,
    WITH_STAND_INS: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    SCORE_TYPE: tl.constexpr,
):
    """Online softmax over the pages [first, last) of a segment, base 2. Its first `num_own` pages
    are the head's own, those of them from `num_listed` on its stand-in pages. Without `token_bias`
    the bias of all their tokens is `mean_bias`; else the biases of page i of the segment stand at
    `token_bias[first_bias + i]`. Each of several queries
    sees the segment's first `b_seen` [V] tokens. Page scores are of the first query. The softmax
    begins with the logits `b_sink` [V] that have no value, -inf where there is none.

    Page ids are loaded inside the loop on purpose: Triton pipelines the two dependent loads, ids
    then K and V, by half of `num_stages - 1` each, which is why odd stage counts pay.

    Returns:
        largest logit [V], sum of weights [V], weighted sum of values [V, D].
    """
    TILE_PAGES: tl.constexpr = BLOCK_TOKENS // PAGE_SIZE
    SCORE_COLUMNS: tl.constexpr = TILE_PAGES if TILE_PAGES > 8 else 8
    # Pages and tokens are counted from `first` on, so that the loop begins at a constant. In a loop
    # that begins at a value of a loop around it, Triton 3.7 may learn nothing about addresses: the
    # loads of K and V were 2 bytes wide then, and not pipelined.
    p_own += first
    p_tail += first
    p_score += first * GROUP
    if token_bias is not None:
        token_bias += (first_bias + first) * PAGE_SIZE
    num_listed -= first
    num_own -= first
    token_end -= first * PAGE_SIZE
    b_seen -= first * PAGE_SIZE
    last -= first
    o_token = tl.arange(0, BLOCK_TOKENS)
    o_dim = tl.arange(0, HEAD_DIM)
    o_vector = tl.arange(0, BLOCK_VECTORS)
    # [T, pages]: a product with it sums over the tokens of each page of a tile, which are spread
    # over the threads of several warps
    o_tile_page = tl.arange(0, SCORE_COLUMNS)
    b_member = (o_token[:, None] // PAGE_SIZE == o_tile_page[None, :]).to(SCORE_TYPE)
    m_column = (o_vector < GROUP)[:, None] & (o_tile_page < TILE_PAGES)[None, :]
    p_score = p_score + o_tile_page[None, :] * GROUP + o_vector[:, None]
    score_end = tl.minimum(last, num_listed)
    if b_sink is None:
        b_max = tl.full([BLOCK_VECTORS], -float("inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_VECTORS], dtype=tl.float32)
    else:
        b_max = b_sink
        b_sum = tl.where(b_sink > -float("inf"), 1.0, 0.0)
    b_out = tl.zeros([BLOCK_VECTORS, HEAD_DIM], dtype=tl.float32)
    for tile in tl.range(0, last, TILE_PAGES):
        o_page = tile + o_token // PAGE_SIZE
        b_id = _page_ids(p_own, p_tail, o_page, num_own, last, FACTOR, offset)
        o_row = b_id.to(tl.int64) * PAGE_SIZE + o_token % PAGE_SIZE
        m_token = tile * PAGE_SIZE + o_token < token_end
        p_key = pages + o_row[:, None] * (2 * HEAD_DIM) + o_dim[None, :]
        b_key = tl.load(p_key, mask=m_token[:, None], other=0.0)  # [T, D]
        b_value = tl.load(p_key + HEAD_DIM, mask=m_token[:, None], other=0.0)  # [T, D]
        b_key = tl.trans(b_key.to(DOT_TYPE))  # [D, T]
        b_logit = tl.dot(b_query, b_key, input_precision="ieee")  # [V, T]
        b_logit *= scale_log2
        if cap_log2 is not None:
            b_logit = soft_capped(b_logit, cap_log2)
        if WITH_STAND_INS:
            m_stand_in = (o_page >= num_listed) & (o_page < num_own)
            if token_bias is None:
                b_bias = tl.where(m_stand_in, mean_bias, 0.0)
            else:
                o_bias = tile * PAGE_SIZE + o_token
                b_bias = tl.load(token_bias + o_bias, mask=m_stand_in, other=0.0)
            b_logit += b_bias[None, :]
        m_logit = m_token[None, :]
        if QUERIES > 1:
            m_logit = m_logit & ((tile * PAGE_SIZE + o_token)[None, :] < b_seen[:, None])
        b_logit = tl.where(m_logit, b_logit, -float("inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_logit, 1))
        b_floor = b_new_max
        if QUERIES > 1:
            b_floor = tl.where(b_new_max > -float("inf"), b_new_max, 0.0)
        b_weight = tl.exp2(b_logit - b_floor[:, None])
        b_shrink = tl.exp2(b_max - b_floor)
        b_sum = b_sum * b_shrink + tl.sum(b_weight, 1)
        b_max = b_new_max
        b_weight_low = b_weight.to(WEIGHT_TYPE).to(DOT_TYPE)
        b_out = b_out * b_shrink[:, None]
        b_out = tl.dot(b_weight_low, b_value.to(DOT_TYPE), b_out, input_precision="ieee")
        if SCORED:
            b_rounded = b_weight.to(tl.bfloat16).to(SCORE_TYPE)
            b_page_sum = tl.dot(b_rounded, b_member)  # [V, pages]
            b_page_lse = tl.log2(b_page_sum) + b_max[:, None]
            m_store = m_column & (tile + o_tile_page < score_end)[None, :]
            tl.store(p_score + tile * GROUP, b_page_lse, mask=m_store)
    return b_max, b_sum, b_out


@triton.jit
def _page_ids(p_own, p_tail, o_page, num_own, last, factor, offset):
    """Ids of the segment's pages `o_page`, from the head's entries or from the live tail."""
    m_own = o_page < num_own
    p_id = tl.where(m_own, p_own + o_page, p_tail + o_page)
    b_id = tl.load(p_id, mask=o_page < last, other=0)
    return tl.where(m_own, b_id, b_id * factor + offset)
