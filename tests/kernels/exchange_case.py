"""Finders whose lists are to change, for the tests of `exchange_pages`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from finder_case import FINDERS, PAGE, PIVOTS, SIZES, UNSET, make_finder_case

from common.tables import tables_for
from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, drift_counters
from vllm_heterocache.kernels.values import Protected

if TYPE_CHECKING:
    from vllm_heterocache.kernels.tables import PageTables

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


class Worked(NamedTuple):
    """A prompt of one finder; its first and its last page are protected."""

    lse: list[float]  # of each page
    before: list[int]  # the list
    after: list[int]  # what an exchange makes of it
    is_due: bool = True


WORKED = [
    # of parts {0, 4}, {1, 5}, {2, 6} and {3, 7}: nothing but a protected page to go; a better one
    # there; a worse one there; again nothing to go
    Worked([0, 1, 5, 9, 9, 2, 6, 0], [7, 1, 0, 6], [7, 5, 0, 6]),
    # nothing is missing in part 1, though better pages are in other parts
    Worked([0, 1, 9, 9, 9, 2, 8, 0], [5, 0, 7, 1], [5, 0, 7, 1]),
    # equal pages: none comes for an equal one; the first of the best for the first of the worst
    Worked([0, 3, 1, 4, 0, 3, 1, 4, 0, 5, 7, 4, 0, 5, 7, 0], [6, 0, 3, 2, 5, 1, 15],
           [6, 0, 3, 10, 5, 9, 15]),
    # all parts exchange, and within themselves
    Worked([0, 1, 2, 3, 4, 8, 7, 6, 5, 4, 3, 2, 0], [0, 4, 1, 2, 3, 12], [0, 8, 5, 6, 7, 12]),
    Worked([0, 9, 0], [0, 2], [0, 2]),  # fewer pages than parts
    Worked([0], [0], [0]),
    Worked([0, 1, 5, 9, 9, 2, 6, 0], [7, 1, 0, 6], [7, 1, 0, 6], is_due=False),
]  # fmt: skip


def make_worked_case(generator: torch.Generator) -> ExchangeCase:
    """A row for each of `WORKED`, of one finder."""
    device = generator.device

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    sizes, counts = [len(one.lse) for one in WORKED], [len(one.before) for one in WORKED]
    num_rows, num_pages, num_listed = len(WORKED), sum(sizes), sum(counts)
    before = ints([page for one in WORKED for page in one.before])
    row_of_entry = torch.arange(num_rows, device=device).repeat_interleave(ints(counts))
    first = ints(sizes).cumsum(0) - ints(sizes)
    is_resident = torch.zeros(num_pages, dtype=torch.int8, device=device)
    is_resident[first[row_of_entry] + before] = 1
    tables = tables_for(
        (num_rows, 1, 1),
        device,
        num_rows=num_pages,
        widths=(1, 1, 1),
        poison=UNSET,
        entries=torch.randperm(num_listed, generator=generator, device=device).int(),
        positions=before,
        start=(ints(counts).cumsum(0) - ints(counts)).view(-1, 1, 1),
        count=ints(counts).view(-1, 1, 1),
        prompt_pages=ints(sizes),
        first_stripe=first,
        page_lse=torch.tensor([[lse] for one in WORKED for lse in one.lse], device=device).float(),
        is_resident=is_resident,
        host_blocks=torch.randperm(num_pages, generator=generator, device=device).int(),
    )
    keys = torch.zeros(0, 2, 64, device=device)
    finders = FinderTables(keys.short(), keys, 1, ints([0]), ints([0]), (0, 1))
    seq_lens = ints([PAGE * size + 1 for size in sizes])
    is_due = ints([one.is_due for one in WORKED])
    slots = torch.arange(num_rows, device=device)
    rows = DecodeRows(slots, ints([[UNSET]] * num_rows), seq_lens, ints([-1] * num_rows), is_due)
    pages = torch.randn(num_listed, PAGE, 2 * 64, generator=generator, device=device)
    host_pages = torch.randn(num_pages, PAGE, 2 * 64, generator=generator, device=device).cpu()
    if device.type == "cuda":
        host_pages = host_pages.pin_memory()
    counters = drift_counters(device)
    return ExchangeCase(pages, host_pages, tables, finders, rows, counters)


def worked_lists(case: ExchangeCase) -> list[list[int]]:
    """The list of each row."""
    sizes = [len(one.before) for one in WORKED]
    return [one.tolist() for one in case.tables.positions.split(sizes)]
