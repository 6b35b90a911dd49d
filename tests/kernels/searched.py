"""What programs of `find_pages` leave for `exchange_pages`, for the tests of both."""

from __future__ import annotations

import math

import torch

from vllm_heterocache.kernels import find_pages
from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, PageTables


def searched(
    tables: PageTables, finders: FinderTables, rows: DecodeRows, layer: int
) -> torch.Tensor:
    """`program_lse` of one layer by `page_lse`; NaN where `find_pages` writes nothing."""
    lse = tables.page_lse
    first, end = finders.first_of_layer[layer : layer + 2]
    num_rows, group = rows.seq_lens.shape[0], lse.shape[1]
    num_programs = find_pages.programs_per_finder(num_rows, end - first)
    size = find_pages.find_pages_workspace(num_rows, finders, group)
    found = torch.full((size,), torch.nan, device=lse.device)
    shape = num_rows, end - first, num_programs, group
    by_program = found[: math.prod(shape)].view(shape)
    for row, slot in enumerate(rows.row_to_table_slot.tolist()):
        if not rows.seq_lens[row] or not rows.is_due[row]:
            continue
        num_pages, stripe = int(tables.prompt_pages[slot]), int(tables.first_stripe[slot])
        for i, pivot in enumerate(finders.pivots[first:end].tolist()):
            place = stripe * tables.pivot_width + pivot * num_pages
            tiles = lse[place : place + num_pages].split(find_pages.TILE_PAGES)
            for program in range(num_programs):
                pages = torch.cat([lse[:0], *tiles[program::num_programs]])
                by_program[row, i, program] = pages.exp2().sum(0).log2()
    return found
