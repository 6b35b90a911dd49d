from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vllm_heterocache.page_table import PageTable

CPU = torch.device("cpu")


@dataclass
class Model:
    """One slot in plain Python: lists of (page id, prompt page), and spare page ids."""

    blocks: list[int]
    lists: dict[tuple[int, int], list[tuple[int, int]]]
    spares: list[int]
    num_pages: int


class Books:
    """A table beside its plain-Python model, with random operations on both."""

    def __init__(self, num_slots: int, num_blocks: int, layers: int, heads: int, seed: int) -> None:
        self.table = PageTable(num_slots, num_blocks, layers, heads, CPU)
        self.layers, self.heads, self.num_slots = layers, heads, num_slots
        self.per_block = layers * heads
        self.free_blocks = list(range(num_blocks))
        self.models: dict[int, Model] = {}
        self.rng = random.Random(seed)

    def allocate(self, num_blocks: int | None = None) -> int:
        rng = self.rng
        count = num_blocks or rng.randint(1, min(6, len(self.free_blocks)))
        blocks = rng.sample(self.free_blocks, count)
        self.free_blocks = [b for b in self.free_blocks if b not in blocks]
        num_pages = rng.randint(count, 3 * count)
        budgets = np.array([rng.randint(0, count) for _ in range(self.per_block)])
        budgets = budgets.reshape(self.layers, self.heads)
        slot = self.table.allocate(blocks, budgets, num_pages)
        assert slot not in self.models and slot != self.table.dense_slot
        pages = iter([b * self.per_block + i for b in blocks for i in range(self.per_block)])
        lists = {}
        for layer in range(self.layers):
            for head in range(self.heads):
                positions = sorted(rng.sample(range(num_pages), budgets[layer, head]))
                lists[layer, head] = [(next(pages), position) for position in positions]
                entries = self.table.head_entries(slot, layer, head)
                assert bool((self.table.positions[entries] == -1).all())
                self.table.positions[entries] = torch.tensor(positions, dtype=torch.int32)
        self.models[slot] = Model(blocks, lists, list(pages), num_pages)
        return slot

    def release(self, slot: int) -> None:
        self.table.release(slot)
        self.free_blocks += self.models.pop(slot).blocks

    def flip(self, slot: int) -> None:
        """Replace random listed pages of one head by random spare ones."""
        model, rng = self.models[slot], self.rng
        key = rng.choice(sorted(model.lists))
        held = model.lists[key]
        absent = sorted(set(range(model.num_pages)) - {position for _, position in held})
        count = rng.randint(0, min(len(held), len(model.spares), len(absent)))
        listed = rng.sample(range(len(held)), count)
        spare = rng.sample(range(len(model.spares)), count)
        positions = rng.sample(absent, count)
        base, table = self.table.base(slot), self.table
        table.flip(
            slot,
            torch.tensor(listed, dtype=torch.int64) + table.head_entries(slot, *key).start - base,
            torch.tensor(spare, dtype=torch.int64) + table.spare_entries(slot).start - base,
            torch.tensor(positions, dtype=torch.int64),
        )
        for i, j, position in zip(listed, spare, positions, strict=True):
            page, _ = held[i]
            held[i], model.spares[j] = (model.spares[j], position), page

    def check(self) -> None:
        table = self.table
        table.check_integrity({slot: model.blocks for slot, model in self.models.items()})
        for slot, model in self.models.items():
            assert int(table.prompt_pages[slot]) == model.num_pages
            for key, expected in model.lists.items():
                entries = table.head_entries(slot, *key)
                found = zip(
                    table.entries[entries].tolist(), table.positions[entries].tolist(), strict=True
                )
                assert list(found) == expected
            assert table.entries[table.spare_entries(slot)].tolist() == model.spares
        for slot in set(range(self.num_slots + 1)) - self.models.keys():
            assert not table.count[slot].any() and int(table.prompt_pages[slot]) == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_operations_keep_every_page_in_exactly_one_entry(seed):
    layers, heads = [(1, 1), (2, 3), (3, 1), (2, 2), (1, 5), (3, 2)][seed]
    books = Books(num_slots=5, num_blocks=17, layers=layers, heads=heads, seed=seed)
    for _ in range(120):
        can_allocate = books.free_blocks and len(books.models) < books.num_slots
        actions = ["flip", "flip", "release"] if books.models else []
        action = books.rng.choice(actions + ["allocate"] * 2 * bool(can_allocate))
        if action == "allocate":
            books.allocate()
        else:
            slot = books.rng.choice(sorted(books.models))
            books.flip(slot) if action == "flip" else books.release(slot)
        books.check()
    for slot in list(books.models):
        books.release(slot)
    books.check()
    assert bool((books.table.entries == -1).all())


def fragmented_books() -> tuple[Books, int, int]:
    """Rows: free 3, slot of 4, free 3, slot of 2, free 1: six free, no six together."""
    books = Books(num_slots=5, num_blocks=13, layers=2, heads=3, seed=3)
    slots = [books.allocate(n) for n in (3, 4, 3, 2)]
    books.release(slots[0])
    books.release(slots[2])
    return books, slots[1], slots[3]


def test_gaps_are_closed_when_only_their_sum_is_large_enough():
    books, first, second = fragmented_books()
    assert books.table.base(first) == 3 * 6
    books.allocate(6)
    assert (books.table.base(first), books.table.base(second)) == (0, 4 * 6)
    books.check()


def test_a_gap_that_is_large_enough_is_used_without_moving_anyone():
    books, first, second = fragmented_books()
    before = books.table.base(first), books.table.base(second)
    slot = books.allocate(3)
    assert books.table.base(slot) == 0
    assert (books.table.base(first), books.table.base(second)) == before
    books.check()


def test_entries_relative_to_the_base_stay_valid_when_gaps_are_closed():
    """A transfer that is under way names entries, and its slot moves before it ends."""
    books, first, _ = fragmented_books()
    table, model = books.table, books.models[first]
    key = next(key for key, held in model.lists.items() if held)
    assert model.spares
    base = table.base(first)
    listed = torch.tensor([table.head_entries(first, *key).start - base])
    spare = torch.tensor([table.spare_entries(first).start - base])
    position = next(p for p in range(99) if p not in [q for _, q in model.lists[key]])
    books.allocate(6)
    assert table.base(first) != base
    table.flip(first, listed, spare, torch.tensor([position]))
    page, _ = model.lists[key][0]
    model.lists[key][0], model.spares[0] = (model.spares[0], position), page
    model.num_pages = max(model.num_pages, position + 1)
    table.prompt_pages[first] = model.num_pages
    books.check()


def test_tensors_never_move_in_memory():
    books = Books(num_slots=3, num_blocks=12, layers=2, heads=2, seed=0)

    def addresses() -> list[int]:
        table = books.table
        tensors = (table.entries, table.positions, table.start, table.count, table.prompt_pages)
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    slots = [books.allocate(4), books.allocate(4), books.allocate(4)]
    books.release(slots[0])
    books.release(slots[2])
    books.flip(books.allocate(8))
    books.check()
    assert addresses() == before


def test_more_blocks_than_the_pool_holds_are_an_error():
    books = Books(num_slots=3, num_blocks=5, layers=1, heads=2, seed=0)
    books.allocate(4)
    with pytest.raises(AssertionError, match="more compact blocks"):
        books.table.allocate([4, 5], np.ones((1, 2), int), 2)


def test_budgets_above_the_pages_of_the_blocks_are_an_error():
    with pytest.raises(AssertionError):
        PageTable(1, 4, 1, 2, CPU).allocate([0], np.array([[2, 1]]), 2)


@pytest.fixture
def two_slots() -> tuple[PageTable, int, dict[int, list[int]]]:
    """A table of 2 layers x 2 heads with two requests, each head with 2 of 5 pages, 4 spare."""
    table = PageTable(num_slots=3, num_blocks=9, num_layers=2, num_kv_heads=2, device=CPU)
    blocks = {table.allocate(b, np.full((2, 2), 2), 5): b for b in ([7, 2, 4], [0, 8, 3])}
    for slot in blocks:
        for layer in range(2):
            for head in range(2):
                entries = table.head_entries(slot, layer, head)
                table.positions[entries] = torch.tensor([0, 4], dtype=torch.int32)
    table.check_integrity(blocks)
    return table, min(blocks), blocks


def name_a_page_twice(table: PageTable, slot: int) -> None:
    table.entries[table.base(slot)] = table.entries[table.base(slot) + 5]


def name_a_foreign_page(table: PageTable, slot: int) -> None:
    table.entries[table.base(slot)] = 1 * 4


def lose_a_page(table: PageTable, slot: int) -> None:
    table.entries[table.spare_entries(slot).start] = -1


def exchange_pages_of_two_slots(table: PageTable, slot: int) -> None:
    both = [table.base(slot), table.base(slot + 1)]
    table.entries[both] = table.entries[both[::-1]]


def hold_a_prompt_page_twice(table: PageTable, slot: int) -> None:
    table.positions[table.head_entries(slot, 1, 0)] = 3


def hold_a_page_after_the_prompt(table: PageTable, slot: int) -> None:
    table.positions[table.head_entries(slot, 1, 1).start] = 5


def list_a_page_without_a_position(table: PageTable, slot: int) -> None:
    table.positions[table.head_entries(slot, 0, 1).start] = -1


def give_a_spare_page_a_position(table: PageTable, slot: int) -> None:
    table.positions[table.spare_entries(slot).start] = 1


def lengthen_a_list(table: PageTable, slot: int) -> None:
    table.count[slot, 0, 0] += 1


def start_a_list_elsewhere(table: PageTable, slot: int) -> None:
    table.start[slot, 0, 1] -= 2  # at the list of the head before it


def fill_the_dense_slot(table: PageTable, slot: int) -> None:
    table.count[table.dense_slot, 1, 1] = 1


CORRUPTIONS = [
    name_a_page_twice,
    name_a_foreign_page,
    lose_a_page,
    exchange_pages_of_two_slots,
    hold_a_prompt_page_twice,
    hold_a_page_after_the_prompt,
    list_a_page_without_a_position,
    give_a_spare_page_a_position,
    lengthen_a_list,
    start_a_list_elsewhere,
    fill_the_dense_slot,
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda f: f.__name__)
def test_check_integrity_detects_corruption(corrupt, two_slots):
    table, slot, blocks = two_slots
    corrupt(table, slot)
    with pytest.raises(AssertionError):
        table.check_integrity(blocks)


def test_check_integrity_detects_books_that_differ(two_slots):
    table, slot, blocks = two_slots
    for wrong in ({}, {slot: blocks[slot]}, {**blocks, slot: [7, 2, 5]}, {**blocks, slot: [7, 2]}):
        with pytest.raises(AssertionError):
            table.check_integrity(wrong)
