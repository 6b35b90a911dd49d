"""`paged_decode` on the batches of cells.py: right results first, then times."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.cells import Cell, D, G, H, Results
from common.timing import DEVICE, expect, expect_close, time_calls
from vllm_heterocache.kernels import tuning
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace, paged_decode, split_decode


class PagedDecode:
    """Our kernel on a cell."""

    def __init__(
        self,
        cell: Cell,
        launch: tuning.PagedDecodeLaunch | None = None,
        num_programs: int | None = None,
        pivot_of_head: torch.Tensor | None = None,
        late_heads: Sequence[int] = (),
    ) -> None:
        self.cell, self.launch, self.pivot_of_head = cell, launch, pivot_of_head
        if DEVICE.type == "cpu":
            num_programs = 2
        self.workspace = DecodeWorkspace.allocate(
            cell.num_rows, cell.num_layers, H, G, D, DEVICE, num_programs, cell.rows.max_queries,
            is_fp8=cell.kv_scales is not None, late_heads=late_heads,
        )  # fmt: skip
        self.results = Results.allocate(cell, cell.query.dtype)
        self.results = self.results._replace(head_lse=self.workspace.head_lse)
        self.split()

    def split(self, layer: int = 0) -> None:
        split_decode(self.cell.tables, self.cell.rows, self.workspace)

    def __call__(self, layer: int) -> torch.Tensor:
        cell = self.cell
        paged_decode(
            cell.query, cell.pages, cell.tables, cell.rows, self.workspace, layer, D**-0.5,
            self.results.output, cell.last_queries, self.pivot_of_head, self.launch, cell.kv_scales,
        )  # fmt: skip
        return self.results.output


def time_ours(cell: Cell, exact: Results, what: str, launch=None, pivot_of_head=None):
    """Median and spread of `paged_decode`; wrong results before or after are the end."""
    ours = PagedDecode(cell, launch, None, pivot_of_head)
    for when in ("before", "after"):
        ours.results.output.fill_(torch.nan)
        expect_close(ours(0), exact.output, f"paged_decode {what} {when} timing")
        if pivot_of_head is not None and cell.rows.is_due.any():
            check_lse(ours.results, exact, cell, what)
        if when == "before":
            timed = time_calls(ours, cell.num_layers)
    return timed


def check_lse(actual: Results, exact: Results, cell: Cell, what: str) -> None:
    """By-products of layer 0; a page's weights are rounded to bfloat16 before they are added."""
    written = ~exact.page_lse.isnan()
    pages = (actual.page_lse[written] - exact.page_lse[written]).abs()
    pivots = cell.is_pivot[0].to(DEVICE).repeat(cell.num_rows)
    heads = (actual.head_lse[0, pivots] - exact.head_lse[0, pivots]).abs()
    is_right = bool((pages < 2**-7).all() and (heads < 1e-3).all())
    expect(is_right, f"the log-sum-exp of {what}")


def time_with_means(cell: Cell) -> float:
    """Median where part of each short list is mean pages; no head leads."""
    cell = cell.with_means()
    return time_ours(cell, cell.reference(0), "with means")[0]
