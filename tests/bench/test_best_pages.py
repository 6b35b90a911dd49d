"""best_pages.py: how far a choice of pages is from the best one."""

from __future__ import annotations

import pytest
import torch

from common.best_pages import SAME_SCORE, shortfall


@pytest.mark.parametrize(
    ("listed", "others", "expected"),
    [
        ([3.0, 2.0], [1.0, 0.0], 0.0),
        ([3.0, 2.0], [2.0], 0.0),
        ([3.0, 1.5], [2.0, 1.0], 0.25),
        ([3.0, 0.0], [2.0], 1.0),
        ([0.0], [0.0], 0.0),
        ([torch.inf, 2.0], [1.0], 0.0),
        ([torch.inf, 3.0], [torch.inf], 1.0),  # a page that must be listed is not
        ([torch.inf], [torch.inf, 1.0], 0.0),  # not all of these fit
        ([], [1.0], 0.0),
        ([1.0], [], 0.0),
    ],
)
def test_the_shortfall_is_that_of_the_worst_listed_page(listed, others, expected):
    assert shortfall(torch.tensor(listed), torch.tensor(others)) == expected


def test_the_worst_list_counts():
    listed = torch.tensor([[3.0, 2.0], [3.0, 1.0]])
    assert shortfall(listed, torch.tensor([[1.0], [2.0]])) == 0.5


@pytest.mark.parametrize("scores", [([torch.nan, 2.0], [1.0]), ([2.0], [1.0, torch.nan])])
def test_no_choice_by_nan_is_right(scores):
    assert not shortfall(*map(torch.tensor, scores)) <= SAME_SCORE


def test_the_same_score_is_that_of_the_same_key():
    """And of a key that rounding changed."""
    score = torch.tensor([1.0, 1.0 - 2.0**-13 - 1e-6])
    assert shortfall(score[1:], score[:1]) < SAME_SCORE
    assert shortfall(score[1:] * (1 - 2.0**-13), score[:1] * 1.00003) > SAME_SCORE
