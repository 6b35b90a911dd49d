"""Reference of a retrieval's moves against slow truths in plain Python."""

from __future__ import annotations

import random

import pytest
import torch
from retrieval_case import (
    NUM_PIVOTS,
    NUM_SATELLITES,
    Case,
    assert_same_tables,
    int32,
    make_case,
    moves_in_use,
    rotations,
)

from vllm_heterocache.kernels.retrieval_moves_ref import (
    exchange_ref,
    retrieval_moves_ref,
    shares_ref,
)
from vllm_heterocache.kernels.tables import Moves, drift_counters
from vllm_heterocache.kernels.top_pages_ref import MAX_KEY, protect_ref, score_keys_ref
from vllm_heterocache.kernels.values import Protected

CPU = torch.device("cpu")
PROTECTED = Protected(1, 3)


def list_moves(
    case: Case,
    slots: list[int],
    waves_left: torch.Tensor | None = None,
    num_spares: int | None = None,
    max_moves: int = 5000,
    rotation: int = 0,
    protected: Protected = PROTECTED,
) -> Moves:
    moves = Moves.allocate(max_moves, CPU)
    counters = drift_counters(CPU)
    waves_left = case.waves_left() if waves_left is None else waves_left
    retrieval_moves_ref(
        case.tables, case.maps, int32(slots, CPU), waves_left, case.spares(slots, num_spares),
        moves, counters, protected, rotations(slots, rotation, CPU), 256,
    )  # fmt: skip
    assert counters.tolist() == [0, 0, int(moves.total)]
    return moves


def slow_exchange(keys: list[int], held: list[int]) -> tuple[list[int], list[int]]:
    """(missing pages, best first; indices into `held` to replace, worst first)."""
    ranked = sorted(range(len(keys)), key=lambda page: (-keys[page], page))
    wanted = ranked[: len(held)]
    missing = [page for page in wanted if page not in held]
    replaced = [index for index, page in enumerate(held) if page not in wanted]
    return missing, sorted(replaced, key=lambda index: keys[held[index]])


def test_protected_pages_stand_above_all_others():
    scores = torch.tensor([0.5, torch.inf, 0.1, 0.0, 0.2])
    keys = score_keys_ref(scores)
    before = keys.tolist()
    assert protect_ref(keys, Protected(1, 2)).tolist() == [
        MAX_KEY, *before[1:3], MAX_KEY, MAX_KEY
    ]  # fmt: skip
    assert protect_ref(keys, Protected(0, 0)).tolist() == before
    assert protect_ref(keys[:2], PROTECTED).tolist() == [MAX_KEY] * 2
    assert keys.tolist() == before


@pytest.mark.parametrize("num_levels", [2, 5, 10**4])
@pytest.mark.parametrize(("num_pages", "count"), [(1, 1), (40, 0), (40, 1), (63, 20), (111, 111)])
def test_the_best_missing_pages_replace_the_worst_held_ones(num_pages, count, num_levels):
    for _ in range(5):
        keys = torch.randint(num_levels, (num_pages,))
        held = torch.randperm(num_pages)[:count]
        is_resident = torch.zeros(num_pages, dtype=torch.int8)
        is_resident[held] = 1
        exchange = exchange_ref(keys, is_resident, held)
        missing, replaced = slow_exchange(keys.tolist(), held.tolist())
        assert exchange.missing.tolist() == missing
        assert exchange.replaced.tolist() == replaced


@pytest.mark.parametrize(
    ("counts", "allowed", "rotation", "expected"),
    [
        ([3, 0, 2], 9, 0, [(0, 3), (3, 0), (3, 2)]),  # there is enough for all
        ([9, 0, 2], 8, 0, [(0, 4), (4, 0), (4, 2)]),  # half of it is the most one may have
        ([9, 9, 9], 2, 0, [(0, 1), (1, 1), (2, 0)]),  # fewer than satellites: the last goes short
        ([9, 9, 9], 2, 1, [(1, 1), (2, 0), (0, 1)]),  # the last satellite is now number 0
        ([9, 9, 9], 2, 7, [(1, 1), (2, 0), (0, 1)]),
        ([4, 4], 0, 0, [(0, 0), (0, 0)]),
        ([0, 0], 5, 1, [(0, 0), (0, 0)]),
    ],
)
def test_a_row_divides_its_moves_evenly_and_takes_turns(counts, allowed, rotation, expected):
    assert shares_ref(counts, allowed, rotation) == expected


def test_shares_never_overlap_nor_exceed_what_is_allowed():
    for _ in range(300):
        counts = [random.choice([0, 1, 5, 50]) for _ in range(random.randint(1, 9))]
        allowed, rotation = random.randint(0, 80), random.randint(0, 99)
        shares = shares_ref(counts, allowed, rotation)
        moves = [move for first, number in shares for move in range(first, first + number)]
        assert sorted(moves) == list(range(len(moves))) and len(moves) <= allowed
        assert all(number <= count for (_, number), count in zip(shares, counts, strict=True))
        if sum(counts) <= allowed // len(counts):
            assert [number for _, number in shares] == counts
        if any(counts) and allowed:
            assert moves


@pytest.mark.parametrize("num_spares", [0, 1, 7, None])
@pytest.mark.parametrize(
    ("page_counts", "slots"), [([63], [0]), ([37, 5, 111], [2, -1, 0])], ids=str
)
def test_moves_join_pages_entries_and_spares_in_order(page_counts, slots, num_spares):
    case = make_case(page_counts, CPU)
    before = case.copy().tables
    moves = moves_in_use(list_moves(case, slots, num_spares=num_spares))
    assert_same_tables(case.tables, before)
    for row, slot in enumerate(slots):
        mine = [move for move in moves if move[0] == row]
        if slot < 0:
            assert not mine
            continue
        spares = sorted(move[3] for move in mine)
        first = case.first_spare[slot]
        assert spares == list(range(first, first + len(mine)))
        assert len(mine) <= min(num_spares or 10**9, case.num_spares[slot]) or num_spares == 0
        for satellite in range(NUM_SATELLITES):
            check_satellite(case, slot, satellite, [m[2:] for m in mine if m[1] == satellite])


def check_satellite(case: Case, slot: int, satellite: int, moves: list[tuple[int, ...]]) -> None:
    tables, maps = case.tables, case.maps
    span = case.list_entries(slot, int(maps.satellite_heads[satellite]))
    scores = tables.scores[case.pivot_places(slot, int(maps.leaders[satellite]))]
    keys = protect_ref(score_keys_ref(scores), PROTECTED).tolist()
    missing, replaced = slow_exchange(keys, tables.positions[span].tolist())
    listed, spares, pages, host_pages, gpu_pages = ([m[i] for m in moves] for i in range(5))
    first_entry = int(tables.start[slot, 0, 0])
    assert pages == sorted(missing[: len(moves)]) and spares == sorted(spares)
    assert listed == [span.start - first_entry + i for i in sorted(replaced[: len(moves)])]
    assert gpu_pages == [int(tables.entries[first_entry + spare]) for spare in spares]
    place = int(tables.first_stripe[slot]) * tables.host_width
    blocks = tables.host_blocks[place : place + case.prompt_pages(slot)].tolist()
    assert host_pages == [blocks[page] * NUM_SATELLITES + satellite for page in pages]


def test_only_followers_of_pivots_that_drifted_are_served():
    case = make_case([111], CPU)
    for pivot in range(NUM_PIVOTS):
        waves_left = case.waves_left(0)
        waves_left[0, pivot] = 3
        moves = moves_in_use(list_moves(case, [0], waves_left))
        assert {int(case.maps.leaders[move[1]]) for move in moves} <= {pivot}
    assert list_moves(case, [0], case.waves_left(0)).total == 0


def test_who_comes_first_changes_with_the_rotation():
    case = make_case([111], CPU)
    needy = {move[1] for move in moves_in_use(list_moves(case, [0]))}
    served = [
        {m[1] for m in moves_in_use(list_moves(case, [0], num_spares=1, rotation=r))}
        for r in range(NUM_SATELLITES)
    ]
    assert set.union(*served) == needy and all(len(one) == 1 for one in served)
