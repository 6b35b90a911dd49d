"""Decode batches for the kernel benchmarks, in the shape of Llama-3.1-8B.

32 query heads, 8 KV heads of 128, queries of bf16, pages of 16 tokens of bf16 or fp8 (e4m3).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from common.tables import tables_for
from common.timing import DEVICE
from vllm_heterocache.kernels.kv_scales import KVScales
from vllm_heterocache.kernels.paged_decode_ref import paged_decode_ref
from vllm_heterocache.kernels.tables import DecodeRows, PageTables

PAGE, H, G, D = 16, 8, 4, 128
TAIL_BLOCKS = 4
COLD_BYTES = 400e6  # what the calls of a graph read together, at least: several times the L2
NUM_LAYERS_MIN = 4
FEW_LAYERS, MANY_LAYERS = 16, 128
MIXES = {
    "full": [1.0] * 8,
    "2full": [0.1, 1.0, 0.1, 0.1, 0.1, 1.0, 0.1, 0.1],
    "1full": [0.1, 0.1, 0.1, 1.0, 0.1, 0.1, 0.1, 0.1],
}
DENSE = "dense"  # no lists: every page from the block table
CELLS = [
    f"{context}-{mix}"
    for context in ("4x224K", "16x32K", "1x224K", "1x128K", "1x32K", "8x32K", "1x1K", "64x1K")
    for mix in MIXES
] + ["1x1K-dense", "64x1K-dense"]


@dataclass
class Cell:
    """One decode batch: pool, lists and tables of `num_layers` layers."""

    num_rows: int
    num_tokens: int
    num_layers: int
    tail_blocks: int
    query: torch.Tensor
    pages: torch.Tensor
    tables: PageTables
    rows: DecodeRows
    is_pivot: torch.Tensor  # [num_layers, H] bool, the heads with the longest lists
    pivot_of_head: torch.Tensor  # [num_layers, H] int32, all of these lead; all rows are due
    last_queries: torch.Tensor  # no query is kept
    bytes_per_layer: int
    kv_scales: KVScales | None = field(default=None, kw_only=True)  # of fp8 pages, all 1

    def lists(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First entry and length of each list, [num_rows, H]."""
        slots = self.rows.row_to_table_slot.long()
        return self.tables.start[slots, layer], self.tables.count[slots, layer]

    def with_means(self) -> Cell:
        """The same pages, of which each head that does not list its whole prompt has one in 13 as
        mean pages: as many as at a budget of 5 %."""
        count, prompt = self.tables.count, self.tables.prompt_pages[:, None, None]
        means = torch.where(count < prompt, count // 13, 0).int()
        tables = self.tables._replace(count=count - means, stand_in_pages=means, has_stand_ins=True)
        return replace(self, tables=tables)

    def as_fp8(self) -> Cell:
        """The same with fp8 pages."""
        scales = KVScales(*[torch.ones(self.num_layers, H, device=DEVICE) for _ in range(3)])
        pages = self.pages.to(torch.float8_e4m3fn)
        num_bytes = self.bytes_per_layer // 2
        return replace(self, pages=pages, kv_scales=scales, bytes_per_layer=num_bytes)

    def with_queries(self, number: int) -> Cell:
        """The same for rows that verify drafts: so many queries each, the last one behind all
        tokens."""
        num_queries = self.num_rows * number
        query = torch.randn(num_queries, H * G, D, device=DEVICE, dtype=self.query.dtype)
        starts = torch.arange(self.num_rows + 1, device=DEVICE, dtype=torch.int32) * number
        places = torch.full((num_queries,), -1, device=DEVICE, dtype=torch.int32)
        rows = self.rows._replace(query_place=places, query_start=starts, max_queries=number)
        return replace(self, query=query, rows=rows)

    def reference(self, layer: int) -> Results:
        room = Results.allocate(self, torch.float32)
        paged_decode_ref(
            self.query.float(), self.pages, self.tables, self.rows, layer, D**-0.5, room.output,
            self.last_queries, self.pivot_of_head, room.head_lse, self.kv_scales,
        )  # fmt: skip
        return Results(room.output, self.tables.page_lse.clone(), room.head_lse)


def cold_layers(bytes_per_layer: int) -> int:
    """Layers that read half of COLD_BYTES together, of two numbers: each is compiled for anew."""
    is_few = bytes_per_layer * FEW_LAYERS >= COLD_BYTES / 2
    return FEW_LAYERS if is_few else MANY_LAYERS


class Results(NamedTuple):
    output: torch.Tensor
    page_lse: torch.Tensor
    head_lse: torch.Tensor

    @classmethod
    def allocate(cls, cell: Cell, dtype: torch.dtype) -> Results:
        """NaN everywhere; `page_lse` is the cell's."""
        head_lse = torch.full((cell.num_layers, cell.num_rows * H, G), torch.nan, device=DEVICE)
        output = torch.full_like(cell.query, torch.nan, dtype=dtype)
        return cls(output, cell.tables.page_lse.fill_(torch.nan), head_lse)


def random_pages(num_pages: int) -> torch.Tensor:
    pages = torch.empty(num_pages, PAGE, 2 * D, dtype=torch.bfloat16, device=DEVICE)
    for part in pages.split(1 << 18):
        part.normal_()
    return pages


def parse(name: str) -> tuple[int, int, str]:
    """Rows, tokens of each, and the mix: 2x1K-full, or 2x512-full."""
    context, mix = name.split("-")
    num_rows, tokens = context.split("x")
    unit = 1024 if tokens.endswith("K") else 1
    return int(num_rows), int(tokens.removesuffix("K")) * unit, mix


def make_cell(
    num_rows: int,
    num_tokens: int,
    mix: str,
    least_layers: int = NUM_LAYERS_MIN,
    num_layers: int | None = None,
) -> Cell:
    """`num_layers`, or `least_layers` and as many more as read COLD_BYTES together. `mix` is one of
    MIXES, DENSE, or a percentage of the prompt's pages that every head lists."""
    torch.manual_seed(0)
    tail_blocks = num_tokens // PAGE if mix == DENSE else TAIL_BLOCKS
    prompt_pages = num_tokens // PAGE - tail_blocks
    shares = shares_of(mix)
    counts = torch.tensor([max(min(1, prompt_pages), round(s * prompt_pages)) for s in shares])
    pages_per_layer = num_rows * (int(counts.sum()) + tail_blocks * H)
    bytes_per_layer = pages_per_layer * PAGE * 2 * D * 2
    cold = -(-int(COLD_BYTES) // bytes_per_layer)
    num_layers = num_layers or min(32, max(least_layers, cold))
    listed = num_rows * num_layers * int(counts.sum())
    per_block = num_layers * H
    num_blocks = -(-listed // per_block) + num_rows * tail_blocks
    pages = random_pages(num_blocks * per_block)
    blocks = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32)
    live, blocks = blocks[: num_rows * tail_blocks], blocks[num_rows * tail_blocks :]
    free = (blocks[:, None] * per_block + torch.arange(per_block, device=DEVICE)).flatten()
    entries = free[torch.randperm(free.numel(), device=DEVICE)].int()
    is_pivot = (counts == counts.max()).expand(num_layers, H)
    tables = make_tables(entries, counts, num_rows, num_layers, prompt_pages, int(is_pivot.sum()))
    pivot_of_head = is_pivot.int().flatten().cumsum(0).int().view(is_pivot.shape) - 1
    pivot_of_head = pivot_of_head.masked_fill(~is_pivot, -1).to(DEVICE)
    table = torch.full((num_rows, num_tokens // PAGE), 1 << 30, dtype=torch.int32, device=DEVICE)
    table[:, prompt_pages:] = live.view(num_rows, tail_blocks)
    seq_lens = torch.full((num_rows,), num_tokens, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(num_rows, device=DEVICE)
    query_place = torch.full_like(seq_lens, -1)
    query = torch.randn(num_rows, H * G, D, device=DEVICE, dtype=torch.bfloat16)
    return Cell(
        num_rows, num_tokens, num_layers, tail_blocks, query, pages, tables,
        DecodeRows(slots, table, seq_lens, query_place, torch.ones_like(seq_lens)),
        is_pivot, pivot_of_head,
        query.new_zeros(1, num_layers, H * G, D), bytes_per_layer,
    )  # fmt: skip


def shares_of(mix: str) -> list[float]:
    """Of the prompt's pages, what each head lists."""
    if mix.isdigit():
        return [int(mix) / 100] * H
    return [0.0] * H if mix == DENSE else MIXES[mix]


def make_tables(entries, counts, num_rows, num_layers, prompt_pages, num_pivots) -> PageTables:
    """Every row is a slot of its own, all alike; the slot behind them is free."""
    count = counts.int().expand(num_rows, num_layers, H)
    ends = count.flatten().long().cumsum(0).view(count.shape)
    count = torch.cat([count, torch.zeros(1, num_layers, H, dtype=torch.int32)])
    start = torch.cat([ends - count[:-1], torch.zeros(1, num_layers, H, dtype=torch.int64)])
    prompt = torch.full((num_rows + 1,), prompt_pages, dtype=torch.int32)
    prompt[-1] = 0
    places = max(1, num_rows * prompt_pages * num_pivots)
    return tables_for(
        (num_rows + 1, num_layers, H), DEVICE, widths=(num_pivots, 0, 0), entries=entries,
        start=start, count=count.contiguous(), prompt_pages=prompt,
        first_stripe=torch.arange(num_rows + 1) * prompt_pages,
        page_lse=torch.full((places, G), torch.nan),
    )  # fmt: skip
