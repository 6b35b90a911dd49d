from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from vllm_heterocache.drift import num_top_pages, reference_sets, update_drifted


@pytest.mark.parametrize(
    "num_pages, expected",
    [(1, 1), (3, 3), (4, 4), (63, 4), (80, 4), (81, 5), (100, 5), (101, 6), (8192, 410)],
)
def test_five_percent_of_the_pages_are_watched_but_at_least_four(num_pages, expected):
    assert num_top_pages(num_pages) == expected


def slow_top(scores: list[float], top_k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda page: (-scores[page], page))[:top_k]


def test_reference_sets_are_the_best_pages():
    scores = torch.rand(3, 111, generator=torch.Generator().manual_seed(0))
    expected = [slow_top(row, 6) for row in scores.tolist()]
    assert reference_sets(scores).tolist() == expected


@pytest.mark.parametrize("threshold", [0.2, 0.7, 1.0])
def test_a_pivot_drifts_under_the_threshold_and_only_then_its_reference_moves(threshold):
    rng = random.Random(5)
    num_pivots, num_pages, top_k = 3, 81, 5
    scores = torch.rand(num_pivots, num_pages, generator=torch.Generator().manual_seed(1))
    reference = reference_sets(scores)
    expected = [slow_top(row, top_k) for row in scores.tolist()]
    seen = set()
    for _ in range(60):
        for pivot in range(num_pivots):  # some pages rise above all others
            risen = rng.sample(range(num_pages), rng.randint(0, 2))
            scores[pivot, risen] = scores.max() + torch.rand(len(risen))
        drifted = update_drifted(scores, reference, threshold).tolist()
        for pivot, row in enumerate(scores.tolist()):
            current = slow_top(row, top_k)
            shared = Fraction(len(set(current) & set(expected[pivot])), top_k)
            chance = Fraction(top_k, num_pages)
            moved = float((shared - chance) / (1 - chance)) < threshold
            assert drifted[pivot] == moved
            if moved:
                expected[pivot] = current
            seen.add(moved)
        assert [set(r) for r in reference.tolist()] == [set(r) for r in expected]
    assert seen == {True, False}


def test_slow_drift_is_compared_with_the_last_refresh_not_with_the_last_step():
    """One of four top pages changes at each step: no step differs much from the one before."""
    reference = torch.arange(4)[None]
    for step in range(1, 4):
        scores = torch.zeros(1, 40)
        scores[0, step : step + 4] = 1.0
        drifted = update_drifted(scores, reference, 0.5)
        assert bool(drifted) == (step == 2)  # 2 of 4 shared, less than .5 after the correction
    assert reference[0].sort().values.tolist() == [2, 3, 4, 5]


def test_prompts_so_short_that_every_page_is_watched_never_drift():
    scores = torch.rand(2, 4)
    reference = reference_sets(scores)
    assert not update_drifted(scores.flip(1), reference, 1.0).any()
