from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from world import CPU, assignment_of, head_entries, mixed_assignment

from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.heads.recipes import all_full
from vllm_heterocache.kernels.tables import HeadMaps
from vllm_heterocache.worker.tables.finder_keys import FinderKeys
from vllm_heterocache.worker.tables.head_maps import head_maps
from vllm_heterocache.worker.tables.integrity import check_table
from vllm_heterocache.worker.tables.page_table import ArenaWidths, PageTable
from vllm_heterocache.worker.tables.upload import upload

GROUP = 3
BUDGET = 0.4  # a request of n blocks has at most n / BUDGET pages a head


def maps_of(layers: int, heads: int) -> HeadMaps:
    """The first head leads the even ones; (1, 1): one head, kept whole."""
    if layers * heads == 1:
        return head_maps(all_full(1, 1), CPU)
    flat = "P" + "".join("SA"[i % 2] for i in range(1, layers * heads))
    rows = [flat[i * heads : (i + 1) * heads] for i in range(layers)]
    satellites = [divmod(i, heads) for i, role in enumerate(flat) if role == "S"]
    return head_maps(assignment_of(*rows, leaders=dict.fromkeys(satellites, (0, 0))), CPU)


@dataclass
class Model:
    """One slot in plain Python: lists of (page id, prompt page), mean and spare page ids, and what
    the arenas hold of it."""

    blocks: list[int]
    lists: dict[tuple[int, int], list[tuple[int, int]]]
    means: dict[tuple[int, int], list[int]]
    spares: list[int]
    num_pages: int
    arenas: dict[str, torch.Tensor]


class Books:
    """A table beside its plain-Python model, with random operations on both."""

    def __init__(self, num_slots: int, num_blocks: int, layers: int, heads: int, seed: int) -> None:
        self.maps = maps_of(layers, heads)
        self.satellites = self.maps.satellite_heads.tolist()
        self.table = PageTable(
            num_slots, num_blocks, self.maps, GROUP, BUDGET, CPU, True, biased_share=0.5
        )
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
        num_pages = rng.randint(count, int(count / BUDGET))
        budgets = np.array([rng.randint(0, count) for _ in range(self.per_block)])
        budgets = budgets.reshape(self.layers, self.heads)
        num_means = np.array([rng.randint(0, budget // 2) for budget in budgets.flat])
        num_means = num_means.reshape(budgets.shape)
        slot = self.table.allocate(blocks, budgets, num_pages, num_means)
        assert slot not in self.models and slot != self.table.dense_slot
        pages = iter([b * self.per_block + i for b in blocks for i in range(self.per_block)])
        lists, means = {}, {}
        for layer in range(self.layers):
            for head in range(self.heads):
                count = budgets[layer, head] - num_means[layer, head]
                positions = sorted(rng.sample(range(num_pages), count))
                lists[layer, head] = [(next(pages), position) for position in positions]
                means[layer, head] = [next(pages) for _ in range(num_means[layer, head])]
                entries = head_entries(self.table, slot, layer, head)
                of_entries = self.table.tensors.positions[entries]
                assert bool((of_entries == -1).all())
                of_entries.copy_(torch.tensor(positions, dtype=torch.int32))
        model = Model(blocks, lists, means, list(pages), num_pages, {})
        self.models[slot] = model
        host_blocks = torch.randperm(1000)[:num_pages].int()
        self.table.set_host_blocks(slot, host_blocks)
        for name, places in self.places(slot).items():
            places.copy_(torch.randint(0, 2, places.shape))
            if name == "is_resident":
                places.copy_(torch.tensor(self.resident(model)).flatten())
            if name == "host_blocks":
                places.copy_(host_blocks)
            model.arenas[name] = places.clone()
        return slot

    def resident(self, model: Model) -> list[list[int]]:
        heads = [divmod(flat, self.heads) for flat in self.satellites]
        held = [{position for _, position in model.lists[head]} for head in heads]
        return [[int(p in pages) for p in range(model.num_pages)] for pages in held]

    def places(self, slot: int) -> dict[str, torch.Tensor]:
        """Views of what the arenas hold of a slot (kernels/tables.py says where)."""
        tensors, num_pages = self.table.tensors, self.models[slot].num_pages
        row, num_pivots = int(tensors.first_stripe[slot]), self.maps.pivot_heads.numel()
        pivot = slice(row * tensors.pivot_width, row * tensors.pivot_width + num_pivots * num_pages)
        first = row * tensors.satellite_width
        satellite = slice(first, first + len(self.satellites) * num_pages)
        host = slice(row * tensors.host_width, row * tensors.host_width + num_pages)
        bias = int(tensors.bias_start[slot, 0, 0])
        num_biased = sum(len(pages) for pages in self.models[slot].means.values())
        return {
            "token_bias": tensors.token_bias[bias : bias + num_biased],
            "page_lse": tensors.page_lse[pivot],
            "scores": tensors.scores[pivot],
            "is_reference": tensors.is_reference[pivot],
            "is_resident": tensors.is_resident[satellite],
            "host_blocks": tensors.host_blocks[host],
        }

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
        tensors = self.table.tensors
        list_start = head_entries(self.table, slot, *key).start
        spare_start = self.table.base(slot) + self.table.num_listed(slot)
        for i, j, position in zip(listed, spare, positions, strict=True):
            page, _ = held[i]
            held[i], model.spares[j] = (model.spares[j], position), page
            both = [list_start + i, spare_start + j]
            tensors.entries[both] = tensors.entries[both[::-1]]
            tensors.positions[list_start + i] = position
        resident = torch.tensor(self.resident(model)).flatten()
        self.places(slot)["is_resident"].copy_(resident)
        model.arenas["is_resident"] = resident.to(torch.int8)

    def check(self) -> None:
        table, tensors = self.table, self.table.tensors
        check_table(table, {slot: model.blocks for slot, model in self.models.items()})
        for slot, model in self.models.items():
            assert int(tensors.prompt_pages[slot]) == model.num_pages
            base, num_listed = table.base(slot), table.num_listed(slot)
            assert base == int(tensors.first_stripe[slot]) * self.per_block
            assert base == int(tensors.start[slot, 0, 0])
            listed = []
            for (layer, head), expected in model.lists.items():
                entries = head_entries(table, slot, layer, head)
                assert entries.start == int(tensors.start[slot, layer, head])
                assert len(expected) == int(tensors.count[slot, layer, head])
                pages, positions = tensors.entries[entries], tensors.positions[entries]
                assert list(zip(pages.tolist(), positions.tolist(), strict=True)) == expected
                means = tensors.entries[entries.stop :][: len(model.means[layer, head])].tolist()
                assert means == model.means[layer, head]
                assert len(means) == int(tensors.stand_in_pages[slot, layer, head])
                listed += pages.tolist() + means
            assert table.listed_pages(slot).tolist() == listed
            assert table.num_spares(slot) == len(model.spares)
            spares = tensors.entries[base + num_listed :][: len(model.spares)]
            assert spares.tolist() == model.spares
            for name, places in self.places(slot).items():
                assert torch.equal(places, model.arenas[name]), name
        for slot in set(range(self.num_slots + 1)) - self.models.keys():
            assert not tensors.count[slot].any() and int(tensors.prompt_pages[slot]) == 0
            assert not tensors.stand_in_pages[slot].any()


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
    assert bool((books.table.tensors.entries == -1).all())


def fragmented_books() -> tuple[Books, int, int]:
    """Rows: free 3, slot of 4, free 3, slot of 2, free 1: six free, no six together."""
    books = Books(num_slots=5, num_blocks=13, layers=2, heads=3, seed=3)
    slots = [books.allocate(n) for n in (3, 4, 3, 2)]
    books.release(slots[0])
    books.release(slots[2])
    return books, slots[1], slots[3]


def test_gaps_are_closed_when_only_their_sum_is_large_enough():
    books, first, second = fragmented_books()
    assert [books.table.closes_gaps(n) for n in (1, 3, 4, 6)] == [False, False, True, True]
    assert books.table.base(first) == 3 * 6
    books.allocate(6)
    assert (books.table.base(first), books.table.base(second)) == (0, 4 * 6)
    books.check()


@pytest.mark.parametrize("copied_bytes", [1, 24, 40])
def test_gaps_are_closed_part_by_part(monkeypatch, copied_bytes):
    monkeypatch.setattr("vllm_heterocache.worker.tables.page_table.COPIED_BYTES", copied_bytes)
    test_gaps_are_closed_when_only_their_sum_is_large_enough()


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
    table, tensors, model = books.table, books.table.tensors, books.models[first]
    assert model.spares and table.num_listed(first)
    base = table.base(first)
    before = tensors.entries[base : base + 4 * 6].clone()
    books.allocate(6)
    assert table.base(first) != base
    assert torch.equal(tensors.entries[table.base(first) :][: 4 * 6], before)
    assert (tensors.start[first] - table.base(first)).flatten()[0] == 0
    books.check()


def test_tensors_never_move_in_memory():
    books = Books(num_slots=3, num_blocks=12, layers=2, heads=2, seed=0)

    def addresses() -> list[int]:
        return [t.data_ptr() for t in books.table.tensors if torch.is_tensor(t)]

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


def test_mean_pages_in_a_table_that_has_none_are_an_error():
    table = PageTable(2, 4, maps_of(2, 2), GROUP, BUDGET, CPU)
    with pytest.raises(AssertionError):
        table.allocate([0, 1], np.full((2, 2), 2), 4, np.ones((2, 2), int))


def test_more_matched_pages_than_the_share_allows_are_an_error():
    table = PageTable(2, 4, maps_of(2, 2), GROUP, BUDGET, CPU, True, biased_share=0.25)
    table.allocate([0, 1], np.full((2, 2), 2), 4, np.array([[1, 1], [0, 0]]))
    with pytest.raises(AssertionError):
        table.allocate([2, 3], np.full((2, 2), 2), 4, np.array([[1, 1], [1, 0]]))


def test_budgets_above_the_pages_of_the_blocks_are_an_error():
    with pytest.raises(AssertionError):
        PageTable(1, 4, maps_of(1, 2), GROUP, BUDGET, CPU).allocate([0], np.array([[2, 1]]), 2)


# --- sizes ---


def budgets_and_lengths() -> Iterator[tuple[float, int]]:
    for gpu_budget in (0.07, 0.1 + 0.2, 0.25, 0.3, 1 / 3, 0.58, 0.7, 0.9999, 1.0):
        for num_pages in [*range(1, 300), 2000, 14000, 16384]:
            yield gpu_budget, num_pages


@pytest.mark.parametrize(("num_pivots", "num_satellites"), [(1, 1), (33, 206), (32, 224), (0, 0)])
def test_the_blocks_of_a_prompt_always_have_room_for_what_the_arenas_hold(
    num_pivots, num_satellites
):
    heads = torch.zeros(num_pivots), torch.zeros(num_satellites)
    maps = HeadMaps(heads[0], heads[1], *heads, heads[1])
    for gpu_budget, num_pages in budgets_and_lengths():
        width = ArenaWidths.of(maps, gpu_budget, 0.0)
        num_rows = compact_blocks(16 * num_pages, gpu_budget)
        assert num_rows * width.pivot >= num_pivots * num_pages, (gpu_budget, num_pages)
        assert num_rows * width.satellite >= num_satellites * num_pages
        assert num_rows * width.host >= num_pages
        assert width.host == math.ceil(1 / gpu_budget)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("gpu_budget", [0.25, 0.3, 1.0])
def test_bytes_per_block_are_what_the_tensors_take(group, gpu_budget):
    maps = head_maps(mixed_assignment(), CPU)
    sizes = []
    for num_blocks in (10, 17):
        tensors = PageTable(3, num_blocks, maps, group, gpu_budget, CPU).tensors
        sizes.append(sum(t.nbytes for t in tensors if torch.is_tensor(t)))
    assert sizes[1] - sizes[0] == 7 * PageTable.bytes_per_block(maps, group, gpu_budget)


def test_bytes_per_block_of_finders_are_those_of_their_keys():
    maps = head_maps(mixed_assignment(), CPU)
    keys = FinderKeys(np.array([4, 7, 8], np.int32), 8, torch.bfloat16)
    sizes = []
    for num_blocks in (10, 17):
        table = PageTable(3, num_blocks, maps, 1, 0.3, CPU, keys=keys)
        assert table.finders is not None
        sizes.append(table.finders.codes.nbytes + table.finders.grids.nbytes)
    without = PageTable.bytes_per_block(maps, 1, 0.3)
    taken = PageTable.bytes_per_block(maps, 1, 0.3, keys=keys) - without
    assert sizes[1] - sizes[0] == 7 * taken == 7 * 10 * 8 * (4 + 4)


def test_places_of_an_arena_are_in_slot_order_and_apart():
    """Rows of slots do not overlap, and so neither do their places."""
    books = Books(num_slots=4, num_blocks=20, layers=2, heads=3, seed=1)
    slots = [books.allocate(n) for n in (5, 3, 6, 4)]
    rows = [int(books.table.tensors.first_stripe[slot]) for slot in slots]
    assert rows == [0, 5, 8, 14]


def test_upload_gives_a_tensor_of_its_own():
    values = np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::-1]
    tensor = upload(values, CPU)
    assert tensor.tolist() == values.tolist() and tensor.dtype == torch.int32
    values[:] = 0
    assert tensor.tolist() == [[2, 1, 0], [5, 4, 3]]


@pytest.fixture
def two_slots() -> tuple[PageTable, int, dict[int, list[int]]]:
    """A table of 2 layers x 2 heads with two requests, each head with 2 of 5 pages, flat head 1
    with a mean page, too; 3 spare. Flat head 2 is a satellite."""
    table = PageTable(3, 9, maps_of(2, 2), GROUP, BUDGET, CPU, True, biased_share=0.2)
    budgets, means = np.array([[2, 3], [2, 2]]), np.array([[0, 1], [0, 0]])
    blocks = {table.allocate(b, budgets, 5, means): b for b in ([7, 2, 4], [0, 8, 3])}
    tensors = table.tensors
    for slot in blocks:
        for layer in range(2):
            for head in range(2):
                entries = head_entries(table, slot, layer, head)
                tensors.positions[entries] = torch.tensor([0, 4], dtype=torch.int32)
        first = int(tensors.first_stripe[slot]) * tensors.satellite_width
        tensors.is_resident[first : first + 5] = torch.tensor([1, 0, 0, 0, 1])
    check_table(table, blocks)
    return table, min(blocks), blocks


def first_spare(table: PageTable, slot: int) -> int:
    return table.base(slot) + table.num_listed(slot)


def name_a_page_twice(table: PageTable, slot: int) -> None:
    entries = table.tensors.entries
    entries[table.base(slot)] = entries[table.base(slot) + 5]


def name_a_foreign_page(table: PageTable, slot: int) -> None:
    table.tensors.entries[table.base(slot)] = 1 * 4


def lose_a_page(table: PageTable, slot: int) -> None:
    table.tensors.entries[first_spare(table, slot)] = -1


def exchange_pages_of_two_slots(table: PageTable, slot: int) -> None:
    both = [table.base(slot), table.base(slot + 1)]
    table.tensors.entries[both] = table.tensors.entries[both[::-1]]


def hold_a_prompt_page_twice(table: PageTable, slot: int) -> None:
    table.tensors.positions[head_entries(table, slot, 1, 1)] = 3


def hold_a_page_after_the_prompt(table: PageTable, slot: int) -> None:
    table.tensors.positions[head_entries(table, slot, 1, 1).start] = 5


def list_a_page_without_a_position(table: PageTable, slot: int) -> None:
    table.tensors.positions[head_entries(table, slot, 0, 1).start] = -1


def give_a_spare_page_a_position(table: PageTable, slot: int) -> None:
    table.tensors.positions[first_spare(table, slot)] = 1


def give_a_mean_page_a_position(table: PageTable, slot: int) -> None:
    table.tensors.positions[head_entries(table, slot, 0, 1).stop] = 3


def add_a_mean_page(table: PageTable, slot: int) -> None:
    table.tensors.stand_in_pages[slot, 1, 1] = 1


def lengthen_a_list(table: PageTable, slot: int) -> None:
    table.tensors.count[slot, 0, 0] += 1


def start_a_list_elsewhere(table: PageTable, slot: int) -> None:
    table.tensors.start[slot, 0, 1] -= 2  # at the list of the head before it


def take_the_biases_of_another_head(table: PageTable, slot: int) -> None:
    table.tensors.bias_start[slot, 0, 1] += 1


def fill_the_dense_slot(table: PageTable, slot: int) -> None:
    table.tensors.count[table.dense_slot, 1, 1] = 1


def note_an_absent_page_as_resident(table: PageTable, slot: int) -> None:
    first = int(table.tensors.first_stripe[slot]) * table.tensors.satellite_width
    table.tensors.is_resident[first + 2] = 1


def change_a_satellites_page_alone(table: PageTable, slot: int) -> None:
    table.tensors.positions[head_entries(table, slot, 1, 0).start] = 3


CORRUPTIONS = [
    name_a_page_twice,
    name_a_foreign_page,
    lose_a_page,
    exchange_pages_of_two_slots,
    hold_a_prompt_page_twice,
    hold_a_page_after_the_prompt,
    list_a_page_without_a_position,
    give_a_spare_page_a_position,
    give_a_mean_page_a_position,
    add_a_mean_page,
    lengthen_a_list,
    start_a_list_elsewhere,
    take_the_biases_of_another_head,
    fill_the_dense_slot,
    note_an_absent_page_as_resident,
    change_a_satellites_page_alone,
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda f: f.__name__)
def test_the_check_detects_corruption(corrupt, two_slots):
    table, slot, blocks = two_slots
    corrupt(table, slot)
    with pytest.raises(AssertionError):
        check_table(table, blocks)


def test_the_check_detects_books_that_differ(two_slots):
    table, slot, blocks = two_slots
    for wrong in ({}, {slot: blocks[slot]}, {**blocks, slot: [7, 2, 5]}, {**blocks, slot: [7, 2]}):
        with pytest.raises(AssertionError):
            check_table(table, wrong)


# --- slots that borrow the pages of dense blocks ---


DENSE_BLOCKS = [70, 3, 41, 5, 12]  # of the prompt, in its order; may lie anywhere in the pool


@pytest.fixture
def borrowed() -> tuple[PageTable, int, dict[int, list[int]]]:
    """A table of 2 layers x 2 heads: a slot that borrows 2 of 5 pages for each head, behind one
    that was released. No head is a satellite."""
    maps = head_maps(assignment_of("VA", "AA"), CPU)
    table = PageTable(3, 9, maps, GROUP, BUDGET, CPU)
    gap = table.borrow(4, np.full((2, 2), 3), 9)
    slot = table.borrow(3, np.full((2, 2), 2), 5)
    table.release(gap)
    fill_borrowed(table, slot, [1, 4])
    check_table(table, {slot: DENSE_BLOCKS})
    return table, slot, {slot: DENSE_BLOCKS}


def fill_borrowed(table: PageTable, slot: int, positions: list[int]) -> None:
    for flat in range(4):
        entries = head_entries(table, slot, *divmod(flat, 2))
        pages = [DENSE_BLOCKS[position] * 4 + flat for position in positions]
        table.tensors.entries[entries] = torch.tensor(pages, dtype=torch.int32)
        table.tensors.positions[entries] = torch.tensor(positions, dtype=torch.int32)


def test_lists_of_a_slot_that_borrows_may_change_and_move(borrowed):
    table, slot, blocks = borrowed
    assert table.base(slot) == 4 * 4 and table.num_listed(slot) == 8
    assert table.num_spares(slot) == 0, "what is behind its lists belongs to nobody"
    fill_borrowed(table, slot, [0, 2])
    check_table(table, blocks)
    assert table.has_room(6) and not table.has_room(7)
    other = table.borrow(6, np.full((2, 2), 6), 9)  # closes the gap
    assert table.base(slot) == 0 and not table.has_room(1)
    with pytest.raises(AssertionError):
        check_table(table, {**blocks, other: list(range(9))})  # not filled yet
    table.release(other)
    check_table(table, blocks)
    table.release(slot)
    assert bool((table.tensors.entries == -1).all()) and table.has_room(9)


def name_another_heads_page(table: PageTable, slot: int) -> None:
    table.tensors.entries[table.base(slot)] += 1


def name_another_position(table: PageTable, slot: int) -> None:
    table.tensors.positions[table.base(slot)] = 0


def leave_a_page_behind_the_lists(table: PageTable, slot: int) -> None:
    table.tensors.entries[table.base(slot) + 8] = DENSE_BLOCKS[0] * 4


def list_a_position_twice(table: PageTable, slot: int) -> None:
    entries = head_entries(table, slot, 0, 1)
    for tensor in (table.tensors.entries, table.tensors.positions):
        tensor[entries] = tensor[entries.start].clone()


BORROWED_CORRUPTIONS = [
    name_another_heads_page,
    name_another_position,
    leave_a_page_behind_the_lists,
    list_a_position_twice,
    lengthen_a_list,
    fill_the_dense_slot,
]


@pytest.mark.parametrize("corrupt", BORROWED_CORRUPTIONS, ids=lambda f: f.__name__)
def test_the_check_detects_corruption_of_a_slot_that_borrows(corrupt, borrowed):
    table, slot, blocks = borrowed
    corrupt(table, slot)
    with pytest.raises(AssertionError):
        check_table(table, blocks)


def test_the_check_detects_books_with_other_dense_blocks(borrowed):
    table, slot, _ = borrowed
    for wrong in ({}, {slot: DENSE_BLOCKS[::-1]}, {slot: [*DENSE_BLOCKS, 8]}):
        with pytest.raises(AssertionError):
            check_table(table, wrong)
