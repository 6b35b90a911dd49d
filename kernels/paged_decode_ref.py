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

    Written as the kernel works: every page gives a partial softmax, and the partials of a head
    are merged. A page's share of the merged sum is its score.

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
    assert num_q_heads % num_kv_heads == 0 and pages.shape[2] == 2 * head_dim
    assert lists.start.shape == lists.count.shape == (num_reqs, num_kv_heads)
    page_ids, num_tokens, sizes = _pages_to_read(
        lists, block_table, seq_lens, layer, num_layers, pages.shape[1]
    )
    kv = pages[page_ids].float()  # [n, page_size, 2 * D]
    beyond = torch.arange(pages.shape[1], device=kv.device) >= num_tokens[:, None]
    partial = beyond.any(dim=1).nonzero().flatten()
    kv[partial] = kv[partial].masked_fill(beyond[partial][..., None], 0.0)

    owner = torch.repeat_interleave(sizes)  # [n] index of the page's (row, head)
    grouped = query.float().view(num_reqs * num_kv_heads, -1, head_dim) * scale
    logits = grouped[owner] @ kv[..., :head_dim].transpose(1, 2)  # [n, G, page_size]
    logits[partial] = logits[partial].masked_fill(beyond[partial][:, None], -torch.inf)

    head_max = torch.segment_reduce(logits.amax(-1), "max", lengths=sizes)  # [R * H, G]
    weights = (logits - head_max[owner][..., None]).exp_()
    page_sum = weights.sum(-1)  # [n, G]
    head_sum = torch.segment_reduce(page_sum, "sum", lengths=sizes)
    page_out = weights @ kv[..., head_dim:]  # [n, G, D]
    output = torch.segment_reduce(page_out, "sum", lengths=sizes) / head_sum[..., None]

    ends = sizes.cumsum(0).tolist()
    for row, buffers in enumerate(page_scores or []):
        for head, buffer in buffers.items():
            index = row * num_kv_heads + head
            begin = ends[index - 1] if index else 0
            mass = page_sum[begin : begin + buffer.shape[0]] / head_sum[index]
            torch.amax(mass, dim=1, out=buffer)
    return output.view(num_reqs, num_q_heads, head_dim).to(query.dtype)


def _pages_to_read(
    lists: PageLists,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layer: int,
    num_layers: int,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All pages of all (row, head), behind one another: the head's list, then the live tail.

    Returns:
        page ids [n] int64, valid tokens of each page [n], pages of each (row, head)
        [num_reqs * num_kv_heads].
    """
    num_reqs, num_kv_heads = lists.count.shape
    tail_tokens = seq_lens.long() - lists.tail_start.long() * page_size
    tail_pages = (tail_tokens + page_size - 1) // page_size
    count = lists.count.long().flatten()
    sizes = count + tail_pages.repeat_interleave(num_kv_heads)
    owner = torch.repeat_interleave(sizes)
    within = torch.arange(owner.shape[0], device=owner.device) - (sizes.cumsum(0) - sizes)[owner]
    listed = within < count[owner]
    row, head = owner // num_kv_heads, owner % num_kv_heads
    in_tail = torch.where(listed, 0, within - count[owner])
    block = block_table[row, lists.tail_start.long()[row] + in_tail].long()
    tail_ids = (block * num_layers + layer) * num_kv_heads + head
    entry = torch.where(listed, lists.start.flatten()[owner] + within, 0)
    page_ids = torch.where(listed, lists.entries[entry].long(), tail_ids)
    num_tokens = torch.where(listed, page_size, tail_tokens[row] - in_tail * page_size)
    return page_ids, num_tokens.clamp(max=page_size), sizes
