"""Random compacted requests for the tests of drift checks, moves and flips.

Whatever no slot owns in an arena is poison: NaN, or numbers far outside every pool.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from common.tables import clone_tables, tables_for
from vllm_heterocache.kernels import drift_check
from vllm_heterocache.kernels.tables import HeadMaps, Moves, PageTables

LAYERS, KV_HEADS, GROUP = 3, 4, 3
HEADS = LAYERS * KV_HEADS
NUM_PIVOTS, NUM_SATELLITES = 3, 6
POISON = 10**9


@dataclass
class Case:
    """Tables and maps, and what is true of them in plain Python."""

    tables: PageTables
    maps: HeadMaps
    num_rows: list[int]  # arena rows of each slot
    first_spare: list[int]  # relative entry of each slot's first spare page
    num_spares: list[int]
    gpu_pool: torch.Tensor  # [pages] int64, what a page holds: `content`, or -1
    host_pool: torch.Tensor  # [pages] int64, likewise
    owned: list[list[int]]  # pages of each slot

    def copy(self) -> Case:
        """The same in tensors of its own."""
        return replace(self, tables=clone_tables(self.tables), gpu_pool=self.gpu_pool.clone())

    def prompt_pages(self, slot: int) -> int:
        return int(self.tables.prompt_pages[slot])

    def pivot_places(self, slot: int, pivot: int) -> slice:
        return self._places(slot, pivot, self.tables.pivot_width)

    def satellite_places(self, slot: int, satellite: int) -> slice:
        return self._places(slot, satellite, self.tables.satellite_width)

    def list_entries(self, slot: int, flat_head: int) -> slice:
        start = int(self.tables.start[slot].flatten()[flat_head])
        return slice(start, start + int(self.tables.count[slot].flatten()[flat_head]))

    def lists(self, slot: int) -> Iterator[tuple[int, slice]]:
        return ((flat, self.list_entries(slot, flat)) for flat in range(HEADS))

    def spares(self, slots: list[int], number: int | None = None) -> torch.Tensor:
        """[num_rows, 2] for `retrieval_moves`; poison for rows without a slot."""
        rows = [
            (POISON, POISON)
            if slot < 0
            else (self.first_spare[slot], min(number or POISON, self.num_spares[slot]))
            for slot in slots
        ]
        return int32(rows, self.tables.entries.device)

    def waves_left(self, value: int = 1) -> torch.Tensor:
        return torch.full_like(self.tables.prompt_pages, value)[:, None].repeat(1, NUM_PIVOTS)

    def move_slot(self, slot: int, first_stripe: int) -> None:
        """As if gaps had been closed: the slot's rows now begin elsewhere."""
        tables, old, num = self.tables, int(self.tables.first_stripe[slot]), self.num_rows[slot]
        for arena, width in [
            (tables.entries, HEADS),
            (tables.positions, HEADS),
            (tables.page_lse, tables.pivot_width),
            (tables.scores, tables.pivot_width),
            (tables.is_reference, tables.pivot_width),
            (tables.is_resident, tables.satellite_width),
            (tables.host_blocks, tables.host_width),
        ]:
            moved = arena[old * width : (old + num) * width].clone()
            arena[first_stripe * width : (first_stripe + num) * width] = moved
        tables.first_stripe[slot] = first_stripe
        tables.start[slot] += (first_stripe - old) * HEADS

    def check(self) -> None:
        """Every page of a slot stands in one entry; lists hold what they say; residency agrees."""
        tables = self.tables
        for slot in range(len(self.num_rows)):
            first = int(tables.start[slot, 0, 0])
            entries = tables.entries[first : first + self.num_rows[slot] * HEADS].tolist()
            assert sorted(entries) == sorted(self.owned[slot]), "pages lost or named twice"
            satellites = self.maps.satellite_heads.tolist()
            for flat, span in self.lists(slot):
                held = tables.positions[span].tolist()
                assert len(set(held)) == len(held)
                expected = [content(slot, flat, page) for page in held]
                assert self.gpu_pool[tables.entries[span].long()].tolist() == expected
                if flat in satellites:
                    places = self.satellite_places(slot, satellites.index(flat))
                    resident = tables.is_resident[places].nonzero().flatten().tolist()
                    assert resident == sorted(held)
            spare = first + self.first_spare[slot]
            spare_positions = tables.positions[spare : spare + self.num_spares[slot]]
            assert spare_positions.eq(-1).all()

    def _places(self, slot: int, index: int, width: int) -> slice:
        pages = self.prompt_pages(slot)
        begin = int(self.tables.first_stripe[slot]) * width + index * pages
        return slice(begin, begin + pages)


def rotations(slots: list[int], first: int, device: torch.device) -> torch.Tensor:
    """[num_rows] for `retrieval_moves`, another one for each row."""
    return int32([first + 3 * row for row in range(len(slots))], device)


def int32(values: list, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def content(slot: int, flat_head: int, page: int) -> int:
    return (slot * HEADS + flat_head) * 10**6 + page


def make_case(page_counts: list[int], device: torch.device, spare_rows: int | None = None) -> Case:
    """One slot for each prompt length (in full pages), one free slot and the dense one."""
    maps = _make_maps(device)
    counts = [_make_counts(pages, maps) for pages in page_counts]
    num_rows = [-(-sum(c) // HEADS) + (spare_rows or random.choice([1, 2, 5])) for c in counts]
    widths = [
        max(-(-heads * p // n) for p, n in zip(page_counts, num_rows, strict=True)) + 1
        for heads in (NUM_PIVOTS, NUM_SATELLITES, 1)
    ]
    order = random.sample(range(len(page_counts)), len(page_counts))
    first_stripe, end = [0] * len(order), random.randint(0, 2)
    for slot in order:
        first_stripe[slot] = end
        end += num_rows[slot] + random.randint(0, 2)
    tables = _poisoned_tables(end + max(num_rows), len(order), widths, device)
    sums = [sum(c) for c in counts]
    spares = [n * HEADS - s for n, s in zip(num_rows, sums, strict=True)]
    gpu_pool = torch.full((end * HEADS * 2,), -1, dtype=torch.int64, device=device)
    host_pool = torch.full((sum(page_counts) * 2 * NUM_SATELLITES,), -1, device=device)
    case = Case(tables, maps, num_rows, sums, spares, gpu_pool, host_pool, [])
    page_ids = torch.randperm(gpu_pool.numel(), device=device).int()
    host_ids = torch.randperm(sum(page_counts) * 2, device=device).int()
    for slot, pages in enumerate(page_counts):
        tables.first_stripe[slot] = first_stripe[slot]
        tables.prompt_pages[slot] = pages
        tables.count[slot] = int32(counts[slot], device).view(LAYERS, KV_HEADS)
        first = first_stripe[slot] * HEADS
        offsets = tables.count[slot].flatten().long().cumsum(0) - tables.count[slot].flatten()
        tables.start[slot] = first + offsets.view(LAYERS, KV_HEADS)
        size = num_rows[slot] * HEADS
        tables.entries[first : first + size] = page_ids[:size]
        case.owned.append(page_ids[:size].tolist())
        page_ids = page_ids[size:]
        host_place = first_stripe[slot] * tables.host_width
        tables.host_blocks[host_place : host_place + pages] = host_ids[:pages]
        host_ids = host_ids[pages:]
        _fill_slot(case, slot)
    return case


def _make_maps(device: torch.device) -> HeadMaps:
    heads = random.sample(range(HEADS), NUM_PIVOTS + NUM_SATELLITES)
    pivots, satellites = sorted(heads[:NUM_PIVOTS]), sorted(heads[NUM_PIVOTS:])
    leaders = [random.randrange(NUM_PIVOTS) for _ in satellites]
    of_head = torch.full((2, HEADS), -1, dtype=torch.int32, device=device)
    of_head[0, pivots] = torch.arange(NUM_PIVOTS, dtype=torch.int32, device=device)
    of_head[1, satellites] = torch.arange(NUM_SATELLITES, dtype=torch.int32, device=device)
    return HeadMaps(
        of_head[0].view(LAYERS, KV_HEADS),
        of_head[1].view(LAYERS, KV_HEADS),
        *(int32(heads, device) for heads in (pivots, satellites, leaders)),
    )


def _make_counts(num_pages: int, maps: HeadMaps) -> list[int]:
    """Pivots hold everything, one satellite nothing, one everything, the others anything."""
    counts = [random.randint(0, num_pages) for _ in range(HEADS)]
    satellites = random.sample(maps.satellite_heads.tolist(), NUM_SATELLITES)
    counts[satellites[0]], counts[satellites[1]] = 0, num_pages
    for pivot in maps.pivot_heads.tolist():
        counts[pivot] = num_pages
    return counts


def _poisoned_tables(
    num_rows: int, num_slots: int, widths: list[int], device: torch.device
) -> PageTables:
    """The slots that follow are a free one and the dense one."""
    tables = tables_for(
        (num_slots + 2, LAYERS, KV_HEADS),
        device,
        num_rows=num_rows,
        group=GROUP,
        widths=tuple(widths),
        poison=POISON,
    )
    for of_slots in (tables.start, tables.count, tables.prompt_pages, tables.first_stripe):
        of_slots.zero_()
    return tables


def _fill_slot(case: Case, slot: int) -> None:
    """Lists of random pages in random order, random scores with ties, a random reference."""
    tables, pages, device = case.tables, case.prompt_pages(slot), case.tables.entries.device
    first = int(tables.start[slot, 0, 0])
    tables.positions[first : first + case.num_rows[slot] * HEADS] = -1
    for flat, span in case.lists(slot):
        held = torch.randperm(pages, device=device)[: span.stop - span.start]
        tables.positions[span] = held.int()
        case.gpu_pool[tables.entries[span].long()] = content(slot, flat, 0) + held
    for pivot in range(NUM_PIVOTS):
        places = case.pivot_places(slot, pivot)
        distinct = torch.rand(pages, device=device) ** 5
        tied = torch.randint(0, 3, (pages,), device=device) / 8
        tables.scores[places] = torch.where(torch.rand(pages, device=device) < 0.5, distinct, tied)
        # eighths, so that no rounding of exp2 can change their order
        tables.page_lse[places] = torch.randint(-80, 1, (pages, GROUP), device=device) / 8
        tables.is_reference[places] = (torch.rand(pages, device=device) < 0.05).to(torch.int8)
    host_place = int(tables.first_stripe[slot]) * tables.host_width
    blocks = tables.host_blocks[host_place : host_place + pages].long()
    for satellite, flat in enumerate(case.maps.satellite_heads.tolist()):
        places = case.satellite_places(slot, satellite)
        held = tables.positions[case.list_entries(slot, flat)].long()
        tables.is_resident[places] = 0
        tables.is_resident[places.start + held] = 1
        contents = content(slot, flat, 0) + torch.arange(pages, device=device)
        case.host_pool[blocks * NUM_SATELLITES + satellite] = contents


def look_at_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Kernels that rank a prompt's pages look at `block` of them at a time, however few it has."""
    monkeypatch.setattr(drift_check, "PAGE_BLOCKS", (0,))
    monkeypatch.setattr(drift_check, "LOOP_BLOCK", block)


def assert_same_tables(actual: PageTables, expected: PageTables) -> None:
    """Bit by bit, poison included."""
    for name, one, other in zip(PageTables._fields, actual, expected, strict=True):
        if torch.is_tensor(one):
            assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5)), name
        else:
            assert one == other


def moves_in_use(moves: Moves) -> list[tuple[int, ...]]:
    """The moves as tuples, sorted: rows may come in any order."""
    total = int(moves.total)
    return sorted(zip(*(field[:total].tolist() for field in moves[:-1]), strict=True))
