"""Reference of the drift check against slow truths in plain Python."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from retrieval_case import GROUP, KV_HEADS, LAYERS, NUM_PIVOTS, Case, int32, make_case

from vllm_heterocache.kernels.drift_check_ref import drift_check_ref, has_drifted_ref
from vllm_heterocache.kernels.reference_set import num_top_pages
from vllm_heterocache.kernels.tables import drift_counters
from vllm_heterocache.kernels.top_pages_ref import score_keys_ref
from vllm_heterocache.kernels.values import DriftRule

CPU = torch.device("cpu")


class Checked:
    """A case whose row r is slot r, with the books of its checks."""

    def __init__(self, page_counts: list[int]) -> None:
        self.case = make_case(page_counts, CPU)
        self.waves_left = self.case.waves_left(0)
        self.counters = drift_counters(CPU)
        self.head_lse = torch.zeros(LAYERS, len(page_counts) * KV_HEADS, GROUP)

    def check(self, slots: list[int], threshold: float = 0.7) -> None:
        drift_check_ref(
            self.case.tables,
            self.case.maps,
            int32(slots, CPU),
            self.head_lse,
            DriftRule(threshold, 2),
            256,
            self.waves_left,
            self.counters,
        )


def set_scores(case: Case, slot: int, pivot: int, scores: torch.Tensor) -> None:
    """Let the pivot's attention, relative to a head lse of 0, be these [P] page scores."""
    places = case.pivot_places(slot, pivot)
    case.tables.page_lse[places] = scores.log2()[:, None] - torch.arange(GROUP)


def slow_top(scores: torch.Tensor, k: int) -> set[int]:
    keys = score_keys_ref(scores).tolist()
    return set(sorted(range(len(keys)), key=lambda page: (-keys[page], page))[:k])


@pytest.mark.parametrize(
    ("num_pages", "expected"),
    [(1, 1), (3, 3), (4, 4), (63, 4), (80, 4), (81, 5), (100, 5), (101, 6), (8192, 410)],
)
def test_five_percent_of_the_pages_are_watched_but_at_least_four(num_pages, expected):
    assert num_top_pages(num_pages) == expected


@pytest.mark.parametrize("threshold", ["0", "0.2", "0.7", "1"])
@pytest.mark.parametrize("num_pages", [5, 40, 111, 8192, 65535])
def test_overlap_is_corrected_for_chance(num_pages, threshold):
    top = num_top_pages(num_pages)
    chance = Fraction(top, num_pages)
    for shared in {0, 1, *range(0, top, max(1, top // 50)), top}:
        corrected = (Fraction(shared, top) - chance) / (1 - chance)
        expected = corrected < Fraction(threshold)
        assert has_drifted_ref(shared, num_pages, DriftRule(float(threshold), 1)) == expected, (
            shared
        )


def test_scores_are_the_attention_mass_of_pages():
    pages = 61
    checked = Checked([pages])
    tables, maps = checked.case.tables, checked.case.maps
    mass = torch.rand(NUM_PIVOTS, pages + 1, GROUP, dtype=torch.float64) ** 8  # the last: the tail
    offset = torch.rand(NUM_PIVOTS, 1, GROUP) * 40
    for pivot, flat in enumerate(maps.pivot_heads.tolist()):
        lse = mass[pivot].log2() + offset[pivot]
        tables.page_lse[checked.case.pivot_places(0, pivot)] = lse[:-1].float()
        layer, head = divmod(flat, KV_HEADS)
        checked.head_lse[layer, head] = lse.exp2().sum(0).log2().float()
    checked.check([0])
    shares = (mass / mass.sum(1, keepdim=True))[:, :-1].amax(2)
    for pivot in range(NUM_PIVOTS):
        scores = tables.scores[checked.case.pivot_places(0, pivot)]
        torch.testing.assert_close(scores, shares[pivot].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("threshold", [0.2, 0.7, 1.0])
def test_a_pivot_drifts_under_the_threshold_and_only_then_its_reference_moves(threshold):
    pages = 81
    top = num_top_pages(pages)
    checked = Checked([pages])
    case, counters = checked.case, checked.counters
    scores = torch.rand(NUM_PIVOTS, pages)
    reference, waves = [], [0] * NUM_PIVOTS
    for pivot in range(NUM_PIVOTS):
        reference.append(slow_top(scores[pivot], top))
        members = torch.zeros(pages, dtype=torch.int8)
        members[list(reference[pivot])] = 1
        case.tables.is_reference[case.pivot_places(0, pivot)] = members
    seen = []
    for _ in range(40):
        for pivot in range(NUM_PIVOTS):  # some pages rise above all others
            risen = random.sample(range(pages), random.randint(0, 2))
            scores[pivot, risen] = scores.max() * (1.01 + torch.rand(len(risen)))
            set_scores(case, 0, pivot, scores[pivot])
        checked.check([0], threshold)
        for pivot in range(NUM_PIVOTS):
            places = case.pivot_places(0, pivot)
            current = slow_top(case.tables.scores[places], top)
            chance = Fraction(top, pages)
            shared = Fraction(len(current & reference[pivot]), top)
            drifted = (shared - chance) / (1 - chance) < Fraction(str(threshold))
            reference[pivot] = current if drifted else reference[pivot]
            waves[pivot] = 2 if drifted else max(0, waves[pivot] - 1)
            seen.append(drifted)
            members = case.tables.is_reference[places].nonzero().flatten()
            assert set(members.tolist()) == reference[pivot]
        assert checked.waves_left[0].tolist() == waves
        assert counters.tolist() == [len(seen), sum(seen), 0]
    assert set(seen) == {True, False}


def test_slow_drift_is_compared_with_the_last_trigger_not_with_the_last_step():
    """One of four top pages changes at each step: no step differs much from the one before."""
    checked = Checked([40])
    places = checked.case.pivot_places(0, 1)
    checked.case.tables.is_reference[places] = (torch.arange(40) < 4).to(torch.int8)
    for step in range(1, 4):
        scores = torch.full((40,), 0.01)
        scores[step : step + 4] = 1.0
        for pivot in range(NUM_PIVOTS):
            set_scores(checked.case, 0, pivot, scores)
        before = checked.waves_left[0, 1].item()
        checked.check([0], 0.5)
        # 2 of 4 shared is less than .5 after the correction
        assert (checked.waves_left[0, 1].item() > before) == (step == 2)
    members = checked.case.tables.is_reference[places].nonzero().flatten().tolist()
    assert members == [2, 3, 4, 5]


def test_prompts_so_short_that_every_page_is_watched_never_drift():
    checked = Checked([4])
    checked.check([0], 1.0)
    assert checked.counters.tolist() == [3, 0, 0] and not checked.waves_left.any()


def test_rows_without_a_slot_are_left_alone():
    checked = Checked([37, 61])
    for pivot in range(NUM_PIVOTS):
        top = checked.case.tables.is_reference[checked.case.pivot_places(0, pivot)]
        top.copy_(torch.arange(37) < 4)
        set_scores(checked.case, 0, pivot, torch.linspace(0.1, 1.0, 37))  # the last are best now
    before = checked.case.copy().tables
    checked.waves_left.fill_(9)
    checked.check([-1, 0], 1.0)
    assert (checked.waves_left[0] == 2).all() and (checked.waves_left[1:] == 9).all()
    assert checked.counters.tolist() == [NUM_PIVOTS, NUM_PIVOTS, 0]
    first = checked.case.pivot_places(0, 0).start
    mine = slice(first, first + NUM_PIVOTS * 37)
    for name in ("scores", "is_reference"):
        now, then = getattr(checked.case.tables, name), getattr(before, name)
        same = now.nan_to_num(7.5) == then.nan_to_num(7.5)
        same[mine] = True
        assert same.all()
