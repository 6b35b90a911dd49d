"""Pages per head: integers with an exact total, from one pure function of the prompt length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from vllm_heterocache.config import MAX_PROMPT_PAGES, PAGE_SIZE
from vllm_heterocache.heads.assignment import HeadRole
from vllm_heterocache.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_heterocache.heads.assignment import HeadAssignment

# Share of the compressed heads' pages set aside, so that retrieval fills pages that no table names.
SPARE_SHARE = 1 / 16
MIN_SPARE_PAGES = 1  # what a retrieval needs to fetch a page at all
# Most of them for each satellite. They bound what a check brings over the bus, in a step that takes
# no longer because a prompt is longer (docs/performance.md).
SPARE_PAGES_A_SATELLITE = 4


def compact_blocks(num_tokens: int, gpu_budget: float, page_size: int = PAGE_SIZE) -> int:
    """N_c(T): blocks that a prompt of T tokens keeps; the same on every rank and the scheduler."""
    # 1e-9: 0.07 * 100 is a little more than 7 in floating point, and must not become 8
    return math.ceil(gpu_budget * (num_tokens // page_size) - 1e-9)


def whole_blocks(kernel_blocks: int, block_size: int) -> int:
    """Blocks of vLLM's, of `block_size` tokens, that hold so many kernel blocks of a page."""
    return -(-kernel_blocks * PAGE_SIZE // block_size)


def shortest_compacted(feasible: int, gpu_budget: float, block_size: int) -> int:
    """Tokens of the shortest prompt that is compacted.

    Blocks of several pages raise it: from that length on, compaction gives back more blocks than it
    takes. A prompt gives back its full blocks, and takes whole ones. With a budget of 1 nothing is
    ever saved, and the machinery runs all the same.

    Args:
        feasible: tokens of the shortest prompt for which there are pages enough.
    """
    block_pages = block_size // PAGE_SIZE
    if block_pages == 1 or gpu_budget >= 1.0:
        return feasible
    full_blocks = 1

    def num_taken() -> int:
        """Blocks, by the longest prompt with so many full blocks."""
        longest = (full_blocks + 1) * block_pages - 1
        return -(-compact_blocks(longest, gpu_budget, page_size=1) // block_pages)

    while num_taken() >= full_blocks:
        full_blocks += 1
    return max(feasible, full_blocks * block_size)


def spare_pages(assignment: HeadAssignment, num_pages: int, total_pages: int) -> int:
    """Pages of a request's `total_pages` that stay empty for retrieval; at least one where there
    are satellites, which could not get pages otherwise. Finders need none.

    `num_pages` is the number of full prompt pages of one head.
    """
    num_satellites = assignment.count(HeadRole.SATELLITE)
    if num_satellites == 0:
        return 0
    share = int((total_pages - assignment.num_full * num_pages) * SPARE_SHARE)
    most = SPARE_PAGES_A_SATELLITE * num_satellites
    return min(total_pages, max(MIN_SPARE_PAGES, min(share, most)))


def page_budgets(
    assignment: HeadAssignment, num_pages: int, total_pages: int, min_pages: int
) -> np.ndarray:
    """[L, H] int32: pages that each head keeps of a prompt of `num_pages` pages per head.

    Full heads keep all. Compressed heads share the rest in proportion to their weights, each
    within [min(min_pages, num_pages), num_pages]; what one bound takes or gives is spread over the
    others (water filling), and fractions go to the largest remainders, ties to the lowest index.
    The sum is `total_pages`, or every head is whole if `total_pages` allows that.
    Raises Refusal, naming gpu_budget, if `total_pages` is too small.
    """
    full = assignment.full
    budgets = np.full(full.shape, num_pages, np.int32)
    if total_pages >= full.size * num_pages:
        return budgets
    least = min(min_pages, num_pages)
    num_compressed = full.size - assignment.num_full
    floor = assignment.num_full * num_pages + num_compressed * least
    if total_pages < floor:
        raise Refusal(
            f"gpu_budget gives {total_pages} pages to a prompt of {num_pages} pages in "
            f"{full.size} heads, under the floor of {floor} ({assignment.num_full} whole heads, "
            f"at least {least} pages in each of {num_compressed} others)",
            f"raise gpu_budget to {floor / (full.size * num_pages):.3f} or more, or raise "
            "min_prompt_tokens",
        )
    rest = total_pages - assignment.num_full * num_pages
    weights = assignment.weights[~full].astype(np.float64)
    budgets[~full] = _largest_remainder(_water_fill(weights, rest, least, num_pages), rest)
    assert budgets.sum() == total_pages
    return budgets


def smallest_prompt(
    assignments: Sequence[HeadAssignment],
    gpu_budget: float,
    min_pages: int,
    page_size: int = PAGE_SIZE,
) -> int:
    """Tokens of the shortest prompt from which on compaction is feasible on every rank.

    At that length and every longer one, each compressed head gets `min_pages` or more with the
    spare pages set aside. Raises Refusal, naming gpu_budget, if there is none.
    """
    return page_size * max(_smallest_pages(a, gpu_budget, min_pages) for a in assignments)


def _smallest_pages(assignment: HeadAssignment, gpu_budget: float, min_pages: int) -> int:
    num_heads, num_full = assignment.num_heads, assignment.num_full
    if num_full == num_heads and gpu_budget >= 1.0:
        return 1
    # without rounding, pages left per page of prompt for compressed heads, spares taken off
    slope = (gpu_budget * num_heads - num_full) * (1 - SPARE_SHARE)
    needed = (num_heads - num_full) * min_pages
    # a budget so near to the floor that only longer prompts could be compacted is refused
    if num_full == num_heads or slope * MAX_PROMPT_PAGES < needed:
        raise Refusal(
            f"gpu_budget {gpu_budget} leaves compressed heads too little above the floor of "
            f"{assignment.floor:.4f} ({num_full} of {num_heads} heads are kept whole) for the "
            f"{min_pages} pages that each of them keeps at least, however long the prompt",
            'raise gpu_budget, keep fewer heads whole (full_share; thresholds of recipe "paper"), '
            "or lower sink_pages or recent_pages",
        )

    def is_feasible(num_pages: int) -> bool:
        total = compact_blocks(num_pages, gpu_budget, page_size=1) * num_heads
        total -= spare_pages(assignment, num_pages, total)
        return total - num_full * num_pages >= needed

    # Feasible from `num_pages` on; rounding up of N_c makes some shorter prompts feasible too,
    # but not all, so walk down only while every length is.
    num_pages = math.ceil((needed + MIN_SPARE_PAGES) / slope)
    while num_pages > min_pages and is_feasible(num_pages - 1):
        num_pages -= 1
    return num_pages


def _water_fill(weights: np.ndarray, total: int, least: int, most: int) -> np.ndarray:
    """clip(level * weights, least, most) with the level at which the sum is `total`; float64."""
    # The sum grows linearly between the levels at which a head leaves `least` or reaches `most`.
    levels = np.concatenate([least / weights, most / weights])
    order = np.argsort(levels, kind="stable")
    levels = levels[order]
    slopes = np.cumsum(np.concatenate([weights, -weights])[order])
    sums = least * len(weights) + np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(levels))])
    i = int(np.clip(np.searchsorted(sums, total, side="right") - 1, 0, len(levels) - 2))
    # on a plateau the slope is 0 up to float error, and every level up to the next one will do
    step = (total - sums[i]) / slopes[i] if slopes[i] > 0 else 0.0
    level = min(levels[i] + step, levels[i + 1])
    return np.clip(level * weights, least, most)


def _largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Integers next to `shares` (whose sum is `total` up to float error) that sum to `total`."""
    whole = np.floor(shares)
    # rounded, so that remainders that differ by float error are equal
    order = np.argsort(-np.round(shares - whole, 9), kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole.astype(np.int32)
