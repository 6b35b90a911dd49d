"""`retrieval_moves` against its reference, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from retrieval_case import (
    NUM_PIVOTS,
    NUM_SATELLITES,
    POISON,
    Case,
    assert_same_tables,
    int32,
    look_at_blocks,
    make_case,
    moves_in_use,
    rotations,
)
from triton_mode import DEVICE

from vllm_heterocache.kernels.retrieval_moves import retrieval_moves, retrieval_moves_workspace
from vllm_heterocache.kernels.retrieval_moves_ref import retrieval_moves_ref
from vllm_heterocache.kernels.tables import Moves
from vllm_heterocache.kernels.values import DriftCounter, Protected

PROTECTED = Protected(1, 3)


def poisoned_moves(max_moves: int) -> Moves:
    moves = Moves.allocate(max_moves, DEVICE)
    for field in moves:
        field.fill_(POISON)
    return moves


def assert_moves_agree(
    case: Case,
    slots: list[int],
    waves_left: torch.Tensor | None = None,
    num_spares: int | None = None,
    max_moves: int = 4000,
    rotation: int = 0,
    protected: Protected = PROTECTED,
) -> list[tuple[int, ...]]:
    """Run kernel and reference on one case; returns the moves."""
    before = case.copy().tables
    waves_left = case.waves_left() if waves_left is None else waves_left
    waves_before = waves_left.clone()
    rows, rotated = int32(slots, DEVICE), rotations(slots, rotation, DEVICE)
    spares = case.spares(slots, num_spares)
    size = retrieval_moves_workspace(len(slots), NUM_SATELLITES) + 7
    workspace = torch.full((size,), POISON, dtype=torch.int32, device=DEVICE)
    results = []
    for run in (retrieval_moves, retrieval_moves_ref):
        moves, counters = (
            poisoned_moves(max_moves),
            torch.ones(len(DriftCounter), dtype=torch.int64).to(DEVICE),
        )
        run(
            case.tables, case.maps, rows, waves_left, spares, moves, counters, protected,
            rotated, max(case.tables.prompt_pages.tolist()), workspace,
        )  # fmt: skip
        total = int(moves.total)
        assert counters.tolist() == [1, 1, 1 + total]
        assert all(bool((field[total:] == POISON).all()) for field in moves[:-1])
        results.append(moves_in_use(moves))
    assert results[0] == results[1]
    assert workspace[-7:].eq(POISON).all() and torch.equal(waves_left, waves_before)
    assert_same_tables(case.tables, before)
    return results[0]


@pytest.mark.parametrize("num_spares", [0, 1, 5, None])
@pytest.mark.parametrize(
    ("page_counts", "slots"),
    [
        ([63], [0]),
        ([37, 5, 111], [2, -1, 0, 1]),
        ([4, 1, 256, 85], [1, 3, 2, 0]),
        ([301, 257], [-1, 1]),
    ],
    ids=str,
)
def test_moves_are_those_of_the_reference(page_counts, slots, num_spares):
    case = make_case(page_counts, DEVICE)
    waves_left = torch.randint(0, 3, (len(page_counts) + 2, NUM_PIVOTS)).int().to(DEVICE)
    for rotation in (0, 3, 1000):
        assert_moves_agree(case, slots, waves_left, num_spares, rotation=rotation)


@pytest.mark.parametrize("protected", [(0, 0), (4, 0), (0, 9), (70, 70)], ids=str)
def test_protected_pages_are_wanted_first(protected):
    case = make_case([111], DEVICE)
    assert_moves_agree(case, [0], protected=Protected(*protected))


@pytest.mark.parametrize("value", [0.0, 0.25], ids=["zeros", "equal"])
def test_equal_scores_are_ties(value):
    case = make_case([111], DEVICE)
    for pivot in range(NUM_PIVOTS):
        case.tables.scores[case.pivot_places(0, pivot)] = value
    for num_spares in (4, None):
        assert_moves_agree(case, [0], num_spares=num_spares)


def test_nothing_moves_where_nothing_drifted_or_nobody_is_there():
    case = make_case([63, 41], DEVICE)
    assert not assert_moves_agree(case, [0, 1], case.waves_left(0))
    assert not assert_moves_agree(case, [-1, -1])


def test_long_prompts_take_larger_blocks():
    case = make_case([1100], DEVICE)
    assert assert_moves_agree(case, [0], rotation=2)


@pytest.mark.parametrize("num_pages", [65537, 131071])
def test_moves_of_prompts_with_more_pages_than_registers(num_pages):
    case = make_case([37, num_pages], DEVICE)
    assert assert_moves_agree(case, [-1, 1, 0], rotation=2)


@pytest.mark.parametrize(
    ("num_spares", "protected"), [(5, PROTECTED), (None, Protected(70, 9))], ids=str
)
def test_moves_in_blocks_are_those_of_the_reference(num_spares, protected, monkeypatch):
    look_at_blocks(monkeypatch, 64)
    case = make_case([4, 1, 64, 135], DEVICE)
    waves_left = torch.randint(0, 3, (6, NUM_PIVOTS)).int().to(DEVICE)
    assert_moves_agree(case, [1, 3, -1, 2, 0], waves_left, num_spares, protected=protected)


def test_equal_scores_are_ties_across_blocks(monkeypatch):
    look_at_blocks(monkeypatch, 64)
    test_equal_scores_are_ties(0.25)


def test_more_satellites_than_one_turn_of_the_dividing_loop_takes(monkeypatch):
    monkeypatch.setattr("vllm_heterocache.kernels.retrieval_moves.SHARE_BLOCK", 2)
    case = make_case([111, 41], DEVICE)
    for rotation, num_spares in [(0, None), (5, 3), (2, 8), (4, 1)]:
        assert_moves_agree(case, [1, 0], num_spares=num_spares, rotation=rotation)
