"""A retrieval from its moves to the flip, by the references and by the kernels."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from retrieval_case import (
    HEADS,
    NUM_SATELLITES,
    POISON,
    Case,
    assert_same_tables,
    int32,
    make_case,
    rotations,
)
from triton_mode import DEVICE

from vllm_heterocache.kernels.flip_pages import BLOCK_MOVES, flip_pages
from vllm_heterocache.kernels.flip_pages_ref import flip_pages_ref
from vllm_heterocache.kernels.retrieval_moves import retrieval_moves, retrieval_moves_workspace
from vllm_heterocache.kernels.retrieval_moves_ref import retrieval_moves_ref
from vllm_heterocache.kernels.tables import Moves, drift_counters
from vllm_heterocache.kernels.top_pages_ref import protect_ref, score_keys_ref, top_mask_ref
from vllm_heterocache.kernels.values import Protected

PROTECTED = Protected(1, 3)
KERNELS = SimpleNamespace(list_moves=retrieval_moves, flip=flip_pages)
REFERENCES = SimpleNamespace(list_moves=retrieval_moves_ref, flip=flip_pages_ref)


@pytest.fixture(params=[KERNELS, REFERENCES], ids=["kernels", "references"])
def ops(request) -> SimpleNamespace:
    return request.param


def list_moves(
    run: Callable, case: Case, slots: list[int], num_spares: int | None = None, rotation: int = 0
) -> Moves:
    """Moves of all satellites; what is not in use of the moves holds poison."""
    moves = Moves.allocate(3000, DEVICE)
    for field in moves:
        field.fill_(POISON)
    size = retrieval_moves_workspace(len(slots), NUM_SATELLITES)
    run(
        case.tables,
        case.maps,
        int32(slots, DEVICE),
        case.waves_left(),
        case.spares(slots, num_spares),
        moves,
        drift_counters(DEVICE),
        PROTECTED,
        rotations(slots, rotation, DEVICE),
        max(case.tables.prompt_pages.tolist()),
        torch.full((size,), POISON, dtype=torch.int32, device=DEVICE),
    )
    return moves


def fetch(case: Case, moves: Moves) -> None:
    total = int(moves.total)
    host_pages, gpu_pages = moves.host_page[:total].long(), moves.gpu_page[:total].long()
    case.gpu_pool[gpu_pages] = case.host_pool[host_pages]


def wanted(case: Case, slot: int, satellite: int) -> torch.Tensor:
    """[P] bool, what should be resident."""
    scores = case.tables.scores[case.pivot_places(slot, int(case.maps.leaders[satellite]))]
    span = case.list_entries(slot, int(case.maps.satellite_heads[satellite]))
    return top_mask_ref(protect_ref(score_keys_ref(scores), PROTECTED), span.stop - span.start)


def num_missing(case: Case, slot: int) -> int:
    missing = 0
    for satellite in range(NUM_SATELLITES):
        resident = case.tables.is_resident[case.satellite_places(slot, satellite)]
        missing += int((wanted(case, slot, satellite) & (resident == 0)).sum())
    return missing


@pytest.mark.parametrize("num_spares", [1, 4, None])
@pytest.mark.parametrize(
    ("page_counts", "slots"), [([63], [0]), ([37, 5, 111], [2, -1, 0, 1])], ids=str
)
def test_waves_of_retrieval_bring_every_wanted_page_and_lose_none(
    ops, page_counts, slots, num_spares
):
    case = make_case(page_counts, DEVICE)
    case.check()
    for rotation in range(3):
        before = {slot: num_missing(case, slot) for slot in slots if slot >= 0}
        moves = list_moves(ops.list_moves, case, slots, num_spares, rotation)
        fetch(case, moves)
        case.check()  # pages that lists do not name yet change nothing
        ops.flip(case.tables, moves, int32(slots, DEVICE))
        case.check()
        after = {slot: num_missing(case, slot) for slot in before}
        assert sum(before.values()) - sum(after.values()) == int(moves.total)
        assert all(after[slot] < before[slot] or not before[slot] for slot in before)


def test_with_enough_spares_one_wave_is_enough(ops):
    case = make_case([63], DEVICE, spare_rows=6 * 63)
    moves = list_moves(ops.list_moves, case, [0])
    fetch(case, moves)
    ops.flip(case.tables, moves, int32([0], DEVICE))
    case.check()
    for satellite in range(NUM_SATELLITES):
        resident = case.tables.is_resident[case.satellite_places(0, satellite)]
        assert torch.equal(resident == 1, wanted(case, 0, satellite))
    assert int(list_moves(ops.list_moves, case, [0]).total) == 0


def test_a_slot_may_move_between_plan_and_flip(ops):
    case = make_case([37, 61], DEVICE)
    moves = list_moves(ops.list_moves, case, [1, 0])
    fetch(case, moves)
    missing = num_missing(case, 1)
    end = case.tables.entries.shape[0] // HEADS
    case.move_slot(1, end - case.num_rows[1])
    ops.flip(case.tables, moves, int32([1, 0], DEVICE))
    case.check()
    assert num_missing(case, 1) == missing - int((moves.row == 0).sum())


@pytest.mark.parametrize("gone", [[-1, 0, 1], [2, -1, 1], [-1, -1, -1]], ids=str)
def test_moves_of_a_request_that_left_are_dropped(ops, gone):
    case = make_case([37, 61, 85], DEVICE)
    before = case.copy()
    moves = list_moves(ops.list_moves, case, [2, 0, 1])
    fetch(case, moves)
    ops.flip(case.tables, moves, int32(gone, DEVICE))
    for slot in range(3):
        first = int(case.tables.start[slot, 0, 0])
        span = slice(first, first + case.num_rows[slot] * HEADS)
        same = torch.equal(case.tables.entries[span], before.tables.entries[span])
        assert same == (slot not in gone)
    if gone == [-1, -1, -1]:
        assert_same_tables(case.tables, before.tables)


@pytest.mark.parametrize("num_spares", [1, 3, None])
@pytest.mark.parametrize("spare_rows", [1, 40])
def test_kernel_changes_what_the_reference_changes(spare_rows, num_spares):
    case = make_case([211, 4, 185, 197], DEVICE, spare_rows)
    slots = [3, 1, -1, 0, 2]
    moves = list_moves(retrieval_moves_ref, case, slots, num_spares)
    if spare_rows == 40 and num_spares is None:
        assert int(moves.total) > BLOCK_MOVES
    slots[random.randrange(5)] = -1
    expected = case.copy()
    flip_pages_ref(expected.tables, moves, int32(slots, DEVICE))
    flip_pages(case.tables, moves, int32(slots, DEVICE))
    assert_same_tables(case.tables, expected.tables)


def test_an_empty_plan_changes_nothing(ops):
    case = make_case([37], DEVICE)
    before = case.copy()
    moves = list_moves(ops.list_moves, case, [-1])
    ops.flip(case.tables, moves, int32([0], DEVICE))
    assert_same_tables(case.tables, before.tables)
