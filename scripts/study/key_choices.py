"""Ways to choose which evicted keys become matched tokens.

Each returns the tokens [B, m] int64 and whether they are evicted [B, m] bool.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_heterocache.kernels.matched_tokens import EvictedAttention, fit_weights

ROUNDS = 8
LLOYD_ITERATIONS = 5
Choice = tuple[torch.Tensor, torch.Tensor]


def by_importance(
    keys: torch.Tensor,
    queries: torch.Tensor,
    lse: torch.Tensor,
    evicted: EvictedAttention,
    count: int,
) -> Choice:
    """The largest mean squared shares, as `match_tokens` chooses."""
    return _top(evicted.importance, count)


def by_mean(
    keys: torch.Tensor,
    queries: torch.Tensor,
    lse: torch.Tensor,
    evicted: EvictedAttention,
    count: int,
) -> Choice:
    """The largest mean shares."""
    mean = _shares(keys, queries, lse).mean(1)
    return _top(mean.masked_fill(evicted.importance < 0, -1), count)


def by_largest(
    keys: torch.Tensor,
    queries: torch.Tensor,
    lse: torch.Tensor,
    evicted: EvictedAttention,
    count: int,
) -> Choice:
    """The largest share that any query gives."""
    largest = _shares(keys, queries, lse).amax(1)
    return _top(largest.masked_fill(evicted.importance < 0, -1), count)


def by_pursuit(
    keys: torch.Tensor,
    queries: torch.Tensor,
    lse: torch.Tensor,
    evicted: EvictedAttention,
    count: int,
) -> Choice:
    """Orthogonal matching pursuit in rounds: the largest products with what is missing."""
    shares = _shares(keys, queries, lse)
    free = evicted.importance >= 0
    chosen = torch.empty(len(keys), 0, dtype=torch.long, device=keys.device)
    missing = evicted.share
    for size in _sizes(count):
        product = (shares.mT @ missing[..., None])[..., 0]
        chosen = _extended(chosen, product, free, size)
        mine = shares.gather(2, chosen[:, None].expand(-1, shares.shape[1], -1))
        target = (mine.mT @ evicted.share[..., None])[..., 0]
        weights = fit_weights(mine.mT @ mine, target, 30)
        missing = evicted.share - (mine @ weights[..., None])[..., 0]
    return chosen, (evicted.importance >= 0).gather(1, chosen)


def by_residual(
    keys: torch.Tensor,
    queries: torch.Tensor,
    lse: torch.Tensor,
    evicted: EvictedAttention,
    count: int,
) -> Choice:
    """In each round the largest shares, of what is orthogonal to those chosen before."""
    shares = _shares(keys, queries, lse)
    free = evicted.importance >= 0
    chosen = torch.empty(len(keys), 0, dtype=torch.long, device=keys.device)
    left = shares
    for size in _sizes(count):
        chosen = _extended(chosen, left.square().sum(1), free, size)
        newest = chosen[:, -size:]
        mine = left.gather(2, newest[:, None].expand(-1, left.shape[1], -1))
        basis = torch.linalg.qr(mine).Q
        left = left - basis @ (basis.mT @ left)
    return chosen, (evicted.importance >= 0).gather(1, chosen)


def by_clusters(
    keys: torch.Tensor,
    queries: torch.Tensor,
    lse: torch.Tensor,
    evicted: EvictedAttention,
    count: int,
) -> Choice:
    """The most important key of each cluster (k-means by importance, from the most important)."""
    chosen, _ = _top(evicted.importance, count)
    weight = evicted.importance.clamp(min=0).sqrt()
    head = torch.arange(len(keys), device=keys.device)[:, None]
    centres = keys[head, chosen].float()
    for _ in range(LLOYD_ITERATIONS):
        nearest = torch.cdist(keys.float(), centres).argmin(2)
        index = nearest[..., None].expand_as(keys)
        total = torch.zeros_like(centres).scatter_add_(1, index, keys * weight[..., None])
        size = torch.zeros_like(centres[..., 0]).scatter_add_(1, nearest, weight)
        moved = total / size.clamp(min=1e-30)[..., None]
        centres = torch.where(size[..., None] > 0, moved, centres)
    distance = torch.cdist(keys.float(), centres)
    nearest = distance.argmin(2)
    best = torch.full_like(centres[..., 0], -1).scatter_reduce_(
        1, nearest, evicted.importance, "amax"
    )
    is_best = (best.gather(1, nearest) == evicted.importance) & (evicted.importance >= 0)
    # places of clusters without a member go to the most important of the other keys
    return _top(evicted.importance + 2 * is_best, count)


CHOICES: dict[str, Callable[..., Choice]] = {
    "importance": by_importance,
    "mean": by_mean,
    "largest": by_largest,
    "pursuit": by_pursuit,
    "residual": by_residual,
    "clusters": by_clusters,
}


def _top(score: torch.Tensor, count: int) -> Choice:
    best, chosen = score.topk(min(count, score.shape[1]), dim=1)
    return chosen, best >= 0


def _sizes(count: int) -> list[int]:
    """Sizes of the rounds."""
    ends = [count * (i + 1) // ROUNDS for i in range(ROUNDS)]
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return [size for size in sizes if size]


def _extended(
    chosen: torch.Tensor, score: torch.Tensor, free: torch.Tensor, size: int
) -> torch.Tensor:
    """`chosen` and the `size` best of the `free` tokens, which are free no longer."""
    more = score.masked_fill(~free, -torch.inf).topk(size, dim=1).indices
    free.scatter_(1, more, False)
    return torch.cat([chosen, more], 1)


def _shares(keys: torch.Tensor, queries: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """[B, N, T] of all tokens."""
    return (queries @ keys.float().mT).sub_(lse[..., None]).exp_()
