"""Batches for the tests of step selection and of its reference, poisoned all over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from common.tables import tables_for
from vllm_heterocache.kernels.one_bit_step_select_ref import page_bits_ref
from vllm_heterocache.kernels.tables import DecodeRows, PageTables, StepTables

PAGE = 16
UNSET = -987_654  # what integers hold that nobody may write
OUT_OF_RANGE = 10**6  # a block id far outside the pool: reading it is a fault
FREE_ROWS = 2  # rows of the arenas between two slots


class StepRow(NamedTuple):
    num_pages: int  # P of the prompt; 0 for a dense row
    counts: tuple[int, ...]  # pages that the heads read, in turn over all heads
    num_tokens: int = 1  # 0: the row has none in this step


# odd sizes, whole heads and empty lists, several tiles, rows that are dense and rows that pad
SMALL_ROWS = [
    StepRow(9, (4, 9, 0)),
    StepRow(0, (0,)),
    StepRow(111, (1, 30, 111, 110)),
    StepRow(33, (7,), num_tokens=0),
    StepRow(1, (0, 1)),
    StepRow(0, (0,), num_tokens=0),
    StepRow(67, (66, 5)),
]


@dataclass
class StepCase:
    query: torch.Tensor  # [num_rows, H * G, D]
    pages: torch.Tensor  # [num_pages, PAGE, 2 * D]
    tables: PageTables
    step: StepTables
    rows: DecodeRows
    shapes: list[StepRow]
    layer: int

    @property
    def scale(self) -> float:
        return self.query.shape[2] ** -0.5

    def fresh(self) -> PageTables:
        """The tables, with entries and positions that nobody has written."""
        unset = torch.full_like(self.tables.entries, UNSET)
        return self.tables._replace(entries=unset, positions=unset.clone())

    def page_ids(self, row: int, head: int) -> torch.Tensor:
        """[P] pool page of each prompt page of one head."""
        _, num_layers, num_kv_heads = self.tables.count.shape
        blocks = self.rows.block_table[row, : self.shapes[row].num_pages].long()
        return (blocks * num_layers + self.layer) * num_kv_heads + head


def with_bits(case: StepCase) -> StepCase:
    """The same with the bits of all keys."""
    _, num_layers, num_kv_heads = case.tables.count.shape
    size = case.pages.shape[0], case.pages.shape[2]
    bits = torch.zeros(size, dtype=torch.uint8, device=case.pages.device)
    step, per_block = case.step._replace(bits=bits), num_layers * num_kv_heads
    blocks = torch.arange(case.pages.shape[0] // per_block, device=case.pages.device)
    page_bits_ref(case.pages, blocks, per_block, step)
    return replace(case, step=step)


def make_step_case(
    num_layers: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    shapes: list[StepRow] = SMALL_ROWS,
    layer: int = 0,
    page_dtype: torch.dtype | None = None,
) -> StepCase:
    """Queries and keys are small multiples of 1/4, so that bounds are exact in fp32 whatever the
    order of additions, and many of them equal. Row i has slot i of a table with the slots in
    another order; summaries of pages that no row may read are NaN. Pages and summaries have the
    query's dtype, or `page_dtype`: every fp8 dtype holds these numbers.
    """
    device = generator.device

    def grid(*shape: int) -> torch.Tensor:
        values = torch.randint(-8, 9, shape, generator=generator, device=device) / 4
        return values.to(dtype)

    num_heads, num_rows = num_layers * num_kv_heads, len(shapes)
    widest = max(shape.num_pages for shape in shapes) + 2
    order = torch.randperm(
        sum(shape.num_pages for shape in shapes) + 5, generator=generator, device=device
    )
    num_blocks = order.shape[0]
    block_table = torch.full((num_rows, widest), OUT_OF_RANGE, dtype=torch.int32, device=device)
    is_read = torch.zeros(num_blocks, dtype=torch.bool, device=device)
    start = torch.full((num_rows, num_layers, num_kv_heads), UNSET, dtype=torch.int64)
    count = torch.zeros((num_rows, num_layers, num_kv_heads), dtype=torch.int32)
    first_stripe = torch.full((num_rows,), UNSET, dtype=torch.int64)
    row, taken = 1, 0
    for i in reversed(range(num_rows)):
        shape = shapes[i]
        blocks = order[taken : taken + shape.num_pages]
        taken += shape.num_pages
        block_table[i, : shape.num_pages] = blocks.int()
        is_read[blocks] = shape.num_tokens > 0
        of_heads = torch.tensor(shape.counts).repeat(num_heads)[:num_heads]
        count[i] = of_heads.view(num_layers, num_kv_heads)
        first_stripe[i] = row
        start[i] = (row * num_heads + of_heads.cumsum(0) - of_heads).view(count[i].shape)
        row += shape.num_pages + FREE_ROWS
    pages = grid(num_blocks, num_heads, PAGE, 2 * head_dim)
    keys = pages[..., :head_dim]
    summaries = torch.stack((keys.amin(dim=2), keys.amax(dim=2)), dim=2)
    pages[~is_read], summaries[~is_read] = torch.nan, torch.nan
    key_width = num_kv_heads

    def unset(size: int) -> torch.Tensor:
        return torch.full((size,), UNSET, dtype=torch.int32, device=device)

    num_tokens = [shape.num_tokens and shape.num_pages * PAGE + 1 for shape in shapes]
    tables = tables_for(
        tuple(count.shape),
        device,
        num_rows=row,
        poison=UNSET,
        start=start,
        count=count,
        prompt_pages=torch.tensor([shape.num_pages for shape in shapes], dtype=torch.int32),
        first_stripe=first_stripe,
    )
    return StepCase(
        grid(num_rows, num_kv_heads * group, head_dim),
        pages.view(-1, PAGE, 2 * head_dim).to(page_dtype or dtype),
        tables,
        StepTables(
            summaries.view(-1, 2, head_dim).to(page_dtype or dtype),
            unset(row * key_width),
            key_width,
        ),
        DecodeRows(
            torch.arange(num_rows, dtype=torch.int32, device=device),
            block_table,
            torch.tensor(num_tokens, dtype=torch.int32, device=device),
            unset(num_rows),
            unset(num_rows),
        ),
        shapes,
        layer,
    )
