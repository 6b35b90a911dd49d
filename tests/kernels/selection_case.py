"""Page tables of a slot that is about to be filled, between two others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.tables import tables_for
from vllm_heterocache.kernels.tables import HeadMaps, PageTables
from vllm_heterocache.kernels.values import Protected

UNSET = -987_654  # what integers hold that nobody may write
SLOT, NUM_SLOTS = 1, 3  # the slots before and after belong to others
FIRST_STRIPE = 2


@dataclass
class SelectionCase:
    scores: torch.Tensor  # [L, H, P] fp32
    tables: PageTables
    maps: HeadMaps
    dense_blocks: torch.Tensor  # [>= P] int32
    source: torch.Tensor  # [listed entries and 3 more] int32, unset
    protected: Protected

    def filled(self, select) -> SelectionCase:
        """A copy, filled by an implementation of page selection."""
        written = ("positions", "scores", "is_reference", "is_resident")
        copies = {name: getattr(self.tables, name).clone() for name in written}
        tables = self.tables._replace(**copies)
        case = SelectionCase(**{**vars(self), "tables": tables, "source": self.source.clone()})
        select(
            case.scores, tables, case.maps, SLOT, case.dense_blocks,
            case.protected, case.source,
        )  # fmt: skip
        return case


def make_selection_case(
    scores: torch.Tensor, counts: torch.Tensor, protected: Protected
) -> SelectionCase:
    """Heads take the roles pivot, satellite and neither in turn; every place that nobody may
    write, and every one that has to be written, holds poison.

    Args:
        scores: [L, H, P] fp32.
        counts: [L, H] int, pages of each head's list.
    """
    device = scores.device
    num_layers, num_kv_heads, num_pages = scores.shape
    num_heads = num_layers * num_kv_heads
    heads = torch.arange(num_heads, dtype=torch.int32)
    pivots, satellites = heads[heads % 3 == 0], heads[heads % 3 == 1]
    num_blocks = int(counts.sum()) // num_heads + 2

    def width_of(heads_with_places: torch.Tensor) -> int:
        return -(-len(heads_with_places) * num_pages // num_blocks)

    def index_of_head(chosen: torch.Tensor) -> torch.Tensor:
        index = torch.full((num_heads,), -1, dtype=torch.int32)
        index[chosen.long()] = torch.arange(len(chosen), dtype=torch.int32)
        return index.view(num_layers, num_kv_heads).to(device)

    tables = tables_for(
        (NUM_SLOTS + 1, num_layers, num_kv_heads),
        device,
        num_rows=FIRST_STRIPE + num_blocks + 1,
        widths=(width_of(pivots), width_of(satellites), 1),
        poison=UNSET,
    )
    flat_counts = counts.flatten().long()
    offsets = FIRST_STRIPE * num_heads + flat_counts.cumsum(0) - flat_counts
    tables.start[SLOT] = offsets.view(counts.shape).to(device)
    tables.count[SLOT] = counts.int().to(device)
    tables.first_stripe[SLOT], tables.prompt_pages[SLOT] = FIRST_STRIPE, num_pages
    maps = HeadMaps(
        pivot_of_head=index_of_head(pivots),
        satellite_of_head=index_of_head(satellites),
        pivot_heads=pivots.to(device),
        satellite_heads=satellites.to(device),
        leaders=torch.zeros(len(satellites), dtype=torch.int32, device=device),
    )
    blocks = torch.cat([torch.randperm(num_pages + 5)[:num_pages] + 3, torch.tensor([UNSET] * 2)])
    source = torch.full((int(counts.sum()) + 3,), UNSET, dtype=torch.int32, device=device)
    return SelectionCase(scores, tables, maps, blocks.int().to(device), source, protected)
