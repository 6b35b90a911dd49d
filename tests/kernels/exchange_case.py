"""Finders whose lists are to change, for the tests of `exchange_pages`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from finder_case import FINDERS, PAGE, PIVOTS, SIZES, UNSET, make_finder_case

from vllm_heterocache.kernels.tables import drift_counters
from vllm_heterocache.kernels.values import Protected

if TYPE_CHECKING:
    from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, PageTables

PROTECTED = Protected(1, 2)
COUNTS = [[4, 6, 9], [0, 0, 0], [20, 7, 101], [5, 33, 12], [1, 1, 1]]  # by row and finder
EXTRA = 3  # pages of the GPU pool that nobody's list names, behind each list


@dataclass
class ExchangeCase:
    pages: torch.Tensor  # [num_pages, PAGE, 2 * D]
    host_pages: torch.Tensor  # [host blocks * num_finders, PAGE, 2 * D]
    tables: PageTables
    finders: FinderTables
    rows: DecodeRows
    counters: torch.Tensor

    def fresh(self) -> ExchangeCase:
        """With what is written of its own."""
        tables = self.tables
        written = {
            name: getattr(tables, name).clone() for name in ("scores", "positions", "is_resident")
        }
        tables = tables._replace(**written)
        pages, counters = self.pages.clone(), self.counters.clone()
        return replace(self, pages=pages, tables=tables, counters=counters)


def make_exchange_case(
    group: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator
) -> ExchangeCase:
    """Lists of random pages, the protected ones among them. Log-sum-exps are quarters, so that the
    order of scores does not hang on their rounding; many pages are equally good."""
    device = generator.device
    found = make_finder_case(group, head_dim, dtype, generator)
    num_rows, num_finders = len(SIZES), len(FINDERS)
    old = found.tables
    layers, kv_heads = old.count.shape[1:]
    slots, first = found.rows.row_to_table_slot.tolist(), old.first_stripe.tolist()
    num_stripes = old.page_lse.shape[0] // old.pivot_width
    lists = num_stripes * 100

    def ints(size: int) -> torch.Tensor:
        return torch.full((size,), UNSET, dtype=torch.int32, device=device)

    entries, positions = ints(lists), ints(lists)
    start = torch.full((num_rows + 1, layers, kv_heads), UNSET, dtype=torch.int64, device=device)
    count = torch.zeros(num_rows + 1, layers, kv_heads, dtype=torch.int32, device=device)
    is_resident = torch.full((num_stripes * num_finders,), 1, dtype=torch.int8, device=device)
    host_blocks = ints(num_stripes)
    num_listed = sum(map(sum, COUNTS)) + EXTRA * num_rows * num_finders
    order = torch.randperm(num_listed, generator=generator, device=device).int()
    host_order = torch.randperm(sum(SIZES), generator=generator, device=device).int()
    lse = torch.full_like(old.page_lse, torch.nan)
    taken, taken_host, next_entry = 0, 0, 5
    for row, size in enumerate(SIZES):
        slot = slots[row]
        host_blocks[first[slot] : first[slot] + size] = host_order[taken_host : taken_host + size]
        taken_host += size
        for finder, flat in enumerate(FINDERS):
            number = min(COUNTS[row][finder], size)
            held = _held(size, number, generator)
            start.view(num_rows + 1, -1)[slot, flat] = next_entry
            count.view(num_rows + 1, -1)[slot, flat] = number
            listed = slice(next_entry, next_entry + number)
            entries[listed], positions[listed] = order[taken : taken + number], held.int()
            taken, next_entry = taken + number + EXTRA, next_entry + number + EXTRA
            begin = first[slot] * num_finders + finder * size
            is_resident[begin : begin + size] = 0
            is_resident[begin + held] = 1
            place = first[slot] * old.pivot_width + PIVOTS[finder] * size
            values = torch.randint(-30, 30, (size, group), generator=generator, device=device)
            lse[place : place + size] = values / 4
    shape = (PAGE, 2 * head_dim)
    pages = torch.randn(num_listed, *shape, generator=generator, device=device).to(dtype)
    host = torch.randn(sum(SIZES) * num_finders, *shape, generator=generator, device=device)
    host_pages = host.to(dtype).cpu()
    if device.type == "cuda":
        host_pages = host_pages.pin_memory()
    tables = old._replace(
        entries=entries, positions=positions, start=start, count=count, page_lse=lse,
        scores=torch.full((lse.shape[0],), torch.nan, device=device),
        is_resident=is_resident, host_blocks=host_blocks,
        satellite_width=num_finders, host_width=1,
    )  # fmt: skip
    counters = drift_counters(device)
    return ExchangeCase(pages, host_pages, tables, found.finders, found.rows, counters)


def _held(size: int, number: int, generator: torch.Generator) -> torch.Tensor:
    """[number] pages, the protected ones among them, in no order."""
    device = generator.device
    is_protected = torch.zeros(size, dtype=torch.bool, device=device)
    is_protected[: PROTECTED.sinks] = True
    is_protected[max(size - PROTECTED.recent, 0) :] = True
    rank = torch.rand(size, generator=generator, device=device) + is_protected
    held = rank.topk(number).indices
    return held[torch.randperm(number, generator=generator, device=device)]
