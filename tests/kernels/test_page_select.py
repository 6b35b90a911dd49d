from __future__ import annotations

import random
import struct

import pytest
import torch
from selection_case import FIRST_STRIPE, UNSET, make_selection_case

from vllm_heterocache.kernels.page_select_ref import choose_pages_ref, page_select_ref
from vllm_heterocache.kernels.values import Protected


def slow_key(score: float) -> int:
    """The upper 21 bits of an fp32 number."""
    return struct.unpack("<i", struct.pack("<f", score))[0] >> 11


def slow_choice(scores: list[float], budget: int, sinks: int, recent: int) -> list[int]:
    """Protected pages in order, then the best others one by one."""
    protected = [p for p in range(len(scores)) if p < sinks or p >= len(scores) - recent]
    others = [p for p in range(len(scores)) if p not in protected]
    chosen = protected[:budget]
    while len(chosen) < budget:
        best = others[0]
        for page in others:
            if slow_key(scores[page]) > slow_key(scores[best]):
                best = page
        others.remove(best)
        chosen.append(best)
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(60))
def test_the_protected_pages_and_the_best_others_are_kept(seed):
    rng = random.Random(seed)
    num_pages = rng.randint(1, 41)
    sinks, recent = rng.randint(0, 2), rng.randint(0, 4)
    budget = rng.randint(0, num_pages)
    levels = rng.choice([3, 1000])  # few levels make ties
    values = [rng.randrange(levels) / 8 for _ in range(num_pages)]
    scores = torch.tensor(values)
    chosen = choose_pages_ref(scores, budget, Protected(sinks, recent))
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == slow_choice(values, budget, sinks, recent)
    assert scores.tolist() == values  # the caller's scores are left alone


def test_a_whole_budget_keeps_every_page_whatever_is_protected():
    assert choose_pages_ref(torch.rand(3), 3, Protected(2, 4)).tolist() == [0, 1, 2]


def test_a_small_budget_loses_the_lowest_scored_pages_not_the_latest():
    """The reference code sorts the pages of a cluster's largest member by position and cuts
    that list: a member with 3 pages would keep 1, 2 and 4 of these and lose the best three."""
    scores = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.3, 0.0, 0.4, 0.6, 0.5, 0.0])
    assert choose_pages_ref(scores, 6, Protected(0, 0)).tolist() == [1, 2, 4, 6, 7, 8]
    assert choose_pages_ref(scores, 3, Protected(0, 0)).tolist() == [6, 7, 8]


def test_scores_that_differ_by_less_than_a_key_are_equal_and_the_earlier_page_is_kept():
    scores = torch.tensor([0.5, 0.25, 0.25001, 0.3, 0.0])
    assert choose_pages_ref(scores, 3, Protected(0, 0)).tolist() == [0, 1, 3]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 9), (3, 2, 111), (1, 5, 40)], ids=str)
def test_lists_and_arenas_of_the_slot_are_filled_and_nothing_else(shape, generator):
    num_layers, num_kv_heads, num_pages = shape
    scores = torch.rand(shape, generator=generator)
    counts = torch.randint(0, num_pages + 1, shape[:2], generator=generator)
    case = make_selection_case(scores, counts, Protected(1, 2)).filled(page_select_ref)
    expected_positions = [UNSET] * len(case.tables.positions)
    expected_source = [UNSET] * len(case.source)
    expected_scores = torch.full_like(case.tables.scores, torch.nan)
    expected_reference = torch.full_like(case.tables.is_reference, 77)
    expected_resident = torch.full_like(case.tables.is_resident, 77)
    entry, heads = 0, num_layers * num_kv_heads
    num_top = min(num_pages, max(4, -(-num_pages // 20)))
    for flat in range(heads):
        values = scores[flat // num_kv_heads, flat % num_kv_heads].tolist()
        kept = slow_choice(values, int(counts.flatten()[flat]), 1, 2)
        best = slow_choice(values, num_top, 0, 0)
        for page in kept:
            expected_positions[FIRST_STRIPE * heads + entry] = page
            expected_source[entry] = int(case.dense_blocks[page]) * heads + flat
            entry += 1
        for page in range(num_pages):
            if flat % 3 == 0:
                place = FIRST_STRIPE * case.tables.pivot_width + flat // 3 * num_pages + page
                expected_scores[place] = values[page]
                expected_reference[place] = page in best
            if flat % 3 == 1:
                place = FIRST_STRIPE * case.tables.satellite_width + flat // 3 * num_pages + page
                expected_resident[place] = page in kept
    assert case.tables.positions.tolist() == expected_positions
    assert case.source.tolist() == expected_source
    assert torch.equal(case.tables.scores.nan_to_num(-1), expected_scores.nan_to_num(-1))
    assert torch.equal(case.tables.is_reference, expected_reference)
    assert torch.equal(case.tables.is_resident, expected_resident)
