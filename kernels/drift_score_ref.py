"""Reference of attention drift: has a pivot's set of top pages moved?"""

from __future__ import annotations

import torch


def top_pages_ref(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The `top_k` highest-scored pages of each head.

    Args:
        scores: [num_heads, num_pages] fp32.
        top_k: pages to name, 1 <= top_k <= num_pages.

    Returns:
        [num_heads, top_k] int64; ties go to the earlier page.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def drift_score_ref(current: torch.Tensor, reference: torch.Tensor, num_pages: int) -> torch.Tensor:
    """Overlap of two sets of top pages, corrected for chance (paper section 3: overlap
    coefficient; the correction is ours, so that one threshold holds at every budget).

    Args:
        current, reference: [num_heads, top_k] distinct page positions.
        num_pages: pages the sets were drawn from.

    Returns:
        [num_heads] fp32: 1 for equal sets, 0 for what independent sets share on average. With
        top_k == num_pages nothing can move and the score is 1.
    """
    num_heads, top_k = current.shape
    if top_k >= num_pages:
        return torch.ones(num_heads, device=current.device)
    member = torch.zeros(num_heads, num_pages, dtype=torch.bool, device=current.device)
    member.scatter_(1, reference, True)
    overlap = member.gather(1, current).float().mean(dim=1)
    chance = top_k / num_pages
    return (overlap - chance) / (1 - chance)
