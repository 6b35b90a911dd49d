"""Reference of step selection: the prompt pages that each head reads in this step.

For requests whose whole prompt stays in the dense blocks of the block table. Their lists name
pages of these blocks, and are written anew in each step, before the layer's decode attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from vllm_heterocache.kernels.kv_scales import KVScales, check_scales, logit_scales
from vllm_heterocache.kernels.page_select_ref import choose_keys_ref
from vllm_heterocache.kernels.soft_cap_ref import soft_capped_ref
from vllm_heterocache.kernels.tables import DecodeRows, PageTables, StepTables, layer_page_ids
from vllm_heterocache.kernels.top_pages_ref import score_keys_ref, signed_keys_ref
from vllm_heterocache.kernels.values import Protected


def step_select_ref(
    query: torch.Tensor,
    tables: PageTables,
    step: StepTables,
    rows: DecodeRows,
    layer: int,
    protected: Protected,
) -> None:
    """Fill the lists of one layer with the pages of the largest bounds on a logit.

    The bound of page p for KV head h is `max_g sum_d max(q_gd * least_pd, q_gd * largest_pd)`: no
    key of the page has a larger product with any query of the group. A soft cap or a logit of an
    attention sink would change no order of these bounds. Sinks and recent pages come
    first; equal keys in the order of pages. A list names its pages in ascending order. Heads that
    keep all pages, and rows without tokens or of slots without a prompt, are left alone.

    Args:
        query: [num_rows, num_q_heads, D].
        tables: `entries` and `positions` of the lists are written; `count` says how long they are.
        step: `summaries` is read; `keys` is a workspace. Summaries of fp8 pages need no scale,
            which would change no order.
        rows: the block table names the prompt's dense blocks.
        layer: index of this layer in a block.
        protected: pages that come before all others.
    """
    num_kv_heads, head_dim = tables.count.shape[2], query.shape[2]
    for prompt in partly_read_prompts(tables, rows, layer):
        least, largest = step.summaries[prompt.page_ids].float().unbind(2)  # [H, P, D]
        grouped = query[prompt.row].float().view(num_kv_heads, -1, head_dim)
        # the larger product is that with the largest key where the query is positive
        bounds = grouped.clamp(min=0) @ largest.transpose(1, 2)  # [H, G, P]
        bounds += grouped.clamp(max=0) @ least.transpose(1, 2)
        keys = signed_keys_ref(bounds.amax(dim=1))
        fill_lists(tables, prompt, layer, keys, protected)


def exact_step_select_ref(
    query: torch.Tensor,
    pages: torch.Tensor,
    tables: PageTables,
    rows: DecodeRows,
    layer: int,
    scale: float,
    protected: Protected,
    kv_scales: KVScales | None = None,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """As `step_select_ref`, with the pages of the largest attention mass.

    The mass of page p for KV head h is `max_g sum_{t in p} softmax(q_g . K * scale)_t`; the
    softmax runs over the full pages of the prompt and the head's sink. Reads all their keys, in
    fp32.

    Args:
        pages: [num_pages, page_size, 2 * D], K then V.
        scale: softmax scale.
        kv_scales: of fp8 pages.
        sink_logits: [L, num_q_heads], any float dtype; None: heads without sinks.
        soft_cap: of the logits (soft_cap_ref.py); 0: none.
    """
    num_kv_heads, head_dim = tables.count.shape[2], query.shape[2]
    check_scales(pages, kv_scales, tables.count.shape[1:])
    for prompt in partly_read_prompts(tables, rows, layer):
        keys = pages[prompt.page_ids, :, :head_dim].float()  # [H, P, page_size, D]
        grouped = query[prompt.row].float().view(num_kv_heads, -1, head_dim)
        grouped = grouped * logit_scales(scale, kv_scales, layer)
        logits = grouped @ keys.flatten(1, 2).transpose(1, 2)  # [H, G, P * page_size]
        logits = soft_capped_ref(logits, soft_cap)
        total = logits.logsumexp(-1, keepdim=True)
        if sink_logits is not None:
            total = total.logaddexp(sink_logits[layer].float().view(total.shape))
        masses = (logits - total).exp().unflatten(-1, keys.shape[1:3]).sum(-1)
        ranks = score_keys_ref(masses.amax(dim=1))
        fill_lists(tables, prompt, layer, ranks, protected)


class BorrowedPrompt(NamedTuple):
    """A prompt in its dense blocks."""

    row: int
    table_slot: int
    page_ids: torch.Tensor  # [H, P] int64, where the prompt's pages of one layer lie


def partly_read_prompts(
    tables: PageTables, rows: DecodeRows, layer: int
) -> Iterator[BorrowedPrompt]:
    """The rows of whose prompt some head reads a part."""
    _, num_layers, num_kv_heads = tables.count.shape
    slots, num_tokens = rows.row_to_table_slot.tolist(), rows.seq_lens.tolist()
    for row, slot in enumerate(slots):
        num_pages = int(tables.prompt_pages[slot])
        if num_tokens[row] and bool((tables.count[slot, layer] < num_pages).any()):
            blocks = rows.block_table[row, :num_pages]
            yield BorrowedPrompt(row, slot, layer_page_ids(blocks, layer, num_layers, num_kv_heads))


def fill_lists(
    tables: PageTables,
    prompt: BorrowedPrompt,
    layer: int,
    keys: torch.Tensor,
    protected: Protected,
) -> None:
    """Let each list of a layer that names a part of the prompt name the pages of the largest keys.

    Args:
        tables: `entries` and `positions` of the lists are written.
        layer: index of this layer in a block.
        keys: [H, P] int32, in the order of the page scores.
        protected: pages that come before all others.
    """
    starts = tables.start[prompt.table_slot, layer].tolist()
    counts = tables.count[prompt.table_slot, layer].tolist()
    for head, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count < keys.shape[1]:
            chosen = choose_keys_ref(keys[head], count, protected)
            tables.positions[start : start + count] = chosen.int()
            tables.entries[start : start + count] = prompt.page_ids[head, chosen].int()
