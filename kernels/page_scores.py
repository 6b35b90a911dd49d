"""Page scores of a dense prompt (specification: README.md and page_scores_ref.py).

Two launches a layer. The first reads the keys once: each program takes a run of consecutive pages
of one KV head and leaves the log-sum-exp of every page, and that of the whole run. The second
adds up the runs and turns the pages' log-sum-exps into shares of the total.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_heterocache.kernels.dot_types import DOT_TYPES
from vllm_heterocache.kernels.kv_scales import KVScales, check_scales
from vllm_heterocache.kernels.soft_cap import LOG2_E, soft_capped
from vllm_heterocache.kernels.values import PAGE_SIZE

MIN_GROUP = 8  # a KV head's rows are padded to at least these many columns of a tile
MAX_PROGRAMS = 1024  # runs of all heads of a layer together; fixes the size of the workspace
SCORE_PAGES = 256
SCORE_RUNS = 64


class PageScoresLaunch(NamedTuple):
    """How the first launch of `page_scores` runs."""

    tile_tokens: int = 64  # tokens of one K tile; from 64 on a warp holds whole pages
    num_warps: int = 4
    num_stages: int = 5  # of the load pipeline: block ids, then K; odd, as in paged_decode


def page_scores_workspace(max_tokens: int, num_kv_heads: int, group: int) -> int:
    """fp32 elements that `page_scores` needs for prompts of up to `max_tokens` tokens.

    Args:
        group: G, query rows a KV head.
    """
    num_runs = max(num_kv_heads, MAX_PROGRAMS)
    return (num_kv_heads * (max_tokens // PAGE_SIZE) + num_runs) * group


def page_scores(
    queries: torch.Tensor,
    pages: torch.Tensor,
    dense_blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    out: torch.Tensor,
    workspace: torch.Tensor,
    launch: PageScoresLaunch | None = None,
    kv_scales: KVScales | None = None,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Score the full pages of a dense prompt by some query rows of each KV head.

    Args:
        queries: [L, H * G, D], the G rows of a KV head behind one another: query heads of the last
            token, or of more tokens.
        pages: [num_pages, 16, 2 * D], K then V; only K is read.
        dense_blocks: [at least the pages of the prompt, a partial last one included] int32.
        num_tokens: T, tokens of the prompt.
        scale: softmax scale.
        out: [L, H, T // 16] fp32, written.
        workspace: [>= page_scores_workspace(T, H, G)] fp32, overwritten.
        launch: launch settings other than the default ones.
        kv_scales: of fp8 pages.
        sink_logits: [L, H * G], of the rows, any float dtype, contiguous; None: heads without
            sinks.
        soft_cap: of the logits (soft_cap_ref.py); 0: none.
    """
    num_layers, num_rows, head_dim = queries.shape
    num_kv_heads, num_full = out.shape[1:]
    group = num_rows // num_kv_heads
    num_pages = triton.cdiv(num_tokens, PAGE_SIZE)
    launch = launch or PageScoresLaunch()
    assert out.shape[0] == num_layers and num_full == num_tokens // PAGE_SIZE
    assert out.dtype == workspace.dtype == torch.float32
    assert kv_scales is not None or queries.dtype == pages.dtype
    check_scales(pages, kv_scales, out.shape[:2])
    assert num_rows == num_kv_heads * group and pages.shape[1:] == (PAGE_SIZE, 2 * head_dim)
    assert queries.is_contiguous() and pages.is_contiguous() and out.is_contiguous()
    assert dense_blocks.shape[0] >= num_pages and dense_blocks.stride(0) == 1
    assert workspace.is_contiguous() and launch.tile_tokens % PAGE_SIZE == 0
    assert workspace.numel() >= page_scores_workspace(num_tokens, num_kv_heads, group)
    if sink_logits is not None:
        assert sink_logits.shape == (num_layers, num_rows) and sink_logits.is_contiguous()
    if num_full == 0:
        return
    tile_pages = launch.tile_tokens // PAGE_SIZE
    num_tiles = triton.cdiv(num_pages, tile_pages)
    run_tiles = triton.cdiv(num_tiles, max(1, MAX_PROGRAMS // num_kv_heads))
    num_runs = triton.cdiv(num_tiles, run_tiles)
    for layer in range(num_layers):
        _page_lse_kernel[(num_runs, num_kv_heads)](
            queries,
            pages,
            None if kv_scales is None else kv_scales.key,
            dense_blocks,
            workspace,
            layer,
            num_tokens,
            run_tiles * launch.tile_tokens,
            scale * LOG2_E.value,
            soft_cap * LOG2_E.value if soft_cap else None,
            NUM_LAYERS=num_layers,
            GROUP=group,
            HEAD_DIM=head_dim,
            PAGE_SIZE=PAGE_SIZE,
            BLOCK_GROUP=max(MIN_GROUP, triton.next_power_of_2(group)),
            BLOCK_TOKENS=launch.tile_tokens,
            DOT_TYPE=DOT_TYPES[queries.dtype],
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        _share_kernel[(triton.cdiv(num_full, SCORE_PAGES), num_kv_heads)](
            workspace,
            sink_logits,
            out,
            layer,
            num_full,
            num_runs,
            GROUP=group,
            BLOCK_GROUP=triton.next_power_of_2(group),
            BLOCK_PAGES=SCORE_PAGES,
            BLOCK_RUNS=SCORE_RUNS,
            num_warps=4,
        )


@triton.jit(
    do_not_specialize=["layer", "num_tokens", "run_tokens"],
    do_not_specialize_on_alignment=["dense_blocks"],
)
def _page_lse_kernel(
    queries,
    pages,
    key_scales,
    dense_blocks,
    workspace,
    layer,
    num_tokens,
    run_tokens,
    scale_log2,
    cap_log2,
    NUM_LAYERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """Program (i_run, i_head): `run_tokens` tokens of one KV head.

    The workspace holds [H, num_runs, G] log-sum-exps of runs, then [H, num_full, G] of pages.
    The tokens are the rows of the product, so that the sums over a page stay within a warp.
    """
    i_run, i_head = tl.program_id(0), tl.program_id(1)
    num_runs, num_kv_heads = tl.num_programs(0), tl.num_programs(1)
    TILE_PAGES: tl.constexpr = BLOCK_TOKENS // PAGE_SIZE
    num_full = num_tokens // PAGE_SIZE
    o_token = tl.arange(0, BLOCK_TOKENS)
    o_tile_page = tl.arange(0, TILE_PAGES)
    o_dim = tl.arange(0, HEAD_DIM)
    o_group = tl.arange(0, BLOCK_GROUP)
    m_group = o_group < GROUP
    p_query = queries + ((layer * num_kv_heads + i_head) * GROUP + o_group[None, :]) * HEAD_DIM
    b_query = tl.load(p_query + o_dim[:, None], mask=m_group[None, :], other=0.0)  # [D, G]
    b_query = b_query.to(DOT_TYPE)
    if key_scales is not None:  # fp8 pages
        scale_log2 *= tl.load(key_scales + layer * num_kv_heads + i_head)
    p_page_lse = workspace + (num_kv_heads * num_runs + i_head * num_full) * GROUP
    # running softmax of every TILE_PAGES-th page of the run
    b_max = tl.full([TILE_PAGES, BLOCK_GROUP], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([TILE_PAGES, BLOCK_GROUP], dtype=tl.float32)

    first = i_run * run_tokens
    last = tl.minimum(first + run_tokens, num_tokens)
    for token in tl.range(first, last, BLOCK_TOKENS):
        m_token = token + o_token < last
        b_block = tl.load(dense_blocks + (token + o_token) // PAGE_SIZE, mask=m_token, other=0)
        b_id = (b_block.to(tl.int64) * NUM_LAYERS + layer) * num_kv_heads + i_head
        o_row = b_id * PAGE_SIZE + o_token % PAGE_SIZE
        p_key = pages + o_row[:, None] * (2 * HEAD_DIM) + o_dim[None, :]
        b_key = tl.load(p_key, mask=m_token[:, None], other=0.0).to(DOT_TYPE)  # [T, D]
        b_logit = tl.dot(b_key, b_query, input_precision="ieee") * scale_log2  # [T, G]
        if cap_log2 is not None:
            b_logit = soft_capped(b_logit, cap_log2)
        b_logit = tl.where(m_token[:, None], b_logit, -float("inf"))
        b_logit = tl.reshape(b_logit, [TILE_PAGES, PAGE_SIZE, BLOCK_GROUP])
        b_page_max = tl.max(b_logit, 1)  # [pages, G], -inf where a page has no token
        b_new_max = tl.maximum(b_max, b_page_max)
        b_floor = tl.where(b_page_max > -float("inf"), b_page_max, 0.0)
        b_page_sum = tl.sum(tl.exp2(b_logit - b_floor[:, None, :]), 1)
        o_page = token // PAGE_SIZE + o_tile_page
        m_store = (o_page < num_full)[:, None] & m_group[None, :]
        p_store = p_page_lse + o_page[:, None] * GROUP + o_group[None, :]
        tl.store(p_store, b_floor + tl.log2(b_page_sum), mask=m_store)
        b_new_floor = tl.where(b_new_max > -float("inf"), b_new_max, 0.0)
        b_sum = b_sum * tl.exp2(b_max - b_new_floor)
        b_sum += b_page_sum * tl.exp2(b_page_max - b_new_floor)
        b_max = b_new_max

    b_run_max = tl.max(b_max, 0)  # the first page has a token
    b_run_sum = tl.sum(b_sum * tl.exp2(b_max - b_run_max[None, :]), 0)
    p_run_lse = workspace + (i_head * num_runs + i_run) * GROUP + o_group
    tl.store(p_run_lse, b_run_max + tl.log2(b_run_sum), mask=m_group)


@triton.jit(do_not_specialize=["layer", "num_full", "num_runs"])
def _share_kernel(
    workspace,
    sink_logits,
    out,
    layer,
    num_full,
    num_runs,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
):
    """Program (i_block, i_head): the scores of BLOCK_PAGES pages of one KV head."""
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    o_run = tl.arange(0, BLOCK_RUNS)
    o_group = tl.arange(0, BLOCK_GROUP)
    m_group = o_group < GROUP
    p_run_lse = workspace + i_head * num_runs * GROUP + o_group[None, :]
    b_max = tl.full([BLOCK_RUNS, BLOCK_GROUP], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_RUNS, BLOCK_GROUP], dtype=tl.float32)
    for run in range(0, num_runs, BLOCK_RUNS):
        m_run = (run + o_run < num_runs)[:, None] & m_group[None, :]
        p_load = p_run_lse + (run + o_run[:, None]) * GROUP
        b_lse = tl.load(p_load, mask=m_run, other=-float("inf"))  # [runs, G]
        b_new_max = tl.maximum(b_max, b_lse)
        b_floor = tl.where(b_new_max > -float("inf"), b_new_max, 0.0)
        b_sum = b_sum * tl.exp2(b_max - b_floor) + tl.exp2(b_lse - b_floor)
        b_max = b_new_max
    # each lane added every BLOCK_RUNS-th run; now the lanes
    b_top = tl.max(b_max, 0)
    b_top = tl.where(m_group, b_top, 0.0)
    b_total = tl.where(m_group, tl.sum(b_sum * tl.exp2(b_max - b_top[None, :]), 0), 1.0)
    b_head_lse = b_top + tl.log2(b_total)
    if sink_logits is not None:
        p_sink = sink_logits + (layer * num_kv_heads + i_head) * GROUP + o_group
        b_sink = tl.load(p_sink, mask=m_group, other=-float("inf")).to(tl.float32) * LOG2_E
        b_most = tl.maximum(b_head_lse, b_sink)
        b_head_lse = b_most + tl.log2(tl.exp2(b_head_lse - b_most) + tl.exp2(b_sink - b_most))

    o_page = i_block * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    m_page = o_page < num_full
    p_page_lse = workspace + num_kv_heads * num_runs * GROUP
    p_page_lse += (i_head * num_full + o_page[:, None]) * GROUP + o_group[None, :]
    m_load = m_page[:, None] & m_group[None, :]
    b_page_lse = tl.load(p_page_lse, mask=m_load, other=-float("inf"))  # [pages, G]
    b_score = tl.max(tl.exp2(b_page_lse - b_head_lse[None, :]), 1)
    p_out = out + (layer * num_kv_heads + i_head).to(tl.int64) * num_full + o_page
    tl.store(p_out, b_score, mask=m_page)
