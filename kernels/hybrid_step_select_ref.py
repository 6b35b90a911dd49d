"""Reference of step selection among the pages that a head kept, by attention on their summaries.

For requests whose prompt is compacted. Of its pages each head lists some, and the others are idle;
both are put in order anew in each step, before the layer's decode attention.
"""

from __future__ import annotations

import math

import torch

from vllm_heterocache.kernels.kv_scales import KVScales, logit_scales
from vllm_heterocache.kernels.tables import DecodeRows, PageTables, StepTables
from vllm_heterocache.kernels.top_pages_ref import MAX_KEY, score_keys_ref, top_mask_ref
from vllm_heterocache.kernels.values import Protected


def hybrid_step_select_ref(
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

    The entries of a list and of the idle pages behind it are permuted: those that are chosen come
    first, each part in ascending order of the prompt. Of the pages that a head holds, sinks and
    recent pages of the prompt come before all others. Heads without idle pages, and rows without
    tokens, are left alone.

    Args:
        query: [num_rows, num_q_heads, D].
        tables: `entries` and `positions` are permuted; `count` and `idle_pages` say how far.
        step: `summaries` of the pages that the entries name are read. `keys` is a workspace.
        rows: rows of the batch; block tables are not read.
        layer: index of this layer in a block.
        scale: softmax scale.
        protected: pages that come before all others.
        channel_share: of the D channels, (0, 1] (`approximate_attention`).
        kv_scales: of fp8 pages.
    """
    num_kv_heads = tables.count.shape[2]
    assert tables.idle_pages is not None
    slots, num_tokens = rows.row_to_table_slot.tolist(), rows.seq_lens.tolist()
    scales = torch.as_tensor(logit_scales(scale, kv_scales, layer), device=query.device)
    scales = scales.expand(num_kv_heads, 1, 1)
    for row, slot in enumerate(slots):
        idle = tables.idle_pages[slot, layer].tolist()
        if not num_tokens[row] or not any(idle):
            continue
        num_pages = int(tables.prompt_pages[slot])
        starts, counts = tables.start[slot, layer].tolist(), tables.count[slot, layer].tolist()
        grouped = query[row].float().view(num_kv_heads, -1, query.shape[2])
        for head, (start, count, more) in enumerate(zip(starts, counts, idle, strict=True)):
            if more:
                held = slice(start, start + count + more)
                places, order = tables.positions[held].sort()
                page_ids = tables.entries[held][order].long()
                summaries = step.summaries[page_ids].float()
                scores = approximate_attention(
                    grouped[head], summaries, scales[head], channel_share
                )
                is_protected = (places < protected.sinks) | (places >= num_pages - protected.recent)
                keys = score_keys_ref(scores).masked_fill(is_protected, MAX_KEY)
                _permute(tables, held, order, top_mask_ref(keys, count))


def approximate_attention(
    queries: torch.Tensor,
    summaries: torch.Tensor,
    scale: float | torch.Tensor,
    channel_share: float = 1.0,
) -> torch.Tensor:
    """Attention of a group on pages, each of which has one vector for its keys.

    That vector has the largest key of a channel where the sum of the queries is positive, and the
    least elsewhere. Only the channels with the largest `sum_g |q_g|` are looked at, of equal ones
    the first, and the logits of query g are divided by the square root of their share of `|q_g|`
    (as in SparQ), which makes up for the smaller sum. The softmax runs over the pages.

    The sums are of the queries without the scale. A few queries of 16 bits add up without rounding,
    to zero in some channels. Once scaled, they would add up to noise of either sign.

    Args:
        queries: [G, D] fp32.
        summaries: [n, 2, D] fp32, least and largest key of each channel.
        scale: of the logits, a number or [1, 1] fp32.
        channel_share: of the D channels, rounded up to a whole number, (0, 1].

    Returns:
        [n] fp32, mean over the group.
    """
    head_dim = queries.shape[1]
    sizes = queries.abs()
    num_channels = math.ceil(head_dim * channel_share)
    order = sizes.sum(dim=0).sort(descending=True, stable=True).indices
    channels = order[:num_channels]
    is_positive = queries.sum(dim=0)[channels] > 0
    least, largest = summaries[..., channels].unbind(1)
    keys = torch.where(is_positive, largest, least)  # [n, r]
    share = sizes[:, channels].sum(dim=1) / sizes.sum(dim=1)
    logits = queries[:, channels] @ keys.T * (scale / share.sqrt()[:, None])  # [G, n]
    return logits.softmax(dim=1).mean(dim=0)


def _permute(tables: PageTables, held: slice, order: torch.Tensor, chosen: torch.Tensor) -> None:
    """order: [n] int64, places of a head's pages in ascending order of the prompt; chosen: [n]
    bool, in that order."""
    order = torch.cat((order[chosen], order[~chosen]))
    for arena in (tables.entries, tables.positions):
        arena[held] = arena[held][order]
