"""Prompts whose quantised keys are searched, for the tests of `quantized_keys`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from common.tables import tables_for
from vllm_heterocache.kernels.kv_scales import KVScales
from vllm_heterocache.kernels.tables import DecodeRows, FinderTables, PageTables, first_finders

PAGE = 16
UNSET = -987_654  # what integers hold that nobody may write
UNSET_CODE = -9_876  # and codes
SIZES = [9, 0, 203, 33, 1]  # pages of the prompts, a row each; a dense row has none
DUE, TOKENS = [1, 1, 1, 0, 1], [1, 1, 1, 1, 0]
FINDERS = [1, 4, 5]  # flat heads of two layers of three
PIVOTS = [2, 0, 3]  # and their places among five pivots


@dataclass
class FinderCase:
    query: torch.Tensor  # [num_rows, H * G, D]
    pages: torch.Tensor  # [num_pages, PAGE, 2 * D]
    blocks: list[torch.Tensor]  # of each row's prompt
    tables: PageTables
    finders: FinderTables
    rows: DecodeRows
    kv_scales: KVScales | None

    def fresh(self) -> FinderCase:
        """With tables of its own to write to."""
        finders = self.finders
        finders = finders._replace(codes=finders.codes.clone(), grids=finders.grids.clone())
        tables = self.tables._replace(page_lse=self.tables.page_lse.clone())
        return replace(self, finders=finders, tables=tables)


def make_finder_case(
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    page_dtype: torch.dtype | None = None,
) -> FinderCase:
    """Rows in another order than their slots. What nobody may read is NaN or out of range."""
    device, page_dtype = generator.device, page_dtype or dtype
    layers, kv_heads = 2, 3
    num_heads, num_rows = layers * kv_heads, len(SIZES)
    order = torch.randperm(sum(SIZES) + 3, generator=generator, device=device)
    blocks, taken, stripe = [], 0, 1
    slots = torch.tensor([3, 1, 4, 0, 2], dtype=torch.int32)
    first = torch.zeros(num_rows + 1, dtype=torch.int64)
    prompt_pages = torch.zeros(num_rows + 1, dtype=torch.int32)
    for row, size in enumerate(SIZES):
        blocks.append(order[taken : taken + size].int())
        taken += size
        first[slots[row]], prompt_pages[slots[row]] = stripe, size
        stripe += size + 1
    pages = torch.full((len(order) * num_heads, PAGE, 2 * head_dim), torch.nan, device=device)
    used = torch.cat(blocks).long()
    shape = len(used), num_heads, PAGE, head_dim
    pages.view(len(order), num_heads, PAGE, -1)[used, ..., :head_dim] = torch.randn(
        shape, generator=generator, device=device
    )
    pages[used[0] * num_heads + FINDERS[0], :, 3] = 0.25  # a channel of equal keys
    query = torch.randn(num_rows, kv_heads * group, head_dim, generator=generator, device=device)
    query[[n == 0 for n in TOKENS]] = torch.nan
    width, pivot_width = len(FINDERS), 5

    def ints(values) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    tables = tables_for(
        (num_rows + 1, layers, kv_heads),
        device,
        num_rows=stripe,
        group=group,
        widths=(pivot_width, 0, 0),
        poison=UNSET,
        prompt_pages=prompt_pages,
        first_stripe=first,
    )
    kv_scales = None
    if page_dtype != dtype:
        factors = torch.rand(3, layers, kv_heads, generator=generator, device=device) + 0.5
        kv_scales = KVScales(*factors)
    finders = FinderTables(
        torch.full((stripe * width, 2, head_dim), UNSET_CODE, dtype=torch.int16, device=device),
        torch.full((stripe * width, 2, head_dim), torch.nan, device=device).to(dtype),
        width,
        ints(FINDERS),
        ints(PIVOTS),
        first_finders(FINDERS, layers, kv_heads),
    )
    rows = DecodeRows(
        slots.to(device),
        ints([[10**6] * 3] * num_rows),
        ints([tokens and PAGE * size + 1 for tokens, size in zip(TOKENS, SIZES, strict=True)]),
        ints([-1] * num_rows),
        ints(DUE),
    )
    return FinderCase(
        query.to(dtype), pages.to(page_dtype), blocks, tables, finders, rows, kv_scales
    )


def quantize(run, case: FinderCase) -> None:
    """All prompts of a case, by the kernel or its reference."""
    for row, blocks in enumerate(case.blocks):
        slot = int(case.rows.row_to_table_slot[row])
        run(case.pages, case.tables, case.finders, slot, blocks)


def places(case: FinderCase, row: int, finder: int) -> slice:
    """Of a finder's pages in one row's prompt."""
    slot = int(case.rows.row_to_table_slot[row])
    first = int(case.tables.first_stripe[slot]) * case.finders.width + finder * SIZES[row]
    return slice(first, first + SIZES[row])
