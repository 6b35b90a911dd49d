"""Reference of page scores: the attention mass of one query row on each page of a prompt."""

from __future__ import annotations

import torch


def page_scores_ref(
    query: torch.Tensor, keys: torch.Tensor, num_pages: int, page_size: int, scale: float
) -> torch.Tensor:
    """Score the full pages of a prompt by one query row, fp32 throughout.

    Args:
        query: [num_q_heads, head_dim], one row (the last prompt token).
        keys: [num_kv_heads, num_tokens, head_dim], all tokens the row sees.
        num_pages: full pages to score, num_pages * page_size <= num_tokens.
        page_size: tokens a page.
        scale: softmax scale.

    Returns:
        [num_kv_heads, num_pages] fp32, the largest mass over the query heads of a group.
    """
    num_kv_heads, num_tokens, head_dim = keys.shape
    assert num_pages * page_size <= num_tokens
    grouped = query.float().view(num_kv_heads, -1, head_dim) * scale  # [H, G, D]
    weights = torch.matmul(grouped, keys.float().transpose(1, 2)).softmax(dim=-1)  # [H, G, tokens]
    covered = weights[..., : num_pages * page_size]
    return covered.view(num_kv_heads, -1, num_pages, page_size).sum(-1).amax(dim=1)
