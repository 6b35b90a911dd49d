"""Reference of decode attention over per-head page lists (specification: README.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PageLists(NamedTuple):
    """The pages each head of one layer reads, and the live tail behind them."""

    entries: torch.Tensor  # [num_entries] int32 page ids, all lists behind one another
    start: torch.Tensor  # [num_reqs, num_kv_heads] int64, first entry of a head's list
    count: torch.Tensor  # [num_reqs, num_kv_heads] int32, pages in the list; 0 for a dense row
    tail_start: torch.Tensor  # [num_reqs] int32, first block-table index of the live tail


def paged_decode_ref(
    query: torch.Tensor,
    pages: torch.Tensor,
    lists: PageLists,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layer: int,
    num_layers: int,
    scale: float,
    page_scores: list[dict[int, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Decode attention in which each KV head reads only its own pages and the live tail.

    Args:
        query: [num_reqs, num_q_heads, head_dim].
        pages: [num_pages, page_size, 2 * head_dim], K then V.
        lists: the page lists of this layer.
        block_table: [num_reqs, max_blocks] int32; only entries from `tail_start` on are read.
        seq_lens: [num_reqs] int32, tokens of the request, the current one included.
        layer: index of this layer in a block, 0 <= layer < num_layers.
        num_layers: layers in a block.
        scale: softmax scale.
        page_scores: for each row, KV head -> [count] fp32 buffer that receives the page scores
            of the head's list.

    Returns:
        [num_reqs, num_q_heads, head_dim], dtype of `query`.
    """
    num_reqs, num_q_heads, head_dim = query.shape
    num_kv_heads = lists.count.shape[1]
    group, page_size = num_q_heads // num_kv_heads, pages.shape[1]
    assert num_q_heads % num_kv_heads == 0 and pages.shape[2] == 2 * head_dim
    assert lists.start.shape == lists.count.shape == (num_reqs, num_kv_heads)
    output = torch.empty_like(query)
    starts, counts = lists.start.tolist(), lists.count.tolist()
    tails, lengths = lists.tail_start.tolist(), seq_lens.tolist()
    for row in range(num_reqs):
        tail_tokens = lengths[row] - tails[row] * page_size
        tail_blocks = -(-tail_tokens // page_size)
        blocks = block_table[row, tails[row] : tails[row] + tail_blocks]
        scored = page_scores[row] if page_scores is not None else {}
        for head in range(num_kv_heads):
            start, count = starts[row][head], counts[row][head]
            tail_ids = (blocks * num_layers + layer) * num_kv_heads + head
            ids = torch.cat((lists.entries[start : start + count], tail_ids)) if count else tail_ids
            num_tokens = count * page_size + tail_tokens
            kv = pages[ids].view(-1, 2 * head_dim)[:num_tokens].float()  # [tokens, 2 * D]
            heads = slice(head * group, (head + 1) * group)
            logits = (query[row, heads].float() * scale) @ kv[:, :head_dim].T  # [G, tokens]
            weights = logits.softmax(dim=-1)
            output[row, heads] = (weights @ kv[:, head_dim:]).to(query.dtype)
            if head in scored:
                mass = weights[:, : count * page_size].view(group, count, page_size).sum(-1)
                torch.amax(mass, dim=0, out=scored[head])
    return output
