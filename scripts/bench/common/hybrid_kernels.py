"""The kernel of policy `rocketkv`, beside decode attention in the same process.

The share of a cell is what the heads kept of their prompts, in scattered pages of a compact pool;
a step reads what the paper's rule makes of it. `hybrid_step_select` orders the kept pages of one
layer, `paged_decode` then reads those that were chosen, and stands there over all that were kept
too, which is what choosing has to beat. The lists are in the order that an earlier step left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from common import cells
from common.best_pages import SAME_SCORE, shortfall
from common.cells import D, H
from common.paged_decode import time_ours
from common.step_kernels import PROTECTED
from common.timing import DEVICE, expect, time_calls
from vllm_heterocache.kernels.hybrid_step_select import hybrid_step_select
from vllm_heterocache.kernels.hybrid_step_select_ref import approximate_attention
from vllm_heterocache.kernels.page_summaries import page_summaries
from vllm_heterocache.kernels.tables import PageTables, StepTables
from vllm_heterocache.policies.rocketkv import paper_read_share


@dataclasses.dataclass
class HybridCell(cells.Cell):
    """A decode batch whose heads list some of the pages that they kept; the others are idle."""

    step: StepTables
    num_kept: int  # pages of a head, listed and idle

    @property
    def num_read(self) -> int:
        return int(self.tables.count[0, 0, 0])

    def kept(self) -> cells.Cell:
        """The same batch where each head lists all that it kept."""
        assert self.tables.idle_pages is not None
        count = self.tables.count + self.tables.idle_pages
        tables = self.tables._replace(count=count, idle_pages=torch.zeros_like(count))
        return dataclasses.replace(self, tables=tables)

    def select(self, layer: int) -> None:
        hybrid_step_select(self.query, self.tables, self.step, self.rows, layer, D**-0.5, PROTECTED)

    def by_head(self, arena: torch.Tensor) -> torch.Tensor:
        """[num_rows, num_layers, H, num_kept]: entries or positions."""
        return arena.view(self.num_rows, self.num_layers, H, self.num_kept)


def make_cell(num_rows: int, num_tokens: int, percent: str, num_layers: int | None) -> HybridCell:
    """The pages that a head kept are random ones."""
    num_pages = num_tokens // cells.PAGE - cells.TAIL_BLOCKS
    share = int(percent) / 100
    num_kept = max(1, round(share * num_pages))
    least = PROTECTED.sinks + PROTECTED.recent + 1
    num_read = min(num_kept, max(math.ceil(paper_read_share(share) * num_pages), least))
    layers = num_layers or cells.cold_layers(num_rows * num_kept * H * 2 * D * 2)
    cell = cells.make_cell(num_rows, num_tokens, percent, num_layers=layers)
    positions = random_subsets(num_rows * layers * H, num_pages, num_kept)
    count = cell.tables.count.clamp(max=num_read)
    tables = cell.tables._replace(
        positions=positions.flatten(), count=count, idle_pages=cell.tables.count - count
    )
    summaries = cell.pages.new_empty(cell.pages.shape[0], 2, D)
    blocks = torch.arange(cell.pages.shape[0] // (layers * H), dtype=torch.int32, device=DEVICE)
    page_summaries(cell.pages, blocks, layers * H, summaries)
    keys = torch.full((num_rows * num_pages * 2 * H,), -1, dtype=torch.int32, device=DEVICE)
    fields = vars(cell) | {"tables": tables}
    return HybridCell(**fields, step=StepTables(summaries, keys, 2 * H), num_kept=num_kept)


def random_subsets(number: int, num_pages: int, size: int) -> torch.Tensor:
    """[number, size] int32, each row in ascending order."""
    order = torch.rand(number, num_pages, device=DEVICE).argsort(dim=1)
    return order[:, :size].sort(dim=1).values.int()


def check_permuted(cell: HybridCell, select: Callable[[int], None], what: str) -> None:
    """Each head of the first layer lists protected pages and those of the highest scores by the
    reference, in ascending order; the others follow in the same, with every page where it was. No
    other layer has changed."""
    before = clone_lists(cell.tables)
    select(0)
    found = cell.by_head(cell.tables.positions)[:, 0]
    in_order = all(bool((part.diff() > 0).all()) for part in split(cell, found))
    expect(in_order, f"{what}, in its order,")
    for name in ("positions", "entries"):
        now, then = (cell.by_head(getattr(t, name)) for t in (cell.tables, before))
        expect(torch.equal(now[:, 1:], then[:, 1:]), f"{what}, in another layer,")
    expect(torch.equal(by_page(cell, cell.tables), by_page(cell, before)), f"{what}, in its pages,")
    gap = shortfall(*split(cell, page_scores(cell)))
    expect(gap <= SAME_SCORE, f"{what}, in a score {gap:.2g} below one that is not listed,")


def page_scores(cell: HybridCell) -> torch.Tensor:
    """[num_rows, H, num_kept] fp32, of what the first layer lists and what is idle, by the
    reference; infinity for protected pages."""
    entries, positions = (
        cell.by_head(arena)[:, 0] for arena in (cell.tables.entries, cell.tables.positions)
    )
    grouped = cell.query.float().view(cell.num_rows, H, -1, D)
    scores = torch.stack(
        [
            approximate_attention(queries, cell.step.summaries[ids.long()].float(), D**-0.5)
            for queries, ids in zip(grouped.flatten(0, 1), entries.flatten(0, 1), strict=True)
        ]
    ).view(positions.shape)
    first_recent = cell.tables.prompt_pages[0] - PROTECTED.recent
    is_protected = (positions < PROTECTED.sinks) | (positions >= first_recent)
    return scores.masked_fill(is_protected, torch.inf)


def clone_lists(tables: PageTables) -> PageTables:
    return tables._replace(entries=tables.entries.clone(), positions=tables.positions.clone())


def split(cell: HybridCell, arena: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The listed and the idle part of [..., num_kept]."""
    return arena[..., : cell.num_read], arena[..., cell.num_read :]


def by_page(cell: HybridCell, tables: PageTables) -> torch.Tensor:
    """[2, num_rows, H, num_kept]: positions and entries of the first layer in ascending order of
    the positions."""
    positions, entries = (cell.by_head(a)[:, 0] for a in (tables.positions, tables.entries))
    order = positions.argsort(dim=-1)
    return torch.stack((positions.gather(-1, order), entries.gather(-1, order)))


def hybrid_row(name: str, num_layers: int | None) -> dict[str, Any]:
    num_rows, num_tokens, percent = cells.parse(name)
    cell = make_cell(num_rows, num_tokens, percent, num_layers)
    check_permuted(cell, cell.select, "hybrid_step_select")
    for layer in range(cell.num_layers):
        cell.select(layer)
    us, spread = time_calls(cell.select, cell.num_layers)
    check_permuted(cell, cell.select, "hybrid_step_select after timing")
    decode_us, _ = time_ours(cell, cell.reference(0), "of the chosen pages")
    kept = cell.kept()
    kept_us, _ = time_ours(kept, kept.reference(0), "of the kept pages")
    read = num_rows * cell.num_kept * H * 2 * D * 2
    return {
        "benchmark": "hybrid_step_select",
        "cell": name,
        "config": {
            "share": int(percent) / 100,
            "kept_pages": cell.num_kept,
            "read_pages": cell.num_read,
            "num_layers": cell.num_layers,
        },
        "summary_bytes": read,
        "median_us": us,
        "spread_us": spread,
        "gb_per_s": read / us / 1e3,
        "decode_us": decode_us,
        "kept_decode_us": kept_us,
        "to_kept_decode": (us + decode_us) / kept_us,
    }
