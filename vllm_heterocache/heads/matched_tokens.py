"""How many of its pages a head gives to matched tokens (kernels/matched_tokens.py)."""

from __future__ import annotations

import numpy as np

from vllm_heterocache.config import DEFAULT_MATCHED_SHARE, PAGE_SIZE

# Of a head. The work of a fit grows with the number of its matched tokens.
MOST_PAGES = 256
# Last tokens of a prompt to whose queries they are fitted.
REFERENCE_POSITIONS = 128
# Up to this budget each matched token of a head has so many reference queries, and further pages
# stay what they are: in long prompts they answer more (docs/quality.md, "Matched tokens").
SMALL_BUDGET = 0.1
QUERIES_FOR_A_TOKEN = 4
# Of the tokens of these pages, what are means instead (docs/quality.md).
MEANS_SHARE = 0.2
# Where the compressed heads of a model look for facts themselves, and at most so many heads stay
# whole to do it for them, matched tokens take less: pages answer, and matched tokens do not
# (docs/quality.md, "Few heads"). A head looks for facts by its retrieval score, as a share of the
# highest of all heads.
SHARE_OF_FEW_HEADS = 0.1
MOST_WHOLE_OF_FEW = 1
LEAST_SCORE_OF_FEW = 0.25


def most_pages(group: int, gpu_budget: float) -> int:
    """Most pages of a head that hold matched tokens.

    Args:
        group: query heads of a KV head.
    """
    if gpu_budget > SMALL_BUDGET:
        return MOST_PAGES
    return max(1, REFERENCE_POSITIONS * group // QUERIES_FOR_A_TOKEN // PAGE_SIZE)


def default_share(scores: np.ndarray, is_whole: np.ndarray) -> float:
    """`matched_share` where no one chose it.

    Args:
        scores: [L, H] retrieval scores of a model's heads, the highest of which is 1.
        is_whole: [L, H] bool.
    """
    compressed = scores[~is_whole]
    if is_whole.sum() > MOST_WHOLE_OF_FEW or not compressed.size:
        return DEFAULT_MATCHED_SHARE
    is_few = compressed.mean() >= LEAST_SCORE_OF_FEW
    return SHARE_OF_FEW_HEADS if is_few else DEFAULT_MATCHED_SHARE


def matched_pages(
    budgets: np.ndarray, num_pages: int, num_protected: int, matched_share: float, most: int
) -> np.ndarray:
    """[L, H] int32: the share of each head's unprotected pages, `most` at most. A head that keeps
    the whole prompt has none.

    Halves are rounded up, as long as no head has more than the share of all its pages: its biases
    have room for so many. Some pages at least stay in the list.

    Args:
        budgets: [L, H] int, pages of each head.
        num_pages: P, full pages of the prompt.
        num_protected: pages that every head keeps.
        matched_share: share of the pages that are not protected, [0, 1).
        most: `most_pages`.
    """
    unprotected = np.maximum(budgets - num_protected, 0)
    rounding = min(0.5, matched_share * num_protected)
    matched = np.minimum(np.floor(matched_share * unprotected + rounding), most)
    matched = np.minimum(matched, np.maximum(budgets - max(num_protected, 1), 0))
    return np.where(budgets < num_pages, matched, 0).astype(np.int32)


def means_among(pages: np.ndarray, has_means: np.ndarray) -> np.ndarray:
    """[L, H] int: how many of the tokens of matched pages [L, H] are means; fewer than all.

    Args:
        has_means: [L] bool, layers in which means do no harm.
    """
    means = np.ceil(MEANS_SHARE * pages * PAGE_SIZE).astype(int)
    return np.where(has_means[:, None], means, 0)
