"""Reference of the drift check: page scores of the leading pivots, and whose top pages moved."""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.reference_set import num_top_pages
from vllm_heterocache.kernels.tables import HeadMaps, PageTables
from vllm_heterocache.kernels.top_pages_ref import score_keys_ref, top_mask_ref
from vllm_heterocache.kernels.values import THRESHOLD_UNIT, DriftCounter, DriftRule


def has_drifted_ref(num_shared: int, num_pages: int, rule: DriftRule) -> bool:
    """Is the overlap of two sets of top pages, corrected for chance, under the threshold? (Paper
    section 3: overlap coefficient; the correction is ours, so that one threshold holds at every
    length.)

    With K pages in each set and P = `num_pages`, the corrected overlap is
    (num_shared / K - K / P) / (1 - K / P): 1 for equal sets, 0 for what independent sets share
    on average. Where K = P nothing can move.

    Args:
        num_shared: pages in both sets.
    """
    top = num_top_pages(num_pages)
    if top == num_pages:
        return False
    above_chance = num_shared * num_pages - top * top  # 0 .. top * (num_pages - top)
    limit = rule.threshold_units * top * (num_pages - top)
    return above_chance * THRESHOLD_UNIT < limit


def drift_check_ref(
    tables: PageTables,
    maps: HeadMaps,
    table_slots: torch.Tensor,
    head_lse: torch.Tensor,
    rule: DriftRule,
    max_pages: int,
    waves_left: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Score the pages of the leading pivots, and find those whose attention drifted (paper,
    algorithm 1: the reference becomes the current set when a retrieval is triggered).

    A page's score is the attention mass of the last decode query on it, the largest over the
    query heads of the group. Written are tables.scores of the pivots, tables.is_reference of
    those that drifted, and waves_left.

    Args:
        table_slots: [num_rows] int32, table slot of each batch row, -1 for rows to leave alone.
        head_lse: [num_layers, >= num_rows * H, G] fp32, base 2, over all that row r, head h
            reads at [layer, r * H + h]; tables.page_lse is of the same step.
        rule: when a pivot has drifted, and what a drift sets the pivot's count in `waves_left` to.
        max_pages: most full prompt pages of a slot of the batch.
        waves_left: [S + 1, num_pivots] int32, waves of retrieval that are still wanted, this one
            included; counts down with each check that finds no drift.
        counters: [3] int64; CHECKS grows by the checks made, TRIGGERS by the drifts.
    """
    group = tables.page_lse.shape[1]
    num_kv_heads = tables.count.shape[2]
    for row, slot in enumerate(table_slots.tolist()):
        if slot < 0:
            continue
        num_pages = int(tables.prompt_pages[slot])
        assert num_pages <= max_pages
        first = int(tables.first_stripe[slot]) * tables.pivot_width
        for pivot, flat in enumerate(maps.pivot_heads.tolist()):
            layer, head = divmod(flat, num_kv_heads)
            begin = first + pivot * num_pages
            places = slice(begin, begin + num_pages)
            lse = head_lse[layer, row * num_kv_heads + head]
            assert lse.shape == (group,)
            tables.scores[places] = (tables.page_lse[places] - lse).exp2().amax(1)
            keys = score_keys_ref(tables.scores[places])
            current = top_mask_ref(keys, num_top_pages(num_pages))
            num_shared = int((current & (tables.is_reference[places] != 0)).sum())
            drifted = has_drifted_ref(num_shared, num_pages, rule)
            if drifted:
                tables.is_reference[places] = current.to(torch.int8)
                waves_left[slot, pivot] = rule.waves
            else:
                waves_left[slot, pivot].sub_(1).clamp_(min=0)
            counters[DriftCounter.CHECKS] += 1
            counters[DriftCounter.TRIGGERS] += int(drifted)
