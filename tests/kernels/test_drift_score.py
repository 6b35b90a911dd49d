from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from vllm_heterocache.kernels.drift_score_ref import drift_score_ref, top_pages_ref


def slow_score(current: list[int], reference: list[int], num_pages: int) -> float:
    if len(current) == num_pages:
        return 1.0
    shared = Fraction(sum(page in reference for page in current), len(current))
    chance = Fraction(len(current), num_pages)
    return float((shared - chance) / (1 - chance))


@pytest.mark.parametrize("num_heads, num_pages, top_k", [(1, 2, 1), (5, 63, 4), (7, 111, 30)])
def test_score_is_the_overlap_corrected_for_chance(num_heads, num_pages, top_k):
    rng = random.Random(num_pages)
    current = [rng.sample(range(num_pages), top_k) for _ in range(num_heads)]
    # from nearly equal to independent sets
    reference = [
        rng.sample(row[h:] + rng.sample(sorted(set(range(num_pages)) - set(row)), h), top_k)
        if h < top_k
        else rng.sample(range(num_pages), top_k)
        for h, row in enumerate(current)
    ]
    expected = [slow_score(c, r, num_pages) for c, r in zip(current, reference, strict=True)]
    scores = drift_score_ref(torch.tensor(current), torch.tensor(reference), num_pages)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_equal_sets_score_one_in_any_order():
    pages = torch.tensor([[4, 0, 9], [7, 8, 2]])
    assert drift_score_ref(pages, pages.flip(1), 11).tolist() == [1.0, 1.0]


def test_disjoint_sets_score_below_zero():
    score = drift_score_ref(torch.tensor([[0, 1, 2]]), torch.tensor([[3, 4, 5]]), 12)
    torch.testing.assert_close(score, torch.tensor([-1 / 3]))


@pytest.mark.parametrize("num_pages, top_k", [(20, 4), (20, 16), (300, 15), (300, 200)])
def test_independent_sets_score_zero_on_average_at_every_size(num_pages, top_k):
    generator = torch.Generator().manual_seed(top_k)
    sets = torch.rand(2, 1500, num_pages, generator=generator).argsort(dim=-1)[..., :top_k]
    scores = drift_score_ref(sets[0], sets[1], num_pages)
    assert abs(scores.mean()) < 5 * scores.std() / 1500**0.5
    assert scores.std() > 0


@pytest.mark.parametrize("num_pages", [1, 4])
def test_nothing_can_move_where_the_set_holds_every_page(num_pages):
    pages = torch.arange(num_pages).repeat(2, 1)
    assert drift_score_ref(pages, pages, num_pages).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("num_pages, top_k", [(1, 1), (63, 4), (111, 17), (9, 9)])
def test_top_pages_are_the_best_and_ties_go_to_the_earlier_page(num_pages, top_k):
    rng = random.Random(num_pages * top_k)
    scores = [[rng.randrange(5) / 4 for _ in range(num_pages)] for _ in range(3)]
    best = [sorted(range(num_pages), key=lambda p: (-row[p], p))[:top_k] for row in scores]
    assert top_pages_ref(torch.tensor(scores), top_k).tolist() == best
