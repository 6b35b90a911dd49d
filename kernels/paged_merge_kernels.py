"""The Triton kernels of paged_decode.py that merge what several programs made of one segment."""

from __future__ import annotations

import triton
import triton.language as tl

# A program reads at least so many tiles of late heads. These few segments have all programs to
# themselves, and merging as many partials would take longer than reading.
LATE_TILES = tl.constexpr(4)


@triton.jit
def share_of_program(num_pages, num_programs, is_late, TILE_PAGES: tl.constexpr):
    """Pages of a program: whole tiles, so that only the ends of segments are partial tiles."""
    num_tiles = tl.cdiv(tl.cdiv(num_pages, num_programs), TILE_PAGES)
    return tl.maximum(num_tiles, tl.where(is_late, LATE_TILES, 1)) * TILE_PAGES


@triton.jit
def row_and_head(segment, num_rows, head_order, mask):
    """Of segments, which stand head after head in the layer's order."""
    head = segment // num_rows
    row = segment % num_rows
    if head_order is not None:
        head = tl.load(head_order + head, mask=mask)
    return row, head


@triton.jit(
    do_not_specialize=["stride_first_layer", "stride_lse_layer", "layer", "num_rows", "num_late"]
)
def merge_kernel(
    first_page,
    query_start,
    is_due,
    pivot_of_head,
    head_order,
    partial_out,
    partial_lse,
    head_lse,
    output,
    stride_first_layer,
    stride_lse_layer,
    stride_output_row,
    layer,
    num_rows,
    num_late,
    num_programs,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    WITH_SCORES: tl.constexpr,
):
    """Program (i_vector, i_part): BLOCK_DIM columns of one query vector of one segment.

    Merges the partials of a segment that was cut; writes the zeros of an empty one.
    """
    VECTORS: tl.constexpr = QUERIES * GROUP
    segment = tl.program_id(0) // VECTORS
    if head_order is not None:
        head_order += layer * NUM_KV_HEADS
    row, head = row_and_head(segment, num_rows, head_order, None)
    o_vector = tl.program_id(0) % VECTORS + tl.arange(0, 1)
    o_dim = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    first_page += layer * stride_first_layer
    segment_begin = tl.load(first_page + segment)
    segment_end = tl.load(first_page + segment + 1)
    num_segments = num_rows * NUM_KV_HEADS
    num_early = num_segments - num_late * num_rows
    is_late = segment >= num_early
    phase_begin = tl.load(first_page + tl.where(is_late, num_early, 0))
    phase_end = tl.load(first_page + tl.where(is_late, num_segments, num_early))
    share = share_of_program(phase_end - phase_begin, num_programs, is_late, TILE_PAGES)
    first_program = (segment_begin - phase_begin) // share
    num_partials = tl.cdiv(segment_end - phase_begin, share) - first_program
    first_program += is_late.to(tl.int32) * num_programs
    if QUERIES == 1:
        p_output = output + row.to(tl.int64) * stride_output_row
        m_output = None
        o_head = o_vector
    else:
        o_token = tl.load(query_start + row) + o_vector // GROUP
        p_output = output + o_token[:, None].to(tl.int64) * stride_output_row
        o_head = o_vector % GROUP
        m_output = (o_token < tl.load(query_start + row + 1))[:, None]
    p_output = p_output + (head * GROUP + o_head[:, None]) * HEAD_DIM + o_dim[None, :]
    if segment_begin == segment_end:
        b_zero = tl.zeros([1, BLOCK_DIM], dtype=output.dtype.element_ty)
        tl.store(p_output, b_zero, mask=m_output)
    elif num_partials > 1:
        b_out, b_lse = merge_partials(
            partial_out, partial_lse, first_program, num_partials, o_vector, o_dim,
            VECTORS, HEAD_DIM, BLOCK_PARTIALS, 1, BLOCK_DIM,
        )  # fmt: skip
        tl.store(p_output, b_out.to(output.dtype.element_ty), mask=m_output)
        if WITH_SCORES:
            # equal in all parts
            p_lse = head_lse + layer.to(tl.int64) * stride_lse_layer
            p_lse = p_lse + (row * NUM_KV_HEADS + head) * GROUP + o_vector
            leads = tl.load(pivot_of_head + layer * NUM_KV_HEADS + head) >= 0
            is_scored = leads & (tl.load(is_due + row) != 0)
            tl.store(p_lse, b_lse, mask=(o_vector < GROUP) & is_scored)


@triton.jit
def merge_partials(
    partial_out,
    partial_lse,
    first_program,
    num_partials,
    o_vector,
    o_dim,
    VECTORS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Output [vectors, dim] and log-sum-exp [vectors] of a segment that several programs shared."""
    m_vector = o_vector < VECTORS
    b_max = tl.full([BLOCK_PARTIALS, BLOCK_VECTORS], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_PARTIALS, BLOCK_VECTORS], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_PARTIALS, BLOCK_VECTORS, BLOCK_DIM], dtype=tl.float32)
    for begin in range(0, num_partials, BLOCK_PARTIALS):
        o_partial = begin + tl.arange(0, BLOCK_PARTIALS)
        m_load = (o_partial < num_partials)[:, None] & m_vector[None, :]
        # only the first program of a segment saw its beginning
        o_place = 2 * (first_program + o_partial) + (o_partial == 0).to(tl.int32)
        o_place = o_place[:, None] * VECTORS + o_vector[None, :]
        # not through L1, which keeps no track of other programs' stores
        b_lse = tl.load(partial_lse + o_place, m_load, other=-float("inf"), cache_modifier=".cg")
        p_part = partial_out + o_place[:, :, None] * HEAD_DIM + o_dim[None, None, :]
        b_part = tl.load(p_part, m_load[:, :, None], other=0.0, cache_modifier=".cg")
        b_new_max = tl.maximum(b_max, b_lse)
        b_floor = tl.where(b_new_max > -float("inf"), b_new_max, 0.0)
        b_weight = tl.exp2(b_lse - b_floor)
        b_shrink = tl.exp2(b_max - b_floor)
        b_sum = b_sum * b_shrink + b_weight
        b_out = b_out * b_shrink[:, :, None] + b_part * b_weight[:, :, None]
        b_max = b_new_max
    # each lane merged every BLOCK_PARTIALS-th partial; now the lanes
    b_vector_max = tl.max(b_max, 0)
    b_vector_max = tl.where(m_vector, b_vector_max, 0.0)
    b_weight = tl.exp2(b_max - b_vector_max[None, :])
    b_vector_sum = tl.where(m_vector, tl.sum(b_sum * b_weight, 0), 1.0)
    b_merged = tl.sum(b_out * b_weight[:, :, None], 0) / b_vector_sum[:, None]
    return b_merged, b_vector_max + tl.log2(b_vector_sum)
