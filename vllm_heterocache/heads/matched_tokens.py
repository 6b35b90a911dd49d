"""How many of its pages a head gives to matched tokens (kernels/matched_tokens.py)."""

from __future__ import annotations

import numpy as np

# Of a head. The work of a fit grows with the number of its matched tokens.
MOST_PAGES = 256


def matched_pages(
    budgets: np.ndarray, num_pages: int, min_pages: int, matched_share: float
) -> np.ndarray:
    """[L, H] int32: the share of each head's unprotected pages, rounded down, and MOST_PAGES at
    most. A head that keeps the whole prompt has none.

    Args:
        budgets: [L, H] int, pages of each head.
        num_pages: P, full pages of the prompt.
        min_pages: fewest pages that a list is to keep: the protected ones and one more.
        matched_share: share of the pages that are not protected, [0, 1).
    """
    unprotected = np.maximum(budgets - (min_pages - 1), 0)
    matched = np.minimum(np.floor(matched_share * unprotected), MOST_PAGES)
    matched = np.minimum(matched, np.maximum(budgets - min_pages, 0))
    return np.where(budgets < num_pages, matched, 0).astype(np.int32)
