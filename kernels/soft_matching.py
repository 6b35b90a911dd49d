"""Chunked soft matching: a few centroids of a head's tokens, found by matching neighbours.

After Chelsea (arXiv 2506.11418). Plain torch on every device: once a prompt, nothing waits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Centroids(NamedTuple):
    """What stands for the tokens of B heads, m for each, in the order of the prompt."""

    keys: torch.Tensor  # [B, m, D] fp32
    values: torch.Tensor  # [B, m, D] fp32
    bias: torch.Tensor  # [B, m] fp32, ln of the tokens that are merged in one


def soft_matching(kv: torch.Tensor, num_kept: int, chunk_tokens: int) -> Centroids:
    """Merge n tokens of each head to `num_kept` centroids.

    The tokens are divided into chunks, whose sizes differ by a token at most. In a round the tokens
    of a chunk are divided in turn into A and B. Each of A is matched to the one of B whose key has
    the largest cosine with its own. Of these pairs the most similar ones are merged, as many as
    the chunk is to lose: each of B becomes the mean of the tokens that it then stands for. A round
    halves a chunk at most, so rounds follow until each chunk has its share of the centroids.

    Args:
        kv: [B, n, 2 * D] any float dtype, K then V.
        num_kept: m, 1 <= m <= n.
        chunk_tokens: tokens of a chunk that is wanted, at least 1. Chunks are longer where the last
            one is not full, and where m / 2 would be fewer than the chunks.
    """
    num_tokens, head_dim = kv.shape[1], kv.shape[2] // 2
    assert 1 <= num_kept <= num_tokens and chunk_tokens >= 1
    num_chunks = max(1, min(num_tokens // chunk_tokens, num_kept // 2))
    number = torch.arange(num_chunks + 1, device=kv.device)
    bounds = number * num_tokens // num_chunks
    kept_bounds = bounds * num_kept // num_tokens
    sizes, kept = bounds.diff(), kept_bounds.diff()
    widths = _Widths.of(num_tokens, num_kept, num_chunks)
    within = torch.arange(widths.tokens, device=kv.device)
    place = (bounds[:-1, None] + within).clamp(max=num_tokens - 1)
    tokens = kv[:, place].float()  # [B, C, w, 2 * D]
    weights = (within < sizes[:, None]).float().expand(tokens.shape[:-1])
    for width in widths.rounds:
        left = torch.maximum(kept, sizes - sizes // 2)
        tokens, weights = _match(tokens, weights, sizes, sizes - left, width, head_dim)
        sizes = left
    of_kept = torch.arange(num_kept, device=kv.device)
    chunk = torch.searchsorted(kept_bounds[1:], of_kept, right=True)
    flat = chunk * tokens.shape[2] + of_kept - kept_bounds[chunk]
    keys, values = tokens.flatten(1, 2)[:, flat].split(head_dim, dim=-1)
    return Centroids(keys, values, weights.flatten(1, 2)[:, flat].log())


class _Widths(NamedTuple):
    """Tokens of the largest chunk, which the host has to know."""

    tokens: int  # before the first round
    rounds: list[int]  # behind each

    @classmethod
    def of(cls, num_tokens: int, num_kept: int, num_chunks: int) -> _Widths:
        bounds = np.arange(num_chunks + 1) * num_tokens // num_chunks
        sizes, kept = np.diff(bounds), np.diff(bounds * num_kept // num_tokens)
        assert (kept > 0).all()
        first, rounds = int(sizes.max()), []
        while (sizes > kept).any():
            sizes = np.maximum(kept, sizes - sizes // 2)
            rounds.append(int(sizes.max()))
        return cls(first, rounds)


def _match(
    tokens: torch.Tensor,
    weights: torch.Tensor,
    sizes: torch.Tensor,
    num_merged: torch.Tensor,
    width: int,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One round.

    Args:
        tokens: [B, C, w, 2 * D] fp32; those behind a chunk's size are nothing.
        weights: [B, C, w] fp32, tokens that each stands for.
        sizes, num_merged: [C] int64, tokens of each chunk, and how many it loses.
        width: w of the result, the tokens of the largest chunk then.
    """
    is_there = torch.arange(tokens.shape[2], device=tokens.device) < sizes[:, None]  # [C, w]
    directions = torch.nn.functional.normalize(tokens[..., :head_dim], dim=-1)
    cosines = directions[:, :, 0::2] @ directions[:, :, 1::2].transpose(2, 3)  # [B, C, A, B]
    is_pair = is_there[:, 0::2, None] & is_there[:, None, 1::2]
    best, partner = cosines.masked_fill_(~is_pair, -torch.inf).max(dim=3)  # [B, C, A]
    rank = best.sort(dim=2, descending=True, stable=True).indices.argsort(dim=2)
    is_merged = rank < num_merged[:, None]
    moved = torch.where(is_merged, weights[:, :, 0::2], 0.0)
    sums = tokens[:, :, 1::2] * weights[:, :, 1::2, None]
    index = partner[..., None].expand(*partner.shape, sums.shape[3])
    sums.scatter_add_(2, index, tokens[:, :, 0::2] * moved[..., None])
    weights = weights.clone()
    weights[:, :, 1::2].scatter_add_(2, partner, moved)
    tokens = tokens.clone()
    tokens[:, :, 1::2] = sums / weights[:, :, 1::2, None].clamp(min=1.0)
    is_gone = ~is_there.expand(weights.shape)
    is_gone[:, :, 0::2] |= is_merged
    order = is_gone.int().sort(dim=2, stable=True).indices[:, :, :width]
    by_token = order[..., None].expand(*order.shape, tokens.shape[3])
    return tokens.gather(2, by_token), weights.gather(2, order)
