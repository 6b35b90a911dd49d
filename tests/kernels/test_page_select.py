from __future__ import annotations

import random

import pytest
import torch

from vllm_heterocache.kernels.page_select_ref import page_select_ref


def slow_select(scores: list[float], budget: int, sinks: int, recent: int) -> list[int]:
    """Protected pages in order, then the best others one by one."""
    protected = [p for p in range(len(scores)) if p < sinks or p >= len(scores) - recent]
    others = [p for p in range(len(scores)) if p not in protected]
    chosen = list(protected)
    while len(chosen) < budget:
        best = others[0]
        for page in others:
            if scores[page] > scores[best]:
                best = page
        others.remove(best)
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(60))
def test_keeps_the_protected_pages_and_the_best_others_best_first(seed):
    rng = random.Random(seed)
    num_pages = rng.randint(2, 41)
    sinks, recent = rng.randint(0, 2), rng.randint(0, 4)
    if sinks + recent >= num_pages:
        sinks = recent = 0
    budget = rng.randint(max(1, sinks + recent), num_pages - 1)
    levels = rng.choice([3, 1000])  # few levels make ties
    values = [rng.randrange(levels) / 8 for _ in range(num_pages)]
    scores = torch.tensor(values)
    chosen = page_select_ref(scores, budget, sinks, recent)
    assert chosen.tolist() == slow_select(values, budget, sinks, recent)
    assert scores.tolist() == values  # the caller's scores are left alone


def test_a_whole_budget_keeps_every_page_whatever_is_protected():
    assert page_select_ref(torch.rand(3), 3, 2, 4).tolist() == [0, 1, 2]


def test_a_small_budget_loses_the_lowest_scored_pages_not_the_latest():
    """The reference code sorts the pages of a cluster's largest member by position and cuts
    that list: a member with 3 pages would keep 1, 2 and 4 of these and lose the best three."""
    scores = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.3, 0.0, 0.4, 0.6, 0.5, 0.0])
    assert sorted(page_select_ref(scores, 6, 0, 0).tolist()) == [1, 2, 4, 6, 7, 8]
    assert page_select_ref(scores, 3, 0, 0).tolist() == [7, 8, 6]


def test_a_budget_under_the_protected_pages_is_an_error():
    with pytest.raises(AssertionError):
        page_select_ref(torch.rand(9), 3, 1, 3)
