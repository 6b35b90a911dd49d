"""Proof that a page table and its owner's books agree, for tests and debugging."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_heterocache.worker.tables.upload import exclusive_sum

if TYPE_CHECKING:
    from vllm_heterocache.worker.tables.page_table import Extent, PageTable


def check_table(table: PageTable, blocks_of_slot: dict[int, list[int]]) -> None:
    """Raise AssertionError unless every page of every slot stands in exactly one entry, or,
    where the slot borrows, every listed page is the dense one of its head and position.

    Args:
        blocks_of_slot: from the caller's own books, the compact blocks of each slot in use;
            of one that borrows, its dense blocks in the order of the prompt.
    """
    assert blocks_of_slot.keys() == table.extents.keys()
    assert sum(extent.num_stripes for extent in table.extents.values()) <= table.num_blocks
    for slot, blocks in blocks_of_slot.items():
        extent = table.extents[slot]
        entries = table.entry_range(extent)
        if extent.borrows:
            _check_borrowed(table, slot, extent, blocks)
        else:
            _check_owned(table, slot, extent, blocks)
        starts = entries.start + exclusive_sum(extent.budgets)
        assert np.array_equal(table.tensors.start[slot].cpu().numpy(), starts), slot
        assert np.array_equal(table.tensors.count[slot].cpu().numpy(), extent.count), slot
        stand_ins = table.tensors.stand_in_pages[slot].cpu().numpy()
        assert np.array_equal(stand_ins, extent.stand_in_pages), slot
        if table.tensors.idle_pages is not None:
            idle = table.tensors.idle_pages[slot].cpu().numpy()
            assert np.array_equal(idle, extent.idle_pages), slot
        if table.tensors.bias_start is not None:
            first = extent.first_stripe * table.tensors.bias_width
            first_biases = table.tensors.bias_start[slot].cpu().numpy()
            assert np.array_equal(first_biases, first + exclusive_sum(stand_ins)), slot
            assert stand_ins.sum() <= extent.num_stripes * table.tensors.bias_width, slot
        _check_positions(table, slot, extent)
    assert not table.tensors.count[table.dense_slot].any()
    assert not table.tensors.stand_in_pages[table.dense_slot].any()


def _check_owned(table: PageTable, slot: int, extent: Extent, blocks: list[int]) -> None:
    listed = table.tensors.entries[table.entry_range(extent)].cpu().numpy()
    within = np.arange(table.pages_per_block)
    owned = (np.sort(blocks)[:, None] * table.pages_per_block + within).ravel()
    assert np.array_equal(np.sort(listed), owned), f"slot {slot}: pages lost or doubled"


def _check_borrowed(table: PageTable, slot: int, extent: Extent, blocks: list[int]) -> None:
    entries = table.entry_range(extent)
    listed = table.tensors.entries[entries].cpu().numpy()
    positions = table.tensors.positions[entries].cpu().numpy()
    count = extent.num_listed
    heads = np.repeat(np.arange(extent.budgets.size), extent.budgets.ravel())
    dense = np.asarray(blocks)[positions[:count]] * table.pages_per_block + heads
    assert len(blocks) == extent.num_pages
    assert np.array_equal(listed[:count], dense), f"slot {slot}: not the prompt's own pages"
    assert (listed[count:] == -1).all(), f"slot {slot}: a page behind the lists"


def _check_positions(table: PageTable, slot: int, extent: Extent) -> None:
    positions = table.tensors.positions[table.entry_range(extent)].cpu().numpy()
    within = np.arange(extent.num_listed)
    within -= np.repeat(exclusive_sum(extent.budgets).ravel(), extent.budgets.ravel())
    holding = extent.count + extent.idle_pages  # pages of the prompt
    is_listed = within < np.repeat(holding.ravel(), extent.budgets.ravel())
    listed = positions[: within.size][is_listed]
    others = positions[: within.size][~is_listed], positions[within.size :]
    assert all((other == -1).all() for other in others), f"slot {slot}: a spare holds a page"
    assert ((listed >= 0) & (listed < extent.num_pages)).all(), slot
    heads = np.repeat(np.arange(extent.budgets.size), holding.ravel())
    held = np.zeros((extent.budgets.size, extent.num_pages), np.int8)
    np.add.at(held, (heads, listed), 1)
    assert held.max(initial=0) <= 1, f"slot {slot}: a head lists a page twice"
    satellites = table.maps.satellite_heads.cpu().numpy()
    first = extent.first_stripe * table.tensors.satellite_width
    size = satellites.size * extent.num_pages
    resident = table.tensors.is_resident[first : first + size].cpu().numpy()
    assert np.array_equal(resident, held[satellites].ravel()), f"slot {slot}: residents"
