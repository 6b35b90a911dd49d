"""Reference of decode attention over per-head page lists (specification: README.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_heterocache.kernels.kv_scales import KVScales, check_scales, logit_scales
from vllm_heterocache.kernels.soft_cap_ref import soft_capped_ref
from vllm_heterocache.kernels.tables import DecodeRows, PageTables

LOG2_E = 1.4426950408889634


class _Reads(NamedTuple):
    """The n pages that the rows read, (row, head) after (row, head): its list, its stand-in pages,
    then the tail."""

    page_ids: torch.Tensor  # [n] int64
    num_tokens: torch.Tensor  # [n] int64, valid tokens of the page
    sizes: torch.Tensor  # [num_rows * H] int64, pages of each (row, head)
    owner: torch.Tensor  # [n] int64, row * H + head
    within: torch.Tensor  # [n] int64, index among the pages of the owner
    is_listed: torch.Tensor  # [n] bool, from the list
    bias: torch.Tensor  # [n, page_size or 1] fp32, added to the logits of the page's tokens


def paged_decode_ref(
    query: torch.Tensor,
    pages: torch.Tensor,
    tables: PageTables,
    rows: DecodeRows,
    layer: int,
    scale: float,
    output: torch.Tensor,
    last_queries: torch.Tensor,
    pivot_of_head: torch.Tensor | None = None,
    head_lse: torch.Tensor | None = None,
    kv_scales: KVScales | None = None,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Decode attention in which each KV head reads only its own pages and the live tail.

    A mean stands for as many tokens as the runs of its head have on average: the logarithm of
    that number is added to its logit, so that it takes part in the softmax with their weight. A
    matched token brings a bias of its own.

    Written as the kernel works: every page gives a partial softmax, and the partials of a head
    are merged. By-products of the leading pivots of rows that are due: the log-sum-exp of every
    listed page, at the page's place in `tables.page_lse`, and that of all the head read, in
    `head_lse`; both are of scaled logits, base 2. Nothing else in these two is written.

    Each query of a row sees the tokens up to its own. By-products are of a row's first query.

    Args:
        query: [at least the rows' queries, num_q_heads, head_dim], row after row.
        pages: [num_pages, page_size, 2 * head_dim], K then V.
        rows: block-table entries below the slot's `prompt_pages` are never read.
        layer: index of this layer in a block, 0 <= layer < num_layers.
        scale: softmax scale.
        output: as `query`, written; rows of one query that have no tokens become zeros, and what
            lies behind the rows' queries stays.
        last_queries: [num_places, num_layers, num_q_heads, head_dim]; a query of a row with
            tokens whose `query_place` is >= 0 is stored at [query_place, layer].
        pivot_of_head: [num_layers, H] int32, index of the leading pivot, -1 for other heads; None:
            no head of this layer leads.
        head_lse: [num_layers, at least num_rows * H, G] fp32, needed with `pivot_of_head`.
        kv_scales: of fp8 pages.
        sink_logits: [num_layers, num_q_heads], any float dtype: one more logit of each head, which
            takes weight and has no value. It counts in `head_lse`, so that page scores are shares
            of all that the head attends to.
        soft_cap: of the logits (soft_cap_ref.py); 0: none.
    """
    _, num_q_heads, head_dim = query.shape
    num_kv_heads = tables.count.shape[2]
    assert num_q_heads % num_kv_heads == 0 and pages.shape[2] == 2 * head_dim
    assert output.shape == query.shape
    check_scales(pages, kv_scales, tables.count.shape[1:])
    assert last_queries.shape[1:] == (tables.count.shape[1], num_q_heads, head_dim)
    rows, row_of_query = _a_row_for_each_query(rows)
    output = output[: row_of_query.shape[0]]
    live = rows.seq_lens.nonzero().flatten()
    if live.shape[0] < output.shape[0]:
        output.zero_()
    if live.shape[0] == 0:
        return
    rows = DecodeRows(
        rows.row_to_table_slot[live],
        rows.block_table[live],
        rows.seq_lens[live],
        rows.query_place[live],
        rows.is_due[live],
    )
    query, row_of_query = query[live], row_of_query[live]
    kept = (rows.query_place >= 0).nonzero().flatten()
    last_queries[rows.query_place[kept].long(), layer] = query[kept].to(last_queries.dtype)

    reads = _pages_to_read(tables, rows, layer, pages.shape[1])
    kv = pages[reads.page_ids].float()  # [n, page_size, 2 * D]
    beyond = torch.arange(pages.shape[1], device=kv.device) >= reads.num_tokens[:, None]
    partial = beyond.any(dim=1).nonzero().flatten()
    kv[partial] = kv[partial].masked_fill(beyond[partial][..., None], 0.0)

    owner, sizes = reads.owner, reads.sizes
    grouped = query.float().view(live.shape[0], num_kv_heads, -1, head_dim)
    grouped = grouped * logit_scales(scale, kv_scales, layer)
    logits = grouped.flatten(0, 1)[owner] @ kv[..., :head_dim].transpose(1, 2)  # [n, G, page_size]
    logits = soft_capped_ref(logits, soft_cap)
    logits += reads.bias[:, None]
    logits[partial] = logits[partial].masked_fill(beyond[partial][:, None], -torch.inf)

    head_max = torch.segment_reduce(logits.amax(-1), "max", lengths=sizes)  # [rows * H, G]
    if sink_logits is not None:
        sinks = sink_logits[layer].float().view(num_kv_heads, -1).repeat(live.shape[0], 1)
        head_max = head_max.maximum(sinks)
    weights = (logits - head_max[owner][..., None]).exp_()
    head_sum = torch.segment_reduce(weights.sum(-1), "sum", lengths=sizes)
    if sink_logits is not None:
        head_sum += (sinks - head_max).exp_()
    page_out = weights @ kv[..., head_dim:]  # [n, G, D]
    result = torch.segment_reduce(page_out, "sum", lengths=sizes) / head_sum[..., None]
    if kv_scales is not None:
        result *= kv_scales.value[layer].repeat(live.shape[0])[:, None, None]
    output[live] = result.view(query.shape).to(output.dtype)

    if pivot_of_head is not None:
        assert head_lse is not None, "the sums of pivots need a place"
        pivots = pivot_of_head[layer].long()
        is_scored = (rows.is_due[:, None] != 0) & (pivots >= 0)  # [live rows, H]
        _write_page_lse(tables, rows, reads, pivots, is_scored, logits)
        of_heads = ((head_sum.log() + head_max) * LOG2_E).view(live.shape[0], num_kv_heads, -1)
        row, head = is_scored.nonzero(as_tuple=True)
        head_lse[layer, row_of_query[row] * num_kv_heads + head] = of_heads[row, head]


def _a_row_for_each_query(rows: DecodeRows) -> tuple[DecodeRows, torch.Tensor]:
    """Rows of one query each, and which of the given rows each of them is a query of."""
    if rows.query_start is None:
        return rows, torch.arange(rows.seq_lens.shape[0], device=rows.seq_lens.device)
    start = rows.query_start.long()
    counts = start.diff()
    row_of_query = torch.repeat_interleave(counts)
    later = torch.arange(row_of_query.shape[0], device=start.device) - start[row_of_query]
    seq_lens = rows.seq_lens[row_of_query] - counts[row_of_query] + 1 + later
    single = DecodeRows(
        rows.row_to_table_slot[row_of_query],
        rows.block_table[row_of_query],
        seq_lens.clamp(min=0),
        rows.query_place[: row_of_query.shape[0]],
        torch.where(later == 0, rows.is_due[row_of_query], 0),
    )
    return single, row_of_query


def _write_page_lse(
    tables: PageTables,
    rows: DecodeRows,
    reads: _Reads,
    pivots: torch.Tensor,
    is_scored: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """pivots: [H] int64, of this layer; is_scored: [rows, H] bool; logits: [n, G, page_size]."""
    row, head = reads.owner // pivots.shape[0], reads.owner % pivots.shape[0]
    wanted = (reads.is_listed & is_scored[row, head]).nonzero().flatten()
    row, pivot = row[wanted], pivots[head[wanted]]
    slot = rows.row_to_table_slot.long()[row]
    place = tables.first_stripe[slot] * tables.pivot_width + pivot * tables.prompt_pages[slot]
    place = place + reads.within[wanted]
    tables.page_lse[place] = torch.logsumexp(logits[wanted], dim=-1) * LOG2_E


def _pages_to_read(tables: PageTables, rows: DecodeRows, layer: int, page_size: int) -> _Reads:
    """All pages of all (row, head) of rows that have tokens."""
    _, num_layers, num_kv_heads = tables.count.shape
    slots = rows.row_to_table_slot.long()
    start, count = tables.start[slots, layer].flatten(), tables.count[slots, layer].flatten()
    stand_ins = count * 0
    if tables.has_stand_ins:
        stand_ins = tables.stand_in_pages[slots, layer].flatten()
    tail_start = tables.prompt_pages[slots].long()
    tail_tokens = rows.seq_lens.long() - tail_start * page_size
    tail_pages = (tail_tokens + page_size - 1) // page_size
    own = count.long() + stand_ins
    sizes = own + tail_pages.repeat_interleave(num_kv_heads)
    owner = torch.repeat_interleave(sizes)
    within = torch.arange(owner.shape[0], device=owner.device) - (sizes.cumsum(0) - sizes)[owner]
    is_own = within < own[owner]
    row, head = owner // num_kv_heads, owner % num_kv_heads
    in_tail = torch.where(is_own, 0, within - own[owner])
    block = rows.block_table[row, torch.where(is_own, 0, tail_start[row] + in_tail)].long()
    page_ids = (block * num_layers + layer) * num_kv_heads + head
    mine = is_own.nonzero().flatten()
    page_ids[mine] = tables.entries[(start[owner] + within)[mine]].long()
    num_tokens = torch.where(is_own, page_size, tail_tokens[row] - in_tail * page_size)
    num_tokens = num_tokens.clamp(max=page_size)
    is_listed = within < count[owner]
    if tables.token_bias is None:
        evicted = tail_start.repeat_interleave(num_kv_heads) - count
        tokens_of_mean = torch.where(stand_ins > 0, evicted / stand_ins, 1.0)
        bias = torch.where(is_own & ~is_listed, tokens_of_mean.log()[owner], 0.0)[:, None]
    else:
        assert tables.bias_start is not None
        place = tables.bias_start[slots, layer].flatten()[owner] + within - count[owner]
        bias = torch.zeros(owner.shape[0], page_size, device=owner.device)
        biased = (is_own & ~is_listed).nonzero().flatten()
        bias[biased] = tables.token_bias[place[biased]] / LOG2_E
    return _Reads(page_ids, num_tokens, sizes, owner, within, is_listed, bias)
