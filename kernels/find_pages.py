"""How finders search: the attention to each page of a prompt, by quantised keys (specification:
find_pages_ref.py)."""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.dependent_launch import has_dependent_launch, let_next_begin
from vllm_heterocache.kernels.dot_types import DOT_TYPES
from vllm_heterocache.kernels.kv_scales import KVScales
from vllm_heterocache.kernels.page_scores import MIN_GROUP
from vllm_heterocache.kernels.quantized_keys import HALVES, KEY_BITS, MAX_CODE, ZERO_CODE
from vllm_heterocache.kernels.soft_cap import LOG2_E, soft_capped
from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, PageTables
from vllm_heterocache.kernels.values import PAGE_SIZE

TILE_PAGES = 16  # pages that a program looks at together
MAX_PROGRAMS = 1024  # a finder's pages are split until there are as many
NUM_WARPS, NUM_STAGES = 2, 2
LOWEST = tl.constexpr(-1e30)  # below all log-sum-exps; a difference of two such is no NaN
# Two neighbouring channels of a token become two keys in three instructions: turn the code to the
# highest two bits of a mantissa, put the exponent of 4 beside it, so that the number is ZERO_CODE
# plus the code, then multiply by the step and add the zero point.
_TO_KEYS = """{{
    .reg .b32 code;
    shf.l.wrap.b32 code, $1, $1, $2;
    lop3.b32 code, code, {mask:#x}, {four:#x}, 0xEA;
    fma.rn.{dtype} $0, code, $4, $5;
}}"""
TO_BF16 = tl.constexpr(_TO_KEYS.format(mask=0x00600060, four=0x40804080, dtype="bf16x2"))
TO_FP16 = tl.constexpr(_TO_KEYS.format(mask=0x03000300, four=0x44004400, dtype="f16x2"))
BF16_PLACE, FP16_PLACE = tl.constexpr(5), tl.constexpr(8)  # the lower of those two bits
OPERANDS = tl.constexpr("=r,r,r,r,r,r")  # the turn, a number for each element, is in two


def programs_per_finder(num_rows: int, num_finders: int) -> int:
    """How many programs share the pages of a finder, of `num_finders` in a layer."""
    return max(1, MAX_PROGRAMS // (num_rows * num_finders))


def find_pages_workspace(max_rows: int, finders: FinderTables, group: int) -> int:
    """Size of `program_lse` for any layer and up to `max_rows` rows: float32 values."""
    most = max(end - first for first, end in pairwise(finders.first_of_layer))
    return max(MAX_PROGRAMS, max_rows * most) * group


def find_pages(
    query: torch.Tensor,
    tables: PageTables,
    finders: FinderTables,
    rows: DecodeRows,
    layer: int,
    scale: float,
    kv_scales: KVScales | None = None,
    soft_cap: float = 0.0,
    *,
    program_lse: torch.Tensor,
) -> None:
    """Leave the log-sum-exps of a layer's finders: one launch; its grid follows from the shapes.

    Nothing is allocated and nothing waits for the device.

    Args: as of `find_pages_ref`; D is a power of two, tensors are contiguous but for a stride
        between the rows of `query`.
        program_lse: [>= find_pages_workspace(num_rows, finders, G)] fp32, until the next layer's
            search. Written for rows that are due: [num_rows, finders of the layer,
            programs_per_finder, G], the log-sum-exp over all pages that a program looked at, base
            2; -inf where it had none. The first program always has some.
    """
    num_rows, num_q_heads, head_dim = query.shape
    _, num_layers, num_kv_heads = tables.count.shape
    group = num_q_heads // num_kv_heads
    assert num_q_heads == num_kv_heads * group and 0 <= layer < num_layers
    assert query.stride()[1:] == (head_dim, 1)
    assert finders.codes.shape[1:] == (HALVES.value, head_dim)
    assert rows.row_to_table_slot.shape == rows.seq_lens.shape == rows.is_due.shape == (num_rows,)
    assert tables.page_lse.is_contiguous() and tables.page_lse.shape[1] == group
    assert finders.grids.dtype == query.dtype
    first, end = finders.first_of_layer[layer : layer + 2]
    if first == end:
        return
    # Triton's interpreter runs no machine code
    is_packed = query.dtype != torch.float32 and not triton.knobs.runtime.interpret
    num_programs = programs_per_finder(num_rows, end - first)
    assert program_lse.is_contiguous() and program_lse.dtype == torch.float32
    assert program_lse.numel() >= num_rows * (end - first) * num_programs * group
    _find_pages_kernel[(num_programs, end - first, num_rows)](
        query,
        finders.codes,
        finders.grids,
        finders.heads,
        finders.pivots,
        tables.page_lse,
        program_lse,
        tables.prompt_pages,
        tables.first_stripe,
        rows.row_to_table_slot,
        rows.seq_lens,
        rows.is_due,
        None if kv_scales is None else kv_scales.key,
        query.stride(0),
        finders.width,
        tables.pivot_width,
        first,
        num_kv_heads,
        scale * LOG2_E.value,
        soft_cap * LOG2_E.value if soft_cap else None,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=PAGE_SIZE,
        BLOCK_GROUP=max(MIN_GROUP, triton.next_power_of_2(group)),
        BLOCK_PAGES=TILE_PAGES,
        DOT_TYPE=DOT_TYPES[query.dtype],
        IS_PACKED=is_packed,
        IS_DEPENDENT=has_dependent_launch(),
        NUM_STAGES=NUM_STAGES,
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["width", "pivot_width", "first_finder", "num_kv_heads"])
def _find_pages_kernel(
    query,
    codes,
    grids,
    heads,
    pivots,
    page_lse,
    program_lse,
    prompt_pages,
    first_stripe,
    row_to_table_slot,
    seq_lens,
    is_due,
    key_scales,
    stride_query_row,
    width,
    pivot_width,
    first_finder,
    num_kv_heads,
    scale_log2,
    cap_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Program (i, i_finder, i_row): every programs_per_finder-th tile of a finder's pages.

    A product has one token of each half of each page, so that a thread takes all codes that it
    needs from words of its own and adds up a half's weights without the others."""
    row = tl.program_id(2).to(tl.int64)
    finder = (first_finder + tl.program_id(1)).to(tl.int64)
    let_next_begin(IS_DEPENDENT)
    # asked for together, as each answer takes as long as a tile
    num_tokens, row_is_due = tl.load(seq_lens + row), tl.load(is_due + row)
    slot = tl.load(row_to_table_slot + row).to(tl.int64)
    head, pivot = tl.load(heads + finder), tl.load(pivots + finder).to(tl.int64)
    num_pages, stripe = tl.load(prompt_pages + slot), tl.load(first_stripe + slot)
    if (num_tokens > 0) & (row_is_due != 0):
        first_place = stripe * width + finder * num_pages
        first_lse = stripe * pivot_width + pivot * num_pages
        o_dim = tl.arange(0, HEAD_DIM)
        o_group = tl.arange(0, BLOCK_GROUP)
        m_group = o_group < GROUP
        o_query = (head % num_kv_heads) * GROUP + o_group
        p_query = query + row * stride_query_row + o_query[None, :] * HEAD_DIM + o_dim[:, None]
        b_query = tl.load(p_query, mask=m_group[None, :], other=0.0).to(DOT_TYPE)  # [D, G]
        if key_scales is not None:  # fp8 pages
            scale_log2 *= tl.load(key_scales + head)
        o_half = tl.arange(0, HALVES * BLOCK_PAGES) // BLOCK_PAGES
        o_page = tl.arange(0, HALVES * BLOCK_PAGES) % BLOCK_PAGES
        # over a program's pages, of each place in a tile; joined once, behind the last tile
        b_most = tl.full([BLOCK_PAGES, BLOCK_GROUP], LOWEST, dtype=tl.float32)
        b_mass = tl.zeros([BLOCK_PAGES, BLOCK_GROUP], dtype=tl.float32)
        first, stride = tl.program_id(0) * BLOCK_PAGES, tl.num_programs(0) * BLOCK_PAGES
        for begin in tl.range(first, num_pages, stride, num_stages=NUM_STAGES):
            o_place = (first_place + begin + o_page)[:, None]
            m_page = (begin + o_page < num_pages)[:, None]
            p_code = codes + (o_place * HALVES + o_half[:, None]) * HEAD_DIM + o_dim
            b_code = tl.load(p_code, mask=m_page, other=0)  # [halves of pages, D]
            p_zero = grids + o_place * (2 * HEAD_DIM) + o_dim
            b_zero = tl.load(p_zero, mask=m_page, other=0.0)
            b_step = tl.load(p_zero + HEAD_DIM, mask=m_page, other=0.0)
            b_max = tl.full([HALVES * BLOCK_PAGES, BLOCK_GROUP], -float("inf"), dtype=tl.float32)
            b_sum = tl.zeros([HALVES * BLOCK_PAGES, BLOCK_GROUP], dtype=tl.float32)
            for i_token in tl.static_range(0, PAGE_SIZE // HALVES, 2):
                b_key = _keys_of_codes(b_code, i_token, b_step, b_zero, DOT_TYPE, IS_PACKED)
                b_next = _keys_of_codes(b_code, i_token + 1, b_step, b_zero, DOT_TYPE, IS_PACKED)
                b_logit = _logits(b_key, b_query, scale_log2, cap_log2)
                b_next = _logits(b_next, b_query, scale_log2, cap_log2)
                b_new = tl.maximum(b_max, tl.maximum(b_logit, b_next))
                b_sum *= tl.exp2(b_max - b_new)
                b_sum += tl.exp2(b_logit - b_new) + tl.exp2(b_next - b_new)
                b_max = b_new
            b_half = (b_max + tl.log2(b_sum)).reshape(HALVES, BLOCK_PAGES, BLOCK_GROUP)
            b_max = tl.max(b_half, 0)
            b_lse = b_max + tl.log2(tl.sum(tl.exp2(b_half - b_max[None, :, :]), 0))
            o_stored = begin + tl.arange(0, BLOCK_PAGES)
            p_lse = page_lse + (first_lse + o_stored)[:, None] * GROUP + o_group[None, :]
            m_stored = (o_stored < num_pages)[:, None]
            tl.store(p_lse, b_lse, mask=m_stored & m_group[None, :])
            b_lse = tl.where(m_stored, b_lse, -float("inf"))
            b_new = tl.maximum(b_most, b_lse)
            b_mass = b_mass * tl.exp2(b_most - b_new) + tl.exp2(b_lse - b_new)
            b_most = b_new
        b_new = tl.max(b_most, 0)
        b_lse = b_new + tl.log2(tl.sum(b_mass * tl.exp2(b_most - b_new[None, :]), 0))
        search = row * tl.num_programs(1) + tl.program_id(1)
        program = search * tl.num_programs(0) + tl.program_id(0)
        tl.store(program_lse + program * GROUP + o_group, b_lse, mask=m_group)


@triton.jit
def _keys_of_codes(
    b_code,
    i_token: tl.constexpr,
    b_step,
    b_zero,
    DOT_TYPE: tl.constexpr,
    IS_PACKED: tl.constexpr,
):
    """Token `i_token` of each half of a page."""
    if not IS_PACKED:
        b_level = ZERO_CODE + ((b_code.to(tl.int32) >> (i_token * KEY_BITS)) & MAX_CODE)
        b_key = b_level.to(tl.float32) * b_step.to(tl.float32) + b_zero.to(tl.float32)
        b_key = b_key.to(DOT_TYPE)
    elif DOT_TYPE.is_bf16():
        b_turn = (BF16_PLACE - i_token * KEY_BITS) % 32
        b_key = tl.inline_asm_elementwise(
            TO_BF16, OPERANDS, [b_code, b_turn, b_step, b_zero], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        b_turn = (FP16_PLACE - i_token * KEY_BITS) % 32
        b_key = tl.inline_asm_elementwise(
            TO_FP16, OPERANDS, [b_code, b_turn, b_step, b_zero], tl.float16, is_pure=True, pack=2
        )
    return b_key


@triton.jit
def _logits(b_key, b_query, scale_log2, cap_log2):
    b_logit = tl.dot(b_key, b_query, input_precision="ieee") * scale_log2
    if cap_log2 is not None:
        b_logit = soft_capped(b_logit, cap_log2)
    return b_logit
