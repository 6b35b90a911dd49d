"""Reference of how finders search: the attention to each page of a prompt, by quantised keys."""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.kv_scales import KVScales, logit_scales
from vllm_heterocache.kernels.paged_decode_ref import LOG2_E
from vllm_heterocache.kernels.quantized_keys_ref import first_place, keys_of_codes_ref
from vllm_heterocache.kernels.soft_cap_ref import soft_capped_ref
from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, PageTables
from vllm_heterocache.kernels.values import PAGE_SIZE


def find_pages_ref(
    query: torch.Tensor,
    tables: PageTables,
    finders: FinderTables,
    rows: DecodeRows,
    layer: int,
    scale: float,
    kv_scales: KVScales | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Leave what `paged_decode` leaves for pivots: log-sum-exps of the logits of each prompt page,
    here by quantised keys, for the finders of one layer and rows that are due.

    Args:
        query: [num_rows, num_q_heads, D].
        tables: `page_lse` at the finders' places as pivots is written, base 2.
        finders: `codes` and `grids` are read.
        layer: index of this layer in a block.
        scale: softmax scale.
        kv_scales: of fp8 pages.
        soft_cap: of the logits (soft_cap_ref.py); 0: none.
    """
    num_kv_heads = tables.count.shape[2]
    slots, is_due = rows.row_to_table_slot.tolist(), rows.is_due.tolist()
    num_tokens = rows.seq_lens.tolist()
    scales = torch.as_tensor(logit_scales(scale, kv_scales, layer), device=query.device)
    scales = scales.expand(num_kv_heads, 1, 1)
    for finder, flat in enumerate(finders.heads.tolist()):
        if flat // num_kv_heads != layer:
            continue
        head, pivot = flat % num_kv_heads, int(finders.pivots[finder])
        for row, slot in enumerate(slots):
            num_pages = int(tables.prompt_pages[slot])
            if not num_tokens[row] or not is_due[row] or not num_pages:
                continue
            first = first_place(tables, finders, slot, finder)
            keys = keys_of_codes_ref(finders, slice(first, first + num_pages))
            grouped = query[row].float().view(num_kv_heads, -1, query.shape[2])[head]
            logits = soft_capped_ref(grouped * scales[head] @ keys.flatten(0, 1).T, soft_cap)
            lse = logits.unflatten(1, (num_pages, PAGE_SIZE)).logsumexp(2) * LOG2_E  # [G, P]
            place = int(tables.first_stripe[slot]) * tables.pivot_width + pivot * num_pages
            tables.page_lse[place : place + num_pages] = lse.T
