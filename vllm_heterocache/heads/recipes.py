"""Recipes that turn a head profile into roles, without running the model again."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.refusal import Refusal

if TYPE_CHECKING:
    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.heads.profile import HeadProfile

# Least stability used for a weight 1 / stability: one head that never looks at the same pages
# twice must not take the whole budget. Published clusters have .25-.9.
STABILITY_FLOOR = 0.05
# Weight of a compressed head that retrieves nothing, where the strongest of all heads would have
# 1 + this: so much for each unit of the GPU budget, at most LARGEST_FLOOR. The less there is to
# share, the more of it goes to few heads (docs/quality.md, "Per-head budgets").
FLOOR_OF_BUDGET, LARGEST_FLOOR = 3.0, 0.3
# Recipe "retrieval" without a `full_share` (docs/quality.md, "How many heads stay whole"): share of
# the budget for whole heads; what the other heads keep of a prompt on average before more heads
# stay whole; share of the heads that stay whole even so, because answers are lost without them.
FULL_SHARE = 0.5
LEAST_COMPRESSED_SHARE = 0.035
LEAST_FULL_HEADS = 1 / 90


def assign_heads(
    profile: HeadProfile,
    *,
    recipe: str,
    gpu_budget: float,
    full_share: float | None,
    stability_threshold: float,
    similarity_threshold: float,
    even_budgets: bool = False,
    finder_share: float = 0.0,
) -> HeadAssignment:
    """Role, leader and weight of every head of `profile` (a whole model or one rank of it).

    Raises Refusal for an unknown recipe, a profile that lacks what the recipe needs, and a
    GPU budget that does not exceed the share of heads kept whole.
    """
    if gpu_budget >= 1.0:
        return all_full(profile.model.num_layers, profile.model.num_kv_heads)
    if recipe == "retrieval":
        assignment = _retrieval(profile, gpu_budget, full_share)
        if finder_share:
            assignment = with_finders(assignment, retrieval_score(profile), finder_share)
        fix = "raise gpu_budget"
    elif recipe == "paper":
        assignment = _paper(profile, stability_threshold, similarity_threshold)
        fix = (
            f"raise gpu_budget, change stability_threshold ({stability_threshold}) or "
            f'similarity_threshold ({similarity_threshold}), or use recipe "retrieval"'
        )
    else:
        raise Refusal(f"recipe {recipe!r} is unknown", 'use "retrieval" or "paper"')
    if even_budgets:
        even = (assignment.weights > 0).astype(np.float32)
        assignment = replace(assignment, weights=even)
    assignment.validate()
    if gpu_budget <= assignment.floor:
        raise Refusal(
            f'gpu_budget {gpu_budget} is not above {assignment.floor:.4f}, the floor of recipe "'
            f'{recipe}" ({assignment.num_full} of {assignment.num_heads} heads are kept whole)',
            fix,
        )
    return assignment


def configured_heads(profile: HeadProfile, config: HeteroCacheConfig) -> HeadAssignment:
    """`assign_heads` with the options of `config`."""
    return assign_heads(
        profile,
        recipe=config.recipe,
        gpu_budget=config.gpu_budget,
        full_share=config.full_share,
        stability_threshold=config.stability_threshold,
        similarity_threshold=config.similarity_threshold,
        even_budgets=config.even_budgets,
        finder_share=config.share_of_finders,
    )


def all_full(num_layers: int, num_kv_heads: int) -> HeadAssignment:
    """Every head whole and unled: GPU budget 1.0."""
    shape = (num_layers, num_kv_heads)
    return HeadAssignment(
        np.full(shape, HeadRole.VOLATILE, np.int8),
        np.full(shape, -1, np.int32),
        np.zeros(shape, np.float32),
    )


def retrieval_score(profile: HeadProfile) -> np.ndarray:
    """[L, H] float64 in [0, 1]: the retrieval scores divided by their maximum.

    Raises Refusal where the profile lacks the score of a head.
    """
    if profile.retrieval is None or np.isnan(profile.retrieval).any():
        raise Refusal(
            'recipe "retrieval" needs the retrieval score of every head, which the profile of '
            f"{profile.model.name!r} does not hold",
            'make one with `heterocache calibrate MODEL -o FILE`, or use recipe "paper"',
        )
    score = profile.retrieval.astype(np.float64)
    return score / max(score.max(), 1e-9)


def num_full_heads(num_heads: int, gpu_budget: float, full_share: float | None) -> int:
    """Heads of recipe "retrieval" that stay whole; at least one where that leaves the others pages.

    Args:
        full_share: of the budget, for whole heads, at most; 0: no head stays whole; None:
            FULL_SHARE of it, rounded to the nearest number of heads, and fewer where the others
            would keep too little.
    """
    budget = gpu_budget * num_heads  # in whole heads
    if budget <= 1 or full_share == 0:
        return 0
    if full_share is None:
        others = (budget - LEAST_COMPRESSED_SHARE * num_heads) / (1 - LEAST_COMPRESSED_SHARE)
        most = max(others, LEAST_FULL_HEADS * num_heads)
        count = min(FULL_SHARE * budget + 0.5, most)
    else:
        count = full_share * budget
    return max(1, math.floor(count + 1e-9))  # 1e-9: 0.5 * 0.2 * 90 is 9 in any float arithmetic


def _retrieval(profile: HeadProfile, gpu_budget: float, full_share: float | None) -> HeadAssignment:
    shape = (profile.model.num_layers, profile.model.num_kv_heads)
    num_heads = shape[0] * shape[1]
    num_full = num_full_heads(num_heads, gpu_budget, full_share)
    score = retrieval_score(profile)
    pivots = np.zeros(num_heads, bool)
    pivots[_highest(score, num_full)] = True
    pivots = pivots.reshape(shape)
    leaders = np.where(pivots, -1, profile.nearest_pivots(pivots)).astype(np.int32)
    roles = np.where(leaders >= 0, HeadRole.SATELLITE, HeadRole.ANCHOR).astype(np.int8)
    roles[pivots] = HeadRole.PIVOT
    floor = min(FLOOR_OF_BUDGET * gpu_budget, LARGEST_FLOOR)
    weights = np.where(pivots, 0.0, floor + score)
    return HeadAssignment(roles, leaders, _mean_one(weights))


def with_finders(
    assignment: HeadAssignment, score: np.ndarray, finder_share: float
) -> HeadAssignment:
    """The same with the compressed heads of the highest scores as finders, which alone fetch.

    Args:
        score: [L, H] retrieval scores.
        finder_share: of all heads, rounded to the nearest number of heads, at least one.
    """
    compressed = np.where(assignment.full, -1.0, score)
    count = max(1, math.floor(finder_share * assignment.num_heads + 0.5))
    count = min(count, assignment.num_heads - assignment.num_full)
    finders = _highest(compressed, count)
    roles = np.where(assignment.full, HeadRole.VOLATILE, HeadRole.ANCHOR).astype(np.int8)
    leaders = np.full(roles.shape, -1, np.int32)
    roles.reshape(-1)[finders] = HeadRole.FINDER
    leaders.reshape(-1)[finders] = finders
    return replace(assignment, roles=roles, leaders=leaders)


def _highest(score: np.ndarray, count: int) -> np.ndarray:
    """Flat indices of the `count` highest of [L, H] retrieval scores: whole heads, and finders.

    Heads of equal score may be more than the places that are left. The chosen ones are then spread
    evenly over them, because the first layers would otherwise take all places.

    How much a head resembles others does not count. A choice that also covers the others (greedy
    facility location) leaves out the strongest head where another strong one resembles it, and no
    page list makes up for a whole strong head (docs/design.md, "Recipes").
    """
    if count == 0:
        return np.empty(0, np.int64)
    flat = np.round(score.reshape(-1), 12)
    lowest = np.sort(flat)[-count]
    higher, equal = np.flatnonzero(flat > lowest), np.flatnonzero(flat == lowest)
    num_left = count - len(higher)
    return np.concatenate([higher, equal[np.arange(num_left) * len(equal) // num_left]])


def _paper(profile: HeadProfile, tau_stable: float, tau_sim: float) -> HeadAssignment:
    """The published typing (arXiv 2601.13684): greedy stars in a layer, the rest by stability.

    Differs from the released code where that departs from the paper or is wrong: similarity is a
    median over steps instead of one step, leaders are stored with their satellites (the released
    code looks them up in two different orders), weights are bounded (STABILITY_FLOOR).
    A profile without statistics but with stored roles, such as a published cluster file, gives
    those roles.
    """
    if profile.stability is None or profile.similarity is None:
        if profile.assignment is None:
            raise Refusal(
                'recipe "paper" needs stability and similarity, which the profile of '
                f"{profile.model.name!r} does not hold",
                'make one with `heterocache calibrate MODEL -o FILE`, or use recipe "retrieval"',
            )
        return profile.assignment
    stability = np.nan_to_num(profile.stability, nan=0.0)
    # float32 on both sides: a stored 0.7 must reach the threshold 0.7
    stable = stability >= np.float32(tau_stable)
    roles = np.where(stable, HeadRole.ANCHOR, HeadRole.VOLATILE).astype(np.int8)
    leaders = np.full(roles.shape, -1, np.int32)
    num_kv_heads = roles.shape[1]
    for layer, overlap in enumerate(profile.similarity[0]):
        edges = np.fmax(overlap, overlap.T) >= np.float32(tau_sim)
        for pivot, members in _greedy_stars(edges):
            roles[layer, pivot] = HeadRole.PIVOT
            roles[layer, members] = HeadRole.SATELLITE
            leaders[layer, members] = layer * num_kv_heads + pivot
    full = (roles == HeadRole.PIVOT) | (roles == HeadRole.VOLATILE)
    weights = np.where(full, 0.0, 1.0 / np.maximum(stability, STABILITY_FLOOR))
    return HeadAssignment(roles, leaders, _mean_one(weights))


def _mean_one(weights: np.ndarray) -> np.ndarray:
    """float32; the weights above 0, those of compressed heads, divided by their mean."""
    if weights.any():
        weights = weights / weights[weights > 0].mean()
    return weights.astype(np.float32)


def _greedy_stars(edges: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Stars (centre, members) of a [H, H] bool graph, largest remaining degree first."""
    edges = edges & ~np.eye(len(edges), dtype=bool)
    stars = []
    while edges.any():
        pivot = int(edges.sum(axis=1).argmax())
        members = np.flatnonzero(edges[pivot])
        stars.append((pivot, members))
        taken = [pivot, *members]
        edges[taken, :] = False
        edges[:, taken] = False
    return stars
