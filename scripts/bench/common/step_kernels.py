"""The kernels of policy `quest`, beside decode attention in the same process.

`step_select` chooses the pages of one layer, in two launches that are also timed alone;
`paged_decode` then reads them, and stands there over the whole prompt too, which is what choosing
has to beat. `page_summaries` is timed over whole prompts. The block table is as wide as an
engine's for 256K tokens. Keys and queries are multiples of 1/4, so that lists must be the
reference's entry by entry. Other ways of choosing among all pages are kinds of `StepCell`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from common import cells
from common.cells import PAGE, D, G, H
from common.paged_decode import time_ours
from common.timing import DEVICE, expect, time_calls
from vllm_heterocache.kernels import step_select as module
from vllm_heterocache.kernels.page_summaries import page_summaries
from vllm_heterocache.kernels.page_summaries_ref import page_summaries_ref
from vllm_heterocache.kernels.step_select_ref import step_select_ref
from vllm_heterocache.kernels.tables import DecodeRows, PageTables, StepTables
from vllm_heterocache.kernels.values import Protected

CELLS = [f"{context}-{share}" for context in ("1x32K", "1x224K", "8x32K") for share in (10, 25)]
TABLE_WIDTH = 16384
PROTECTED = Protected(1, 3)
TINY_TABLE_WIDTH, TINY_PROGRAMS = 256, 16


def make_tiny() -> None:
    """Sizes for a trial; each program costs time in the interpreter."""
    global TABLE_WIDTH
    TABLE_WIDTH = TINY_TABLE_WIDTH
    if DEVICE.type == "cpu":
        module.MAX_PROGRAMS = TINY_PROGRAMS


@dataclasses.dataclass
class StepCell(cells.Cell):
    """A decode batch whose prompts lie in the blocks of its block table."""

    step: StepTables
    prompt_blocks: torch.Tensor  # [num_rows * P] int32

    @property
    def prompt_pages(self) -> int:
        return self.num_tokens // PAGE - self.tail_blocks

    def whole(self) -> StepCell:
        """The same batch without lists: decode attention reads every page."""
        nobody = torch.full_like(self.rows.row_to_table_slot, self.num_rows)
        num_pages = self.num_rows * self.num_tokens // PAGE * H
        return dataclasses.replace(
            self,
            rows=self.rows._replace(row_to_table_slot=nobody),
            bytes_per_layer=num_pages * PAGE * 2 * D * 2,
        )

    @property
    def read_bytes(self) -> dict[str, int]:
        """What the choice reads in a layer, by the name of its column."""
        return {"summary_bytes": self.num_rows * self.prompt_pages * H * 2 * D * 2}

    def select(self, layer: int) -> None:
        module.step_select(self.query, self.tables, self.step, self.rows, layer, PROTECTED)

    def select_ref(self, tables: PageTables, layer: int) -> None:
        step_select_ref(self.query, tables, self.step, self.rows, layer, PROTECTED)

    def write_keys(self, layer: int) -> None:
        module.write_keys(self.query, self.tables, self.step, self.rows, layer)

    def choose(self, layer: int) -> None:
        module.choose_pages(self.tables, self.step, self.rows, layer, PROTECTED)

    def summarize(self, _: int = 0) -> None:
        page_summaries(self.pages, self.prompt_blocks, self.num_layers * H, self.step.summaries)


def on_grid(values: torch.Tensor) -> torch.Tensor:
    """Multiples of 1/4, in place: their products add up to the same in every order."""
    for part in values.split(1 << 18):
        part.mul_(4).round_().div_(4)
    return values


def make_cell(
    num_rows: int, num_tokens: int, share: float, num_layers: int | None = None
) -> StepCell:
    torch.manual_seed(0)
    tail_blocks = cells.TAIL_BLOCKS
    num_pages = num_tokens // PAGE - tail_blocks
    counts = torch.full((H,), max(1, round(share * num_pages)))
    summary_bytes = num_rows * num_pages * H * 2 * D * 2
    cold = -(-int(cells.COLD_BYTES) // summary_bytes)
    num_layers = num_layers or min(32, max(cells.NUM_LAYERS_MIN, cold))
    num_blocks = num_rows * (num_pages + tail_blocks)
    pages = on_grid(cells.random_pages(num_blocks * num_layers * H))
    blocks = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32).view(num_rows, -1)
    table = torch.full((num_rows, max(TABLE_WIDTH, blocks.shape[1])), 1 << 30, dtype=torch.int32)
    table = table.to(DEVICE)
    table[:, : blocks.shape[1]] = blocks
    num_listed = num_rows * num_layers * int(counts.sum())
    entries = torch.full((num_listed,), -1, dtype=torch.int32, device=DEVICE)
    tables = cells.make_tables(entries, counts, num_rows, num_layers, num_pages, 0)
    seq_lens = torch.full((num_rows,), num_tokens, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    query = torch.randn(num_rows, H * G, D, device=DEVICE, dtype=torch.bfloat16)
    none = torch.zeros_like(seq_lens)
    nobody = torch.full((num_layers, H), -1, dtype=torch.int32, device=DEVICE)
    keys = torch.full((num_rows * num_pages * H,), -1, dtype=torch.int32, device=DEVICE)
    read = num_rows * (int(counts.sum()) + tail_blocks * H) * PAGE * 2 * D * 2
    return StepCell(
        num_rows, num_tokens, num_layers, tail_blocks, on_grid(query), pages,
        tables._replace(positions=entries.clone()),
        DecodeRows(slots, table, seq_lens, none - 1, none),
        nobody >= 0, nobody,
        query.new_zeros(1, num_layers, H * G, D), read,
        StepTables(pages.new_full((pages.shape[0], 2, D), torch.nan), keys, H),
        blocks[:, :num_pages].flatten().contiguous(),
    )  # fmt: skip


def check_summaries(cell: StepCell) -> None:
    cell.step.summaries.fill_(torch.nan)
    cell.summarize()
    exact = torch.full_like(cell.step.summaries, torch.nan)
    page_summaries_ref(cell.pages, cell.prompt_blocks, cell.num_layers * H, exact)
    expect_equal(cell.step.summaries, exact, "page_summaries")


def check_lists(cell: StepCell, select: Callable[[int], None], what: str) -> None:
    """The first layer's lists, and no other layer's."""
    for poisoned in (cell.tables.entries, cell.tables.positions):
        poisoned.fill_(-1)
    exact = cell.tables._replace(
        entries=cell.tables.entries.clone(), positions=cell.tables.positions.clone()
    )
    cell.select_ref(exact, 0)
    select(0)
    expect_equal(cell.tables.positions, exact.positions, what)
    expect_equal(cell.tables.entries, exact.entries, what)


def expect_equal(actual: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    expect(torch.equal(actual.nan_to_num(nan=1e9), exact.nan_to_num(nan=1e9)), what)


def cell_of(name: str, num_layers: int | None) -> StepCell:
    num_rows, num_tokens, share = cells.parse(name)
    return make_cell(num_rows, num_tokens, int(share) / 100, num_layers)


def step_row(name: str, num_layers: int | None) -> dict[str, Any]:
    return selection_row("step_select", name, cell_of(name, num_layers))


def selection_row(benchmark: str, name: str, cell: StepCell) -> dict[str, Any]:
    """A way of choosing among all pages of the prompts."""
    check_summaries(cell)
    check_lists(cell, cell.select, benchmark)
    timed = functools.partial(time_calls, num_layers=cell.num_layers)
    us, spread = timed(cell.select)
    keys_us, choose_us = timed(cell.write_keys)[0], timed(cell.choose)[0]
    check_lists(cell, cell.select, f"{benchmark} after timing")
    decode_us, whole_us = time_decode(cell)
    read = sum(cell.read_bytes.values())
    return {
        "benchmark": benchmark,
        "cell": name,
        "config": {
            "share": int(cells.parse(name)[2]) / 100,
            "table_width": cell.rows.block_table.shape[1],
        },
        **cell.read_bytes,
        "median_us": us,
        "spread_us": spread,
        "gb_per_s": read / us / 1e3,
        "keys_us": keys_us,
        "keys_gb_per_s": read / keys_us / 1e3,
        "choose_us": choose_us,
        "decode_us": decode_us,
        "whole_decode_us": whole_us,
        "to_whole_decode": (us + decode_us) / whole_us,
    }


def time_decode(cell: StepCell) -> tuple[float, float]:
    """Medians of decode attention over the chosen pages and over all pages."""
    for layer in range(cell.num_layers):
        cell.select(layer)
    decode_us, _ = time_ours(cell, cell.reference(0), "of the chosen pages")
    whole = cell.whole()
    whole_us, _ = time_ours(whole, whole.reference(0), "of all pages")
    return decode_us, whole_us


def summaries_row(num_tokens: int, num_layers: int) -> dict[str, Any]:
    """All layers of one prompt; bytes are those of the keys read and of the summaries written."""
    cell = make_cell(1, num_tokens, 0.1, num_layers)
    check_summaries(cell)
    us, spread = time_calls(cell.summarize, 1)
    num_pages = cell.prompt_pages * num_layers * H
    moved = num_pages * (PAGE + 2) * D * 2
    return {
        "benchmark": "page_summaries",
        "cell": f"1x{num_tokens // 1024}K",
        "config": {"num_layers": num_layers, "moved_bytes": moved},
        "median_us": us,
        "spread_us": spread,
        "gb_per_s": moved / us / 1e3,
    }
