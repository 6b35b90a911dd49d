"""Worker side: which pages each (request, layer, KV head) reads after compaction."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_heterocache.kernels.tables import HeadMaps, PageTables
from vllm_heterocache.kernels.values import PAGE_SIZE
from vllm_heterocache.worker.tables.upload import exclusive_sum, upload

if TYPE_CHECKING:
    from vllm_heterocache.worker.tables.finder_keys import FinderKeys

COPIED_BYTES = 16 << 20  # of an arena that moves at a time


@dataclass(frozen=True)
class Extent:
    """The arenas' stripes of one slot, and how its pages are shared out."""

    first_stripe: int
    num_stripes: int  # blocks the request was compacted into, or would have been
    num_pages: int  # P, full pages of the prompt
    budgets: np.ndarray  # [L, H] int32, pages of each head: its list, then its stand-in pages
    stand_in_pages: np.ndarray  # [L, H] int32
    idle_pages: np.ndarray  # [L, H] int32, pages of each head that its list leaves out for now
    borrows: bool  # whether its lists name pages of dense blocks, none of its own

    @functools.cached_property
    def num_listed(self) -> int:
        """Entries of all lists, and of their stand-in and idle pages."""
        return int(self.budgets.sum())

    @functools.cached_property
    def num_read(self) -> int:
        """Entries that a step reads: all lists and their stand-in pages."""
        return self.num_listed - int(self.idle_pages.sum())

    @property
    def count(self) -> np.ndarray:
        """[L, H] pages of each head's list."""
        return self.budgets - self.stand_in_pages - self.idle_pages


@dataclass(frozen=True)
class ArenaWidths:
    """Places that a stripe of an arena offers; n stripes hold a prompt of n / gpu_budget pages."""

    pivot: int
    satellite: int
    host: int
    bias: int  # pages whose tokens have biases
    finder: int

    @classmethod
    def of(
        cls, maps: HeadMaps, gpu_budget: float, biased_share: float, num_finders: int = 0
    ) -> ArenaWidths:
        def width(pages_per_prompt_page: int) -> int:
            return math.ceil(pages_per_prompt_page / gpu_budget)

        return cls(
            width(maps.pivot_heads.numel()),
            width(maps.satellite_heads.numel()),
            width(1),
            math.ceil(biased_share * maps.pivot_of_head.numel()),
            width(num_finders),
        )


class PageTable:
    """Page lists of all compacted requests, in tensors whose addresses never change.

    `tensors` is what the kernels read (kernels/tables.py). A request that was compacted into `n`
    blocks owns `n * L * H` pages, and exactly as many consecutive entries: the lists of its heads
    in (layer, head) order, each followed by the head's stand-in pages, then its spare pages. Every
    page of its blocks stands in exactly one entry, so entries are only ever permuted.

    Where steps read a part of what heads keep, the rest of a head's pages are idle: they lie behind
    its list, in place of stand-in pages, and a step may put others there.

    A request whose prompt stays in its dense blocks borrows: it takes as many entries, its lists
    name pages of those blocks, and there are no spare ones.

    The last slot is `dense_slot`: its lists are empty for ever, and rows that are not compacted
    point at it.
    """

    def __init__(
        self,
        num_slots: int,
        num_blocks: int,
        maps: HeadMaps,
        group: int,
        gpu_budget: float,
        device: torch.device,
        has_stand_ins: bool = False,
        biased_share: float = 0.0,
        has_idle_pages: bool = False,
        keys: FinderKeys | None = None,
    ) -> None:
        """
        Args:
            group: G, query heads a KV head.
            has_stand_ins: whether requests may have stand-in pages.
            biased_share: most of a request's pages whose tokens have biases, [0, 1]; 0:
                its stand-in pages hold means.
            has_idle_pages: whether steps may read a part of what heads keep.
            keys: of finders; None: no head is one.
        """
        num_layers, num_kv_heads = maps.pivot_of_head.shape
        self.pages_per_block = num_layers * num_kv_heads
        self.num_blocks = num_blocks
        self.dense_slot = num_slots
        self.maps, self._device = maps, device
        heads = (num_slots + 1, num_layers, num_kv_heads)
        width = ArenaWidths.of(maps, gpu_budget, biased_share, keys.num_finders if keys else 0)

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tensors = PageTables(
            entries=zeros(num_blocks * self.pages_per_block, dtype=torch.int32) - 1,
            positions=zeros(num_blocks * self.pages_per_block, dtype=torch.int32) - 1,
            start=zeros(*heads, dtype=torch.int64),
            count=zeros(*heads, dtype=torch.int32),
            stand_in_pages=zeros(*heads, dtype=torch.int32),
            prompt_pages=zeros(num_slots + 1, dtype=torch.int32),
            first_stripe=zeros(num_slots + 1, dtype=torch.int64),
            page_lse=zeros(num_blocks * width.pivot, group, dtype=torch.float32),
            scores=zeros(num_blocks * width.pivot, dtype=torch.float32),
            is_reference=zeros(num_blocks * width.pivot, dtype=torch.int8),
            is_resident=zeros(num_blocks * width.satellite, dtype=torch.int8),
            host_blocks=zeros(num_blocks * width.host, dtype=torch.int32),
            pivot_width=width.pivot,
            satellite_width=width.satellite,
            host_width=width.host,
            has_stand_ins=has_stand_ins,
            bias_start=zeros(*heads, dtype=torch.int64) if biased_share else None,
            token_bias=(
                zeros(num_blocks * width.bias, PAGE_SIZE, dtype=torch.float32)
                if biased_share
                else None
            ),
            bias_width=width.bias,
            idle_pages=zeros(*heads, dtype=torch.int32) if has_idle_pages else None,
        )
        self.finders = None if keys is None else keys.tables(maps, num_blocks, width.finder)
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self.extents: dict[int, Extent] = {}

    @staticmethod
    def bytes_per_block(
        maps: HeadMaps,
        group: int,
        gpu_budget: float,
        biased_share: float = 0.0,
        keys: FinderKeys | None = None,
    ) -> int:
        """Memory that the tables take for each block of the KV pool."""
        width = ArenaWidths.of(maps, gpu_budget, biased_share, keys.num_finders if keys else 0)
        entry, page_lse, score, flag, host_block = 8, 4 * group, 4, 1, 4
        return (
            maps.pivot_of_head.numel() * entry
            + width.pivot * (page_lse + score + flag)
            + width.satellite * flag
            + width.host * host_block
            + width.bias * PAGE_SIZE * 4
            + (width.finder * keys.bytes_per_page if keys else 0)
        )

    def allocate(
        self,
        block_ids: list[int],
        budgets: np.ndarray,
        num_pages: int,
        stand_in_pages: np.ndarray | None = None,
    ) -> int:
        """Take a slot for a request and give its heads the pages of `block_ids`.

        Args:
            block_ids: the blocks to compact into.
            budgets: [L, H] int, pages of each head; the rest become spare.
            num_pages: full pages of the prompt.
            stand_in_pages: [L, H] int, how many of each head's pages are such; None: none.

        Returns:
            The slot. Its positions are unset (-1) until the caller writes them.
        """
        slot = self._claim(len(block_ids), budgets, num_pages, stand_in_pages, borrows=False)
        within = torch.arange(self.pages_per_block, dtype=torch.int32, device=self._device)
        blocks = upload(np.asarray(block_ids, np.int32), self._device)
        pages = (blocks[:, None] * self.pages_per_block + within).flatten()
        self.tensors.entries[self.entry_range(self.extents[slot])] = pages
        return slot

    def borrow(self, num_stripes: int, budgets: np.ndarray, num_pages: int) -> int:
        """Take a slot for a request whose lists are to name pages of its dense blocks.

        Args:
            num_stripes: stripes for as many pages as so many blocks have; see `has_room`.
            budgets: [L, H] int, pages of each head's list.
            num_pages: full pages of the prompt.

        Returns:
            The slot. Its entries and positions are unset (-1) until the caller writes them.
        """
        return self._claim(num_stripes, budgets, num_pages, None, borrows=True)

    def set_idle(self, slot: int, idle_pages: np.ndarray) -> None:
        """Shorten the lists of a slot to what a step reads of them.

        Args:
            idle_pages: [L, H] int, how many of each head's pages are left out.
        """
        tensors = self.tensors
        assert tensors.idle_pages is not None and not self.extents[slot].stand_in_pages.any()
        extent = replace(self.extents[slot], idle_pages=idle_pages.astype(np.int32))
        assert (extent.count >= 0).all()
        self.extents[slot] = extent
        tensors.count[slot].copy_(upload(extent.count, self._device))
        tensors.idle_pages[slot].copy_(upload(extent.idle_pages, self._device))

    def has_room(self, num_stripes: int) -> bool:
        """Whether a request of `num_stripes` stripes fits.

        Requests that own blocks always fit. Borrowing requests can share blocks, so together they
        may need more stripes than the pool has blocks.
        """
        taken = sum(extent.num_stripes for extent in self.extents.values())
        return taken + num_stripes <= self.num_blocks

    def _claim(
        self,
        num_stripes: int,
        budgets: np.ndarray,
        num_pages: int,
        stand_in_pages: np.ndarray | None,
        borrows: bool,
    ) -> int:
        assert budgets.sum() <= num_stripes * self.pages_per_block
        if stand_in_pages is None:
            stand_in_pages = np.zeros_like(budgets)
        assert self.tensors.has_stand_ins or not stand_in_pages.any()
        slot = self._free_slots.pop()
        stripe = self._find_stripes(num_stripes)
        extent = Extent(
            stripe,
            num_stripes,
            num_pages,
            budgets.astype(np.int32),
            stand_in_pages.astype(np.int32),
            np.zeros_like(budgets, np.int32),
            borrows,
        )
        self.extents[slot] = extent
        tensors, entries = self.tensors, self.entry_range(extent)
        tensors.positions[entries] = -1
        starts = entries.start + exclusive_sum(extent.budgets)
        tensors.start[slot].copy_(upload(starts, self._device))
        tensors.count[slot].copy_(upload(extent.count, self._device))
        tensors.stand_in_pages[slot].copy_(upload(extent.stand_in_pages, self._device))
        if tensors.bias_start is not None:
            assert extent.stand_in_pages.sum() <= num_stripes * tensors.bias_width
            first_biases = stripe * tensors.bias_width + exclusive_sum(extent.stand_in_pages)
            tensors.bias_start[slot].copy_(upload(first_biases, self._device))
        tensors.prompt_pages[slot : slot + 1].fill_(num_pages)
        tensors.first_stripe[slot : slot + 1].fill_(stripe)
        return slot

    def release(self, slot: int) -> None:
        """Forget a slot; its pages belong to the scheduler again."""
        entries = self.entry_range(self.extents.pop(slot))
        self.tensors.entries[entries] = -1
        self.tensors.positions[entries] = -1
        self.tensors.count[slot].zero_()
        self.tensors.stand_in_pages[slot].zero_()
        if self.tensors.idle_pages is not None:
            self.tensors.idle_pages[slot].zero_()
        self.tensors.prompt_pages[slot : slot + 1].zero_()
        self._free_slots.append(slot)

    def set_host_blocks(self, slot: int, host_blocks: torch.Tensor) -> None:
        """Note which host block holds each prompt page of a slot.

        Args:
            host_blocks: [P] int32, on the table's device.
        """
        first = self.extents[slot].first_stripe * self.tensors.host_width
        self.tensors.host_blocks[first : first + host_blocks.numel()] = host_blocks

    def base(self, slot: int) -> int:
        """First entry of a slot. It moves when gaps are closed, so whatever outlives a step
        holds entries relative to it."""
        return self.extents[slot].first_stripe * self.pages_per_block

    def num_listed(self, slot: int) -> int:
        """Entries of all lists of a slot, and of their stand-in and idle pages; spare entries lie
        behind."""
        return self.extents[slot].num_listed

    def num_read(self, slot: int) -> int:
        """Entries of a slot that a step reads."""
        return self.extents[slot].num_read

    def num_spares(self, slot: int) -> int:
        """Spare pages of a slot."""
        extent = self.extents[slot]
        if extent.borrows:
            return 0
        return extent.num_stripes * self.pages_per_block - self.num_listed(slot)

    def listed_pages(self, slot: int) -> torch.Tensor:
        """View of the page ids of all lists of a slot, and of their stand-in and idle pages."""
        return self.tensors.entries[self.base(slot) :][: self.num_listed(slot)]

    def entry_range(self, extent: Extent) -> slice:
        """All entries of a slot, spare ones included."""
        first = extent.first_stripe * self.pages_per_block
        return slice(first, first + extent.num_stripes * self.pages_per_block)

    def closes_gaps(self, num_stripes: int) -> bool:
        """Whether a request of `num_stripes` stripes fits only where other slots' rows move."""
        return self._first_fit(num_stripes) is None

    def _find_stripes(self, num_stripes: int) -> int:
        """First fit; where only the sum of the gaps is large enough, close the gaps first."""
        first = self._first_fit(num_stripes)
        if first is None:
            first = self._close_gaps()
            assert self.num_blocks - first >= num_stripes, "more compact blocks than the pool holds"
        return first

    def _first_fit(self, num_stripes: int) -> int | None:
        end = 0
        for extent in sorted(self.extents.values(), key=lambda e: e.first_stripe):
            if extent.first_stripe - end >= num_stripes:
                return end
            end = extent.first_stripe + extent.num_stripes
        return end if self.num_blocks - end >= num_stripes else None

    def _close_gaps(self) -> int:
        """Move all extents to the front, in order; return the first free stripe."""
        end = 0
        for slot, extent in sorted(self.extents.items(), key=lambda item: item[1].first_stripe):
            if extent.first_stripe != end:
                self._move(slot, extent, end)
            end += extent.num_stripes
        for arena in (self.tensors.entries, self.tensors.positions):
            arena[end * self.pages_per_block :] = -1
        return end

    def _move(self, slot: int, extent: Extent, stripe: int) -> None:
        t = self.tensors
        arenas = [
            (t.entries, self.pages_per_block),
            (t.positions, self.pages_per_block),
            (t.page_lse, t.pivot_width),
            (t.scores, t.pivot_width),
            (t.is_reference, t.pivot_width),
            (t.is_resident, t.satellite_width),
            (t.host_blocks, t.host_width),
        ]
        if t.token_bias is not None:
            assert t.bias_start is not None
            arenas.append((t.token_bias, t.bias_width))
            t.bias_start[slot] += (stripe - extent.first_stripe) * t.bias_width
        if self.finders is not None:
            arenas += [
                (one, self.finders.width) for one in (self.finders.codes, self.finders.grids)
            ]
        for arena, width in arenas:
            _move_forward(
                arena, extent.first_stripe * width, stripe * width, extent.num_stripes * width
            )
        t.start[slot] += (stripe - extent.first_stripe) * self.pages_per_block
        t.first_stripe[slot : slot + 1].fill_(stripe)
        self.extents[slot] = replace(extent, first_stripe=stripe)


def _move_forward(arena: torch.Tensor, source: int, target: int, size: int) -> None:
    """Move `size` places of an arena to an earlier place. The places may overlap, so that parts go
    by way of a copy, which is small beside what a long request owns."""
    part = max(1, COPIED_BYTES // (arena.stride(0) * arena.itemsize))
    for first in range(0, size, part):
        number = min(part, size - first)
        copy = arena[source + first :][:number].clone()
        arena[target + first :][:number] = copy
