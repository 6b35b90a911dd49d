"""Worker side: which pages each (request, layer, KV head) reads after compaction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Extent:
    """The table rows of one slot: `num_blocks` rows of L * H entries from row `first_row`."""

    first_row: int
    num_blocks: int


class PageTable:
    """Page lists of all compacted requests, in tensors whose addresses never change.

    A request that was compacted into `n` blocks owns `n * L * H` pages, and exactly as many
    consecutive entries: the lists of its heads in (layer, head) order, then its spare pages.
    Every page of its blocks stands in exactly one entry, so entries are only ever permuted.

        entries    [num_blocks * L * H] int32, page ids
        positions  [num_blocks * L * H] int32, page of the prompt that the entry holds, -1 spare
        start      [num_slots + 1, L, H] int64, first entry of a head's list
        count      [num_slots + 1, L, H] int32, entries in it
        prompt_pages [num_slots + 1] int32, P = T // page_size; 0 for a free slot

    The last slot is `dense_slot`: its lists are empty for ever, and rows that are not compacted
    point at it.
    """

    def __init__(
        self,
        num_slots: int,
        num_blocks: int,
        num_layers: int,
        num_kv_heads: int,
        device: torch.device,
    ) -> None:
        self.pages_per_block = num_layers * num_kv_heads
        self.num_blocks = num_blocks
        self.dense_slot = num_slots
        capacity = num_blocks * self.pages_per_block
        shape = (num_slots + 1, num_layers, num_kv_heads)
        self.entries = torch.full((capacity,), -1, dtype=torch.int32, device=device)
        self.positions = torch.full((capacity,), -1, dtype=torch.int32, device=device)
        self.start = torch.zeros(shape, dtype=torch.int64, device=device)
        self.count = torch.zeros(shape, dtype=torch.int32, device=device)
        self.prompt_pages = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._extents: dict[int, Extent] = {}

    def allocate(self, block_ids: list[int], budgets: np.ndarray, num_pages: int) -> int:
        """Take a slot for a request and give its heads the pages of `block_ids`.

        Args:
            block_ids: the blocks to compact into.
            budgets: [L, H] int, pages of each head's list; the rest become spare.
            num_pages: full pages of the prompt.

        Returns:
            The slot. Its positions are unset (-1) until the caller writes them.
        """
        assert budgets.sum() <= len(block_ids) * self.pages_per_block
        slot = self._free_slots.pop()
        extent = Extent(self._find_rows(len(block_ids)), len(block_ids))
        self._extents[slot] = extent
        entries = self._entry_range(extent)
        within = torch.arange(self.pages_per_block, dtype=torch.int32)
        blocks = torch.tensor(block_ids, dtype=torch.int32)
        page_ids = (blocks[:, None] * self.pages_per_block + within).flatten()
        self.entries[entries] = page_ids.to(self.entries.device)
        self.positions[entries] = -1
        counts = torch.from_numpy(np.ascontiguousarray(budgets, dtype=np.int32))
        offsets = counts.flatten().long().cumsum(0) - counts.flatten()
        self.start[slot] = (entries.start + offsets).view(counts.shape)
        self.count[slot] = counts
        self.prompt_pages[slot] = num_pages
        return slot

    def release(self, slot: int) -> None:
        """Forget a slot; its pages belong to the scheduler again."""
        entries = self._entry_range(self._extents.pop(slot))
        self.entries[entries] = -1
        self.positions[entries] = -1
        self.count[slot] = 0
        self.prompt_pages[slot] = 0
        self._free_slots.append(slot)

    def base(self, slot: int) -> int:
        """First entry of a slot. It moves when gaps are closed, so whatever outlives a step
        holds entries relative to it."""
        return self._extents[slot].first_row * self.pages_per_block

    def head_entries(self, slot: int, layer: int, head: int) -> slice:
        """The entries of one head's list."""
        start = int(self.start[slot, layer, head])
        return slice(start, start + int(self.count[slot, layer, head]))

    def spare_entries(self, slot: int) -> slice:
        """The entries that name the slot's spare pages."""
        entries = self._entry_range(self._extents[slot])
        return slice(entries.start + int(self.count[slot].sum()), entries.stop)

    def flip(
        self, slot: int, listed: torch.Tensor, spare: torch.Tensor, new_positions: torch.Tensor
    ) -> None:
        """Put filled spare pages into lists; the pages they replace become spare.

        Args:
            listed: [n] int64 entries of the lists to change, relative to `base(slot)`.
            spare: [n] int64 entries of the spare pages that were filled, likewise.
            new_positions: [n] integer prompt pages that the spare pages now hold.
        """
        listed, spare = listed + self.base(slot), spare + self.base(slot)
        replaced = self.entries[listed]
        self.entries[listed] = self.entries[spare]
        self.entries[spare] = replaced
        self.positions[listed] = new_positions.to(self.positions.dtype)

    def check_integrity(self, blocks_of_slot: dict[int, list[int]]) -> None:
        """Raise AssertionError unless every page of every slot stands in exactly one entry.

        Args:
            blocks_of_slot: the compact blocks of each slot in use, from the caller's own books.
        """
        assert blocks_of_slot.keys() == self._extents.keys()
        used_rows = sum(extent.num_blocks for extent in self._extents.values())
        assert used_rows <= self.num_blocks
        for slot, blocks in blocks_of_slot.items():
            entries = self._entry_range(self._extents[slot])
            listed = self.entries[entries].sort().values.cpu().numpy()
            within = np.arange(self.pages_per_block)
            owned = (np.sort(blocks)[:, None] * self.pages_per_block + within).ravel()
            assert np.array_equal(listed, owned), f"slot {slot}: pages lost or named twice"
            counts = self.count[slot].flatten().long()
            starts = entries.start + counts.cumsum(0) - counts
            assert torch.equal(self.start[slot].flatten(), starts), f"slot {slot}: lists misplaced"
            self._check_positions(slot)
        assert not self.count[self.dense_slot].any()

    def _check_positions(self, slot: int) -> None:
        num_pages = int(self.prompt_pages[slot])
        _, num_layers, num_kv_heads = self.count.shape
        for layer in range(num_layers):
            for head in range(num_kv_heads):
                held = self.positions[self.head_entries(slot, layer, head)]
                assert bool(((held >= 0) & (held < num_pages)).all()), (slot, layer, head)
                assert held.unique().numel() == held.numel(), (slot, layer, head)
        assert bool((self.positions[self.spare_entries(slot)] == -1).all())

    def _entry_range(self, extent: Extent) -> slice:
        first = extent.first_row * self.pages_per_block
        return slice(first, first + extent.num_blocks * self.pages_per_block)

    def _find_rows(self, num_rows: int) -> int:
        """First fit; where only the sum of the gaps is large enough, close the gaps first."""
        end = 0
        for extent in sorted(self._extents.values(), key=lambda e: e.first_row):
            if extent.first_row - end >= num_rows:
                return end
            end = extent.first_row + extent.num_blocks
        if self.num_blocks - end >= num_rows:
            return end
        end = self._close_gaps()
        assert self.num_blocks - end >= num_rows, "more compact blocks than the pool holds"
        return end

    def _close_gaps(self) -> int:
        """Move all extents to the front, in order; return the first free row."""
        end = 0
        for slot, extent in sorted(self._extents.items(), key=lambda item: item[1].first_row):
            moved = Extent(end, extent.num_blocks)
            if moved != extent:
                source, target = self._entry_range(extent), self._entry_range(moved)
                self.entries[target] = self.entries[source].clone()
                self.positions[target] = self.positions[source].clone()
                self.start[slot] += target.start - source.start
                self._extents[slot] = moved
            end += extent.num_blocks
        return end
