"""From dense prompt blocks to page lists: select, copy, offload."""

from __future__ import annotations

import numpy as np
import torch

from vllm_heterocache.head_profile import HeadAssignment
from vllm_heterocache.kernels.page_gather_ref import page_gather_ref
from vllm_heterocache.kernels.page_scores_ref import page_scores_ref
from vllm_heterocache.kernels.page_select_ref import page_select_ref
from vllm_heterocache.kernels.prefill_attention_ref import gather_dense_ref
from vllm_heterocache.page_table import PageTable
from vllm_heterocache.request_state import Capture


def prompt_page_scores(
    capture: Capture, layer: int, kv_cache: torch.Tensor, num_pages: int, scale: float
) -> torch.Tensor:
    """Page scores of the last prompt query in one layer (paper section 3: the prefill set).

    Args:
        kv_cache: [num_blocks, H, page_size, 2 * head_dim], the layer's view of the pool.

    Returns:
        [H, num_pages] fp32.
    """
    assert capture.dense_blocks is not None
    keys, _ = gather_dense_ref(kv_cache, capture.dense_blocks, capture.order.num_tokens)
    return page_scores_ref(capture.last_query[layer], keys, num_pages, kv_cache.shape[2], scale)


def fill_page_lists(
    table: PageTable,
    slot: int,
    pool: torch.Tensor,
    capture: Capture,
    scores: torch.Tensor,
    sink_pages: int,
    recent_pages: int,
) -> None:
    """Choose each head's pages and copy them from the dense blocks to the slot's pages.

    Args:
        pool: [num_pages, page_size, 2 * head_dim], the whole pool as pages.
        scores: [L, H, P] fp32 page scores of the last prompt query.
    """
    num_layers, num_kv_heads, num_pages = scores.shape
    assert capture.dense_blocks is not None
    dense_blocks = capture.dense_blocks[:num_pages].long()
    source = []
    for layer in range(num_layers):
        for head in range(num_kv_heads):
            entries = table.head_entries(slot, layer, head)
            budget = entries.stop - entries.start
            chosen = page_select_ref(scores[layer, head], budget, sink_pages, recent_pages)
            chosen = chosen.sort().values
            table.positions[entries] = chosen.int()
            source.append((dense_blocks[chosen] * num_layers + layer) * num_kv_heads + head)
    listed = slice(table.base(slot), table.spare_entries(slot).start)
    page_gather_ref(pool, torch.cat(source), pool, table.entries[listed])


def satellite_pages(
    assignment: HeadAssignment, satellites: np.ndarray, dense_blocks: torch.Tensor
) -> torch.Tensor:
    """Dense page ids of the satellites' whole prompts.

    Args:
        satellites: [num_satellites] flat head indices.
        dense_blocks: [P] integer block ids.

    Returns:
        [num_satellites, P] int64.
    """
    heads = torch.from_numpy(satellites.astype(np.int64)).to(dense_blocks.device)
    return dense_blocks.long()[None, :] * assignment.num_heads + heads[:, None]
