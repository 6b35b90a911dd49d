"""Reference of page selection: which pages a head keeps under its budget."""

from __future__ import annotations

import torch


def page_select_ref(
    scores: torch.Tensor, budget: int, sink_pages: int, recent_pages: int
) -> torch.Tensor:
    """The protected pages and the highest-scored others, exactly `budget` of them.

    The choice is by score alone, never by position (the paper's code cuts a position-sorted
    list, which loses the latest pages). Ties go to the earlier page.

    Args:
        scores: [num_pages] fp32.
        budget: pages to keep, sink_pages + recent_pages <= budget <= num_pages unless
            budget == num_pages.
        sink_pages, recent_pages: first and last pages that are always kept.

    Returns:
        [budget] int64 page positions, best first; protected pages come before the others.
    """
    num_pages = scores.shape[0]
    if budget == num_pages:
        return torch.arange(num_pages, device=scores.device)
    assert sink_pages + recent_pages <= budget < num_pages
    ranked = scores.clone()
    ranked[:sink_pages] = torch.inf
    if recent_pages:
        ranked[-recent_pages:] = torch.inf
    return ranked.sort(descending=True, stable=True).indices[:budget]
