"""The kernels of finders, beside decode attention in the same process.

`find_pages` scores all pages of the prompts for the finders of one layer; `paged_decode` stands
there over the pages that are listed at a tenth of the prompt and over the whole prompt. A step
that checks nothing pays the time with no row due. `quantized_keys` is timed over a whole prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from common import cells, step_kernels
from common.cells import PAGE, D, G, H
from common.step_kernels import StepCell, expect_equal
from common.timing import DEVICE, expect, time_calls
from vllm_heterocache.kernels import find_pages as module
from vllm_heterocache.kernels.find_pages_ref import find_pages_ref
from vllm_heterocache.kernels.quantized_keys import quantized_keys
from vllm_heterocache.kernels.quantized_keys_ref import quantized_keys_ref
from vllm_heterocache.kernels.tables import FinderTables, first_finders

MIXES = {"1finder": 1, "2finder": 2}  # finders of a layer
CELLS = [f"{context}-{mix}" for context in ("1x32K", "1x224K", "8x32K") for mix in MIXES]
SHARE = 0.1  # of the prompt's pages, listed
CODE_BYTES, GRID_BYTES = 4 * D, 2 * D * 2  # of a page
# The kernel multiplies rounded keys: 2 ** -9 of a logit, whose standard deviation is about 1.
MAX_LSE_ERROR = 0.05
TINY_PROGRAMS = 16


def make_tiny() -> None:
    """Each program costs time in the interpreter."""
    if DEVICE.type == "cpu":
        module.MAX_PROGRAMS = TINY_PROGRAMS


@dataclasses.dataclass
class FinderCell(StepCell):
    """A decode batch in which the first heads of each layer are finders. All rows are due."""

    finders: FinderTables
    program_lse: torch.Tensor  # [num_layers, *], as the kernel leaves it for each layer

    @property
    def num_finders(self) -> int:
        """Of a layer."""
        return self.finders.width // self.num_layers

    @property
    def read_bytes(self) -> dict[str, int]:
        num_pages = self.num_rows * self.prompt_pages * self.num_finders
        return {"code_bytes": num_pages * CODE_BYTES, "grid_bytes": num_pages * GRID_BYTES}

    def none_due(self) -> FinderCell:
        rows = self.rows._replace(is_due=torch.zeros_like(self.rows.is_due))
        return dataclasses.replace(self, rows=rows)

    def blocks_of(self, row: int) -> torch.Tensor:
        return self.prompt_blocks.view(self.num_rows, -1)[row]

    def quantize(self, row: int) -> None:
        quantized_keys(self.pages, self.tables, self.finders, row, self.blocks_of(row))

    def find(self, layer: int) -> None:
        module.find_pages(
            self.query, self.tables, self.finders, self.rows, layer, D**-0.5,
            program_lse=self.program_lse[layer],
        )  # fmt: skip

    def by_finder(self, values: torch.Tensor) -> torch.Tensor:
        """[num_rows, finders of all layers, P, ...]: what stands at the finders' places."""
        return values.view(self.num_rows, self.finders.width, self.prompt_pages, *values.shape[1:])

    def by_program(self, layer: int) -> torch.Tensor:
        """[num_rows, finders of a layer, programs, G]: a view of one layer's `program_lse`."""
        num_programs = module.programs_per_finder(self.num_rows, self.num_finders)
        shape = self.num_rows, self.num_finders, num_programs, G
        return self.program_lse[layer, : math.prod(shape)].view(shape)


def make_cell(
    num_rows: int, num_tokens: int, num_finders: int, num_layers: int | None = None
) -> FinderCell:
    """Codes, grids and log-sum-exps are poisoned."""
    num_pages = num_rows * (num_tokens // PAGE - cells.TAIL_BLOCKS)
    num_layers = num_layers or cells.cold_layers(num_pages * (CODE_BYTES + GRID_BYTES))
    cell = step_kernels.make_cell(num_rows, num_tokens, SHARE, num_layers)
    is_finder = (torch.arange(H, device=DEVICE) < num_finders).expand(num_layers, H)
    heads = is_finder.flatten().nonzero().flatten().int()
    width = heads.shape[0]
    finder = torch.arange(width, dtype=torch.int32, device=DEVICE)
    places = num_pages * width
    finders = FinderTables(
        torch.full((places, 2, D), -1, dtype=torch.int16, device=DEVICE),
        cell.pages.new_full((places, 2, D), torch.nan),
        width, heads, finder, first_finders(heads.tolist(), num_layers, H),
    )  # fmt: skip
    lse = torch.full((places, G), torch.nan, device=DEVICE)
    workspace = module.find_pages_workspace(num_rows, finders, G)
    fields = vars(cell) | {
        "tables": cell.tables._replace(page_lse=lse, pivot_width=width),
        "rows": cell.rows._replace(is_due=torch.ones_like(cell.rows.is_due)),
    }
    program_lse = torch.full((num_layers, workspace), torch.nan, device=DEVICE)
    return FinderCell(**fields, finders=finders, program_lse=program_lse)


def check_quantized(cell: FinderCell, quantize: Callable[[int], None], what: str) -> None:
    """The codes and grids of the first prompt."""
    exact = cell.finders._replace(
        codes=torch.full_like(cell.finders.codes, -1),
        grids=torch.full_like(cell.finders.grids, torch.nan),
    )
    quantized_keys_ref(cell.pages, cell.tables, exact, 0, cell.blocks_of(0))
    cell.finders.codes.fill_(-1)
    cell.finders.grids.fill_(torch.nan)
    quantize(0)
    expect_equal(cell.finders.codes, exact.codes, f"{what}, codes,")
    # the interpreter cuts digits of bf16 off
    rtol = 0 if DEVICE.type == "cuda" else torch.finfo(torch.bfloat16).eps
    grids, of_ref = cell.finders.grids.float(), exact.grids.float()
    is_right = torch.allclose(grids, of_ref, rtol=rtol, atol=0, equal_nan=True)
    expect(is_right, f"{what}, grids,")


def check_found(cell: FinderCell, find: Callable[[int], None], what: str) -> None:
    """The log-sum-exps of the first layer and their sums, and no other layer's."""
    exact = cell.tables._replace(page_lse=torch.full_like(cell.tables.page_lse, torch.nan))
    find_pages_ref(cell.query, exact, cell.finders, cell.rows, 0, D**-0.5)
    found = cell.tables.page_lse.fill_(torch.nan)
    cell.program_lse.fill_(torch.nan)
    find(0)
    is_found = ~exact.page_lse.isnan()
    expect(torch.equal(~found.isnan(), is_found), what)
    error = (found[is_found] - exact.page_lse[is_found]).abs()
    expect(bool((error < MAX_LSE_ERROR).all()), what)
    total = cell.by_program(0).exp2().sum(2).log2()
    exact_total = cell.by_finder(exact.page_lse)[:, : cell.num_finders].exp2().sum(2).log2()
    expect(bool(((total - exact_total).abs() < MAX_LSE_ERROR).all()), f"{what}, a sum,")


def find_row(name: str, num_layers: int | None) -> dict[str, Any]:
    num_rows, num_tokens, mix = cells.parse(name)
    cell = make_cell(num_rows, num_tokens, MIXES[mix], num_layers)
    cell.summarize()
    for row in range(num_rows):
        cell.quantize(row)
    check_found(cell, cell.find, "find_pages")
    timed = functools.partial(time_calls, num_layers=cell.num_layers)
    us, spread = timed(cell.find)
    none_due_us, _ = timed(cell.none_due().find)
    check_found(cell, cell.find, "find_pages after timing")
    decode_us, whole_us = step_kernels.time_decode(cell)
    return {
        "benchmark": "find_pages",
        "cell": name,
        "config": {"finders": MIXES[mix], "share": SHARE, "num_layers": cell.num_layers},
        **cell.read_bytes,
        "median_us": us,
        "spread_us": spread,
        "gb_per_s": sum(cell.read_bytes.values()) / us / 1e3,
        "no_row_due_us": none_due_us,
        "decode_us": decode_us,
        "whole_decode_us": whole_us,
        "to_decode": us / decode_us,
        "to_whole_decode": (us + decode_us) / whole_us,
    }


def quantized_row(num_tokens: int, num_layers: int, num_finders: int) -> dict[str, Any]:
    """All finders of one prompt; bytes are those of the keys read and of what is written."""
    cell = make_cell(1, num_tokens, num_finders, num_layers)
    check_quantized(cell, cell.quantize, "quantized_keys")
    us, spread = time_calls(cell.quantize, 1)
    check_quantized(cell, cell.quantize, "quantized_keys after timing")
    num_pages = cell.prompt_pages * cell.finders.width
    moved = num_pages * (PAGE * D * 2 + CODE_BYTES + GRID_BYTES)
    return {
        "benchmark": "quantized_keys",
        "cell": f"1x{num_tokens // 1024}K-{num_finders}finder",
        "config": {"finders": num_finders, "num_layers": num_layers, "moved_bytes": moved},
        "median_us": us,
        "spread_us": spread,
        "gb_per_s": moved / us / 1e3,
    }
