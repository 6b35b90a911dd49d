"""Reference of mean pages: what the pages that a head evicted leave behind."""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.tables import PageTables


def page_means_ref(
    pages: torch.Tensor, tables: PageTables, table_slot: int, dense_blocks: torch.Tensor
) -> None:
    """Fill the mean pages of a slot.

    A head that lists n of its P prompt pages and has m mean pages divides the other P - n, in the
    order of the prompt, into N * m runs, the i-th from (P - n) * i // (N * m) on. Token i of its
    mean pages becomes the mean of K and the mean of V over all tokens of run i.

    Args:
        pages: [num_pages, N, 2 * D], K then V; read at the prompt's dense pages.
        tables: a slot whose lists are chosen; in (layer, head) order of the dense pages.
        table_slot: its index.
        dense_blocks: [at least P] integer block ids of the prompt.
    """
    page_size, width = pages.shape[1:]
    num_layers, num_kv_heads = tables.count.shape[1:]
    num_pages = int(tables.prompt_pages[table_slot])
    blocks = dense_blocks[:num_pages].long()
    for flat_head in tables.stand_in_pages[table_slot].flatten().nonzero().flatten().tolist():
        layer, head = divmod(flat_head, num_kv_heads)
        start, count, means = (
            int(table[table_slot, layer, head])
            for table in (tables.start, tables.count, tables.stand_in_pages)
        )
        is_evicted = torch.ones(num_pages, dtype=torch.bool, device=pages.device)
        is_evicted[tables.positions[start : start + count].long()] = False
        evicted = blocks[is_evicted] * (num_layers * num_kv_heads) + flat_head
        sums = pages[evicted].float().sum(dim=1)  # [P - n, 2 * D]
        num_runs = page_size * means
        first = torch.arange(num_runs + 1, device=pages.device) * evicted.shape[0] // num_runs
        sizes = first.diff()
        assert (sizes > 0).all(), "more runs than evicted pages"
        run_sums = torch.segment_reduce(sums, "sum", lengths=sizes)
        filled = run_sums / (page_size * sizes[:, None])
        targets = tables.entries[start + count : start + count + means].long()
        pages[targets] = filled.view(means, page_size, width).to(pages.dtype)
