"""Page tables of a slot that is about to be filled, between two others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_heterocache.kernels.tables import HeadMaps, PageTables
from vllm_heterocache.kernels.values import Protected

UNSET = -987_654  # what integers hold that nobody may write
SLOT, NUM_SLOTS = 1, 3  # the slots before and after belong to others
FIRST_ROW = 2


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
    num_rows = FIRST_ROW + num_blocks + 1

    def width_of(heads_with_places: torch.Tensor) -> int:
        return -(-len(heads_with_places) * num_pages // num_blocks)

    def unset(*shape: int, dtype: torch.dtype = torch.int32, value: float = UNSET) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    def index_of_head(chosen: torch.Tensor) -> torch.Tensor:
        index = torch.full((num_heads,), -1, dtype=torch.int32)
        index[chosen.long()] = torch.arange(len(chosen), dtype=torch.int32)
        return index.view(num_layers, num_kv_heads).to(device)

    shape = (NUM_SLOTS + 1, num_layers, num_kv_heads)
    start, count = unset(*shape, dtype=torch.int64), unset(*shape)
    flat_counts = counts.flatten().long()
    offsets = FIRST_ROW * num_heads + flat_counts.cumsum(0) - flat_counts
    start[SLOT], count[SLOT] = offsets.view(counts.shape).to(device), counts.int().to(device)
    first_row = unset(NUM_SLOTS + 1, dtype=torch.int64)
    first_row[SLOT] = FIRST_ROW
    prompt_pages = unset(NUM_SLOTS + 1)
    prompt_pages[SLOT] = num_pages
    pivot_width, satellite_width = width_of(pivots), width_of(satellites)
    tables = PageTables(
        entries=unset(num_rows * num_heads),
        positions=unset(num_rows * num_heads),
        start=start,
        count=count,
        mean_pages=unset(0),
        prompt_pages=prompt_pages,
        first_row=first_row,
        page_lse=unset(num_rows * pivot_width, 1, dtype=torch.float32, value=torch.nan),
        scores=unset(num_rows * pivot_width, dtype=torch.float32, value=torch.nan),
        is_reference=unset(num_rows * pivot_width, dtype=torch.int8, value=77),
        is_resident=unset(num_rows * satellite_width, dtype=torch.int8, value=77),
        host_blocks=unset(num_rows),
        pivot_width=pivot_width,
        satellite_width=satellite_width,
        host_width=1,
    )
    maps = HeadMaps(
        pivot_of_head=index_of_head(pivots),
        satellite_of_head=index_of_head(satellites),
        pivot_heads=pivots.to(device),
        satellite_heads=satellites.to(device),
        leaders=torch.zeros(len(satellites), dtype=torch.int32, device=device),
    )
    blocks = torch.cat([torch.randperm(num_pages + 5)[:num_pages] + 3, torch.tensor([UNSET] * 2)])
    source = unset(int(counts.sum()) + 3)
    return SelectionCase(scores, tables, maps, blocks.int().to(device), source, protected)
