"""Ways to choose which evicted keys become matched tokens.

Each returns the tokens [B, m] int64 and whether they are evicted [B, m] bool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_heterocache.kernels.matched_tokens import (
    ROUNDS,
    EvictedAttention,
    choose_keys,
    fit_weights,
)

LLOYD_ITERATIONS = 5
Choice = tuple[torch.Tensor, torch.Tensor]


class Evicted(NamedTuple):
    """What there is to choose from, as in kernels/matched_tokens.py."""

    keys: torch.Tensor  # [B, T, D]
    queries: torch.Tensor  # [B, N, D]
    lse: torch.Tensor  # [B, N]
    attention: EvictedAttention
    count: int  # m
    part_tokens: int

    @property
    def importance(self) -> torch.Tensor:
        """[B, T], -1 where a token is not evicted."""
        return self.attention.importance

    @property
    def is_evicted(self) -> torch.Tensor:
        """[B, T] bool."""
        return self.importance >= 0

    def shares(self) -> torch.Tensor:
        """[B, N, T] of all tokens."""
        logits = self.queries @ self.keys.to(self.queries.dtype).mT
        return logits.sub_(self.lse[..., None]).exp_()


def by_importance(evicted: Evicted) -> Choice:
    """The largest mean squared shares."""
    return _top(evicted.importance, evicted.count)


def by_mean(evicted: Evicted) -> Choice:
    """The largest mean shares."""
    mean = evicted.shares().mean(1)
    return _top(mean.masked_fill(~evicted.is_evicted, -1), evicted.count)


def by_largest(evicted: Evicted) -> Choice:
    """The largest share that any query gives."""
    largest = evicted.shares().amax(1)
    return _top(largest.masked_fill(~evicted.is_evicted, -1), evicted.count)


def by_pursuit(evicted: Evicted) -> Choice:
    """Orthogonal matching pursuit in rounds: the largest products with what is missing."""
    shares, free = evicted.shares(), evicted.is_evicted
    chosen = torch.empty(len(shares), 0, dtype=torch.long, device=shares.device)
    missing = evicted.attention.share
    for size in _sizes(evicted):
        product = (shares.mT @ missing[..., None])[..., 0]
        chosen = _extended(chosen, product, free, size)
        mine = _columns(shares, chosen)
        target = (mine.mT @ evicted.attention.share[..., None])[..., 0]
        weights = fit_weights(mine.mT @ mine, target, 30)
        missing = evicted.attention.share - (mine @ weights[..., None])[..., 0]
    return chosen, evicted.is_evicted.gather(1, chosen)


def by_residual(evicted: Evicted) -> Choice:
    """Important keys whose shares differ, as `match_tokens` chooses."""
    return choose_keys(
        evicted.keys,
        evicted.queries,
        evicted.lse,
        evicted.importance,
        evicted.count,
        evicted.part_tokens,
    )


def by_clusters(evicted: Evicted) -> Choice:
    """The most important key of each cluster (k-means by importance, from the most important)."""
    keys, importance = evicted.keys.float(), evicted.importance
    chosen, _ = _top(importance, evicted.count)
    weight = importance.clamp(min=0).sqrt()
    head = torch.arange(len(keys), device=keys.device)[:, None]
    centres = keys[head, chosen]
    for _ in range(LLOYD_ITERATIONS):
        nearest = torch.cdist(keys, centres).argmin(2)
        index = nearest[..., None].expand_as(keys)
        total = torch.zeros_like(centres).scatter_add_(1, index, keys * weight[..., None])
        size = torch.zeros_like(centres[..., 0]).scatter_add_(1, nearest, weight)
        moved = total / size.clamp(min=1e-30)[..., None]
        centres = torch.where(size[..., None] > 0, moved, centres)
    return _best_of_each(evicted, torch.cdist(keys, centres).argmin(2), evicted.count)


def by_runs(evicted: Evicted) -> Choice:
    """Half of them the most important key of as many runs of evicted tokens, half by importance."""
    num_runs = max(1, evicted.count // 2)
    order = evicted.is_evicted.cumsum(1) - 1
    num_evicted = evicted.is_evicted.sum(1, keepdim=True).clamp(min=1)
    return _best_of_each(evicted, (order * num_runs // num_evicted).clamp(min=0), num_runs)


CHOICES: dict[str, Callable[[Evicted], Choice]] = {
    "importance": by_importance,
    "mean": by_mean,
    "largest": by_largest,
    "pursuit": by_pursuit,
    "residual": by_residual,
    "runs": by_runs,
    "clusters": by_clusters,
}


def _top(score: torch.Tensor, count: int) -> Choice:
    best, chosen = score.topk(min(count, score.shape[1]), dim=1)
    return chosen, best >= 0


def _best_of_each(evicted: Evicted, part: torch.Tensor, num_parts: int) -> Choice:
    """The most important token of each part, then the most important of all others.

    `part` [B, T] int64 says which part a token belongs to.
    """
    importance = evicted.importance
    best = importance.new_full((len(part), num_parts), -1)
    best.scatter_reduce_(1, part, importance, "amax")
    is_best = (best.gather(1, part) == importance) & evicted.is_evicted
    return _top(importance + 2 * is_best, evicted.count)


def _sizes(evicted: Evicted) -> list[int]:
    """Sizes of the rounds."""
    ends = [evicted.count * (i + 1) // ROUNDS for i in range(ROUNDS)]
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return [size for size in sizes if size]


def _extended(
    chosen: torch.Tensor, score: torch.Tensor, free: torch.Tensor, size: int
) -> torch.Tensor:
    """`chosen` and the `size` best of the `free` tokens, which are free no longer."""
    more = score.masked_fill(~free, -torch.inf).topk(size, dim=1).indices
    free.scatter_(1, more, False)
    return torch.cat([chosen, more], 1)


def _columns(shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[B, N, m] of shares [B, N, T]."""
    return shares.gather(2, chosen[:, None].expand(-1, shares.shape[1], -1))
