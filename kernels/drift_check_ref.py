"""Reference of the drift check: page scores of the leading pivots, and whose top pages moved."""

from __future__ import annotations

import math

import torch

from vllm_heterocache.kernels.tables import HeadMaps, PageTables
from vllm_heterocache.kernels.top_pages_ref import score_keys_ref, top_mask_ref

# The top 5 % of a prompt's pages, independent of the budget, so that one threshold means the
# same at every ratio (quality study: with a chance-corrected threshold of 0.7, checked at every
# step, equal in accuracy to refreshing always at 57 % of the refreshes).
TOP_DIVISOR = 20
MIN_TOP_PAGES = 4
THRESHOLD_UNIT = 10**6  # thresholds count in millionths, so that comparisons are exact
FORCED_BITS = 24  # of the random numbers behind `forced_share`


def num_top_pages(num_pages: int) -> int:
    """Pages in the set that a pivot watches, for a prompt of `num_pages` full pages."""
    return min(num_pages, max(MIN_TOP_PAGES, -(-num_pages // TOP_DIVISOR)))


def threshold_units(threshold: float) -> int:
    return round(threshold * THRESHOLD_UNIT)


def has_drifted_ref(num_shared: int, num_pages: int, threshold: float) -> bool:
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
    limit = threshold_units(threshold) * top * (num_pages - top)
    return above_chance * THRESHOLD_UNIT < limit


def random_bits_ref(seed: int, row: int, pivot: int) -> int:
    """FORCED_BITS bits from a 32-bit hash, in numbers that int64 holds."""
    state = seed & 0x7FFFFFFF
    for value in (row, pivot):
        state ^= value
        for _ in range(2):
            state = ((state ^ (state >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        state ^= state >> 16
    return state >> (32 - FORCED_BITS)


def forced_bound(share: float) -> int:
    """`random_bits_ref` is below it with probability `share`; 0, for a share of 0 only, means that
    nothing is forced."""
    return math.ceil(share * (1 << FORCED_BITS))


def drift_check_ref(
    tables: PageTables,
    maps: HeadMaps,
    slots: torch.Tensor,
    due: torch.Tensor,
    head_lse: torch.Tensor,
    threshold: float,
    refresh_waves: int,
    max_pages: int,
    dirty: torch.Tensor,
    counters: torch.Tensor,
    forced_share: float = 0.0,
    seed: int = 0,
) -> None:
    """Score the pages of the due pivots, and find those whose attention drifted (paper, algorithm
    1: the reference becomes the current set when a refresh is triggered).

    A page's score is the attention mass of the last decode query on it, the largest over the
    query heads of the group. Written are tables.scores of the due pivots, tables.is_reference
    of those that drifted, and dirty.

    Args:
        slots: [num_rows] int32, slot of each batch row, -1 for rows to leave alone.
        due: [num_due] int32 pivot indices, distinct.
        head_lse: [num_layers, >= num_rows * H, G] fp32, base 2, over all that row r, head h
            reads at [layer, r * H + h]; tables.page_lse is of the same step.
        threshold: chance-corrected overlap below which a pivot has drifted, in millionths.
        refresh_waves: what a drift sets its pivot's count to, > 0.
        max_pages: most full prompt pages of a slot of the batch.
        dirty: [S + 1, num_pivots] int32, waves of retrieval that are still wanted, this one
            included; counts down with each check that finds no drift.
        counters: [4] int64; 0 grows by the checks made, 1 by the drifts.
        forced_share: for benchmarks: if > 0, this share of the checks finds drift, by chance.
        seed: of that chance.
    """
    group = tables.page_lse.shape[1]
    num_kv_heads = tables.count.shape[2]
    heads = maps.pivot_heads[due.long()].long()
    for row, slot in enumerate(slots.tolist()):
        if slot < 0 or due.numel() == 0:
            continue
        num_pages = int(tables.prompt_pages[slot])
        assert num_pages <= max_pages
        first = int(tables.first_row[slot]) * tables.pivot_width
        for pivot, flat in zip(due.tolist(), heads.tolist(), strict=True):
            layer, head = divmod(flat, num_kv_heads)
            begin = first + pivot * num_pages
            places = slice(begin, begin + num_pages)
            lse = head_lse[layer, row * num_kv_heads + head]
            assert lse.shape == (group,)
            tables.scores[places] = (tables.page_lse[places] - lse).exp2().amax(1)
            keys = score_keys_ref(tables.scores[places])
            current = top_mask_ref(keys, num_top_pages(num_pages))
            if forced_share > 0:
                drifted = random_bits_ref(seed, row, pivot) < forced_bound(forced_share)
            else:
                num_shared = int((current & (tables.is_reference[places] != 0)).sum())
                drifted = has_drifted_ref(num_shared, num_pages, threshold)
            if drifted:
                tables.is_reference[places] = current.to(torch.int8)
                dirty[slot, pivot] = refresh_waves
            else:
                dirty[slot, pivot].sub_(1).clamp_(min=0)
            counters[0] += 1
            counters[1] += int(drifted)
