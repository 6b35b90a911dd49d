"""Attention mass of queries on the pages of a prompt, in plain torch for both platforms."""

from __future__ import annotations

import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.soft_cap_ref import soft_capped_ref

# fp32 elements of one temporary: 16 MiB
BLOCK_ELEMENTS = 1 << 22


def page_masses(
    query: torch.Tensor,
    positions: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    scale: float | torch.Tensor,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Share of each query's attention that falls on each page; fp32, a block of keys at a time.

    The softmax of a query runs over all tokens up to its own, so that what lies behind them (the
    rest of a partial page) may hold anything. It runs over the sink too, because masses of heads
    and queries are compared and added.

    Args:
        query: [H, N, D], rows of the query heads of each KV head.
        positions: [N] int64, prompt token that each row belongs to.
        pages: [num_pages, page_size, 2 * D], K then V.
        page_ids: [H, n] int64, pages of the prompt from its first token on; they hold every token
            up to the largest position.
        scale: of the products of queries and elements (kernels/kv_scales.py, `logit_scales`).
        sink_logits: [num_q_heads] of the layer, N = G * n rows as `by_kv_head` makes them.
        soft_cap: of the logits (kernels/soft_cap_ref.py); 0: none.

    Returns:
        [H, N, n] fp32; the rows add up to 1, with the mass of the sink.
    """
    num_kv_heads, num_rows, head_dim = query.shape
    num_pages = page_ids.shape[1]
    keys_of_page = pages[..., :head_dim]
    query = query.float() * scale
    lse = torch.empty(num_kv_heads, num_rows, num_pages, device=query.device)
    step = max(1, BLOCK_ELEMENTS // (num_kv_heads * max(num_rows, head_dim) * PAGE_SIZE))
    for first in range(0, num_pages, step):
        keys = keys_of_page[page_ids[:, first : first + step]].float().flatten(1, 2)
        logits = soft_capped_ref(query @ keys.transpose(1, 2), soft_cap)  # [H, N, tokens]
        tokens = torch.arange(keys.shape[1], device=keys.device) + first * PAGE_SIZE
        logits.masked_fill_(tokens > positions[:, None], -torch.inf)
        lse[..., first : first + step] = logits.unflatten(-1, (-1, PAGE_SIZE)).logsumexp(-1)
    total = lse.logsumexp(-1, keepdim=True)
    if sink_logits is not None:
        total = total.logaddexp(rows_of_sinks(sink_logits, num_kv_heads, num_rows)[..., None])
    return lse.sub_(total).exp_()


def add_page_masses(
    total: torch.Tensor,
    query: torch.Tensor,
    first_position: int,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    scale: float | torch.Tensor,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Add the masses of consecutive queries of a prompt to its sums, a block of queries at a time.

    It computes every logit of these queries once more, in fp32: over a whole prompt as many
    multiplications as attention itself spends on logits, outside of any fused kernel.

    Args:
        total: [H, P] fp32, changed in place: summed over queries and over the group.
        query: [n, num_q_heads, D], of the prompt tokens from `first_position` on.
        pages, page_ids, scale, sink_logits, soft_cap: as in `page_masses`; pages behind the last
            query are not read.
    """
    num_kv_heads, num_full = total.shape
    num_q_heads = query.shape[1]
    step = max(1, 2 * BLOCK_ELEMENTS // (num_q_heads * page_ids.shape[1]))
    for start in range(0, query.shape[0], step):
        part = query[start : start + step]
        first = first_position + start
        seen = -(-(first + part.shape[0]) // PAGE_SIZE)
        positions = torch.arange(first, first + part.shape[0], device=part.device)
        rows = by_kv_head(part, num_kv_heads)  # [H, G * n, D]
        positions = positions.repeat(num_q_heads // num_kv_heads)
        masses = page_masses(
            rows, positions, pages, page_ids[:, :seen], scale, sink_logits, soft_cap
        )
        num_summed = min(seen, num_full)
        total[:, :num_summed] += masses[..., :num_summed].sum(dim=1)


def by_kv_head(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[n, num_q_heads, D] -> [H, G * n, D]: the rows of a KV head, one query head after another."""
    num_tokens, _, head_dim = query.shape
    grouped = query.view(num_tokens, num_kv_heads, -1, head_dim)
    return grouped.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)


def rows_of_sinks(sink_logits: torch.Tensor, num_kv_heads: int, num_rows: int) -> torch.Tensor:
    """[num_q_heads] of any float dtype -> [H, num_rows] fp32: the sink of each row of
    `by_kv_head`."""
    grouped = sink_logits.float().view(num_kv_heads, -1)
    return grouped.repeat_interleave(num_rows // grouped.shape[1], dim=1)
