"""The drift rule: how many top pages are watched, and when a cluster is refreshed."""

from __future__ import annotations

import math

import torch

from vllm_heterocache.kernels.drift_score_ref import drift_score_ref, top_pages_ref

# The top 5 % of a prompt's pages, independent of the budget, so that one threshold means the
# same at every ratio (quality study: with a chance-corrected threshold of 0.7, checked at every
# step, equal in accuracy to refreshing always at 57 % of the refreshes).
TOP_SHARE = 0.05
MIN_TOP_PAGES = 4


def num_top_pages(num_pages: int) -> int:
    """Pages in the set that a pivot watches, for a prompt of `num_pages` full pages."""
    return min(num_pages, max(MIN_TOP_PAGES, math.ceil(TOP_SHARE * num_pages)))


def reference_sets(scores: torch.Tensor) -> torch.Tensor:
    """The sets later steps are compared with.

    Args:
        scores: [num_pivots, num_pages] fp32 page scores.

    Returns:
        [num_pivots, num_top_pages(num_pages)] int64 page positions.
    """
    return top_pages_ref(scores, num_top_pages(scores.shape[1]))


def update_drifted(scores: torch.Tensor, reference: torch.Tensor, threshold: float) -> torch.Tensor:
    """Find the pivots whose attention drifted, and move their reference sets (paper,
    algorithm 1: the reference becomes the current set when a refresh is triggered).

    Args:
        scores: [num_pivots, num_pages] fp32 page scores of the last decode query.
        reference: [num_pivots, top_k] int64, updated in place for the drifted pivots.
        threshold: chance-corrected overlap below which a pivot has drifted.

    Returns:
        [num_pivots] bool.
    """
    current = top_pages_ref(scores, reference.shape[1])
    drifted = drift_score_ref(current, reference, scores.shape[1]) < threshold
    reference[drifted] = current[drifted]
    return drifted
