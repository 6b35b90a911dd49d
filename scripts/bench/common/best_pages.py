"""When a choice of the pages with the highest scores is right, for benchmarks and tests.

A kernel and its reference round scores in different ways. So lists are compared by the scores of
their pages: a page may stand in for another one only where both have as good as the same score.
"""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.top_pages_ref import KEY_SHIFT

FRACTION_BITS = 23  # of fp32
# Relative, between two pages' scores. An emulation of a GPU's arithmetic (sums of tensor cores that
# drop bits, powers of two with an error of 2 ulp) was off by 3.5e-6 at most in 480 lists of 3583
# pages with logits around 8. Two pages may be off to opposite sides, and longer sums by more.
ROUNDING = 2e-5
# Scores with the same key are equal, and of those the first is taken.
SAME_SCORE = 2.0 ** (KEY_SHIFT - FRACTION_BITS) + ROUNDING


def shortfall(listed: torch.Tensor, others: torch.Tensor) -> float:
    """By which share the lowest score of a list is below the highest one of the other pages.

    A right choice has SAME_SCORE at most, of any list. Pages that must be listed have the score
    infinity. It is NaN, and so not right, if a score is.

    Args:
        listed: [..., n] floating point, not negative.
        others: [..., m] of the same leading shape.
    """
    if not listed.numel() or not others.numel():
        return 0.0
    lowest, highest = listed.amin(dim=-1), others.amax(dim=-1)
    gap = torch.where(lowest >= highest, 0.0, 1 - lowest / highest)
    return gap.max().item()
