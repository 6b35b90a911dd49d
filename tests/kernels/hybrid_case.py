"""Batches of compacted prompts with idle pages, for the tests of `hybrid_step_select`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from common.best_pages import SAME_SCORE, shortfall
from common.tables import tables_for
from vllm_heterocache.kernels.hybrid_step_select_ref import approximate_attention
from vllm_heterocache.kernels.kv_scales import KVScales
from vllm_heterocache.kernels.tables import DecodeRows, PageTables, StepTables
from vllm_heterocache.kernels.values import Protected

UNSET = -987_654  # what integers hold that nobody may write
FREE_ROWS = 1  # rows of the arenas between two slots


class HybridRow(NamedTuple):
    num_pages: int  # P of the prompt; 0 for a dense row
    held: tuple[tuple[int, int], ...]  # pages listed and idle, in turn over all heads
    num_tokens: int = 1  # 0: the row has none in this step


# odd sizes, heads without idle pages and without a list, several tiles, dense rows, padded rows
SMALL_ROWS = [
    HybridRow(9, ((2, 3), (4, 0), (0, 5), (1, 1))),
    HybridRow(0, ((0, 0),)),
    HybridRow(203, ((3, 77), (70, 7), (64, 64), (9, 0))),
    HybridRow(33, ((5, 6),), num_tokens=0),
    HybridRow(67, ((66, 1), (1, 66))),
]


@dataclass
class HybridCase:
    query: torch.Tensor  # [num_rows, H * G, D]
    tables: PageTables
    step: StepTables
    rows: DecodeRows
    shapes: list[HybridRow]
    layer: int
    scale: float
    kv_scales: KVScales | None

    def fresh(self) -> PageTables:
        entries, positions = self.tables.entries.clone(), self.tables.positions.clone()
        return self.tables._replace(entries=entries, positions=positions)

    def places(self, row: int, head: int) -> slice:
        """Of a head's listed and idle pages."""
        assert self.tables.idle_pages is not None
        index = row, self.layer, head
        start, count = int(self.tables.start[index]), int(self.tables.count[index])
        return slice(start, start + count + int(self.tables.idle_pages[index]))

    def scores(self, row: int, head: int, channel_share: float) -> dict[int, float]:
        """Approximate attention on each prompt page that a head holds."""
        places, num_kv_heads = self.places(row, head), self.tables.count.shape[2]
        scale: float | torch.Tensor = self.scale
        if self.kv_scales is not None:
            scale = scale * self.kv_scales.key[self.layer, head]
        queries = self.query[row].view(num_kv_heads, -1, self.query.shape[2])[head].float()
        boxes = self.step.summaries[self.tables.entries[places].long()].float()
        found = approximate_attention(queries, boxes, scale, channel_share)
        return dict(zip(self.tables.positions[places].tolist(), found.tolist(), strict=True))


def make_hybrid_case(
    num_layers: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    shapes: list[HybridRow] = SMALL_ROWS,
    layer: int = 0,
    page_dtype: torch.dtype | None = None,
) -> HybridCase:
    """Row i has slot i of a table with the slots in another order. The pages of a head stand in
    the order of a shuffle. Summaries of pages that no row may read are NaN, and so are queries of
    rows without tokens.
    """
    device = generator.device
    num_heads, num_rows = num_layers * num_kv_heads, len(shapes)
    heads = num_rows, num_layers, num_kv_heads
    start = torch.full(heads, UNSET, dtype=torch.int64)
    count, idle = (torch.zeros(heads, dtype=torch.int32) for _ in range(2))
    first_stripe = torch.full((num_rows,), UNSET, dtype=torch.int64)
    num_entries, stripe = 3, 1
    listed: list[tuple[int, torch.Tensor, bool]] = []
    for i in reversed(range(num_rows)):
        shape = shapes[i]
        first_stripe[i] = stripe
        stripe += shape.num_pages + FREE_ROWS
        for flat in range(num_heads):
            index = i, flat // num_kv_heads, flat % num_kv_heads
            start[index] = num_entries
            count[index], idle[index] = torch.tensor(shape.held[flat % len(shape.held)])
            size = int(count[index] + idle[index])
            pages = torch.randperm(shape.num_pages, generator=generator, device=device)[:size]
            is_read = bool(shape.num_tokens and idle[index] and index[1] == layer)
            listed.append((num_entries, pages.int(), is_read))
            num_entries += size + 2
    positions = torch.full((num_entries,), UNSET, dtype=torch.int32, device=device)
    entries = torch.randperm(num_entries, generator=generator, device=device).int()
    bounds = torch.randn(num_entries, 2, head_dim, generator=generator, device=device)
    summaries = torch.full_like(bounds, torch.nan)
    for begin, pages, is_read in listed:
        places = slice(begin, begin + len(pages))
        positions[places] = pages
        if is_read:
            summaries[entries[places].long()] = bounds[places].sort(dim=1).values
    query = torch.randn(
        num_rows, num_kv_heads * group, head_dim, generator=generator, device=device
    )
    num_tokens = [shape.num_tokens and shape.num_pages * 16 + 1 for shape in shapes]
    query[[tokens == 0 for tokens in num_tokens]] = torch.nan
    tables = tables_for(
        heads,
        device,
        poison=UNSET,
        start=start,
        count=count,
        prompt_pages=torch.tensor([shape.num_pages for shape in shapes], dtype=torch.int32),
        first_stripe=first_stripe,
        positions=positions,
        entries=entries,
        idle_pages=idle,
    )
    key_width, kv_scales = 2 * num_kv_heads, None
    keys = torch.full((stripe * key_width,), UNSET, dtype=torch.int32, device=device)
    if page_dtype is not None:
        factors = torch.rand(3, num_layers, num_kv_heads, generator=generator, device=device) + 0.5
        kv_scales = KVScales(*factors)
    none = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
    rows = DecodeRows(
        torch.arange(num_rows, dtype=torch.int32, device=device),
        torch.full((num_rows, 3), 10**6, dtype=torch.int32, device=device),
        torch.tensor(num_tokens, dtype=torch.int32, device=device),
        none,
        none,
    )
    return HybridCase(
        query.to(dtype), tables, StepTables(summaries.to(page_dtype or dtype), keys, key_width),
        rows, shapes, layer, head_dim**-0.5, kv_scales,
    )  # fmt: skip


def check_permuted(
    case: HybridCase, actual: PageTables, protected: Protected, channel_share: float = 1.0
) -> None:
    """The head's protected pages and the best others are listed, in ascending order, the others
    follow in the same, and nothing else was written. Of pages of the same score (SAME_SCORE)
    either may be listed.

    Args:
        actual: what became of `case.fresh()`.
    """
    assert case.tables.idle_pages is not None
    is_written = torch.zeros_like(case.tables.entries, dtype=torch.bool)
    for row, shape in enumerate(case.shapes):
        for head in range(case.tables.count.shape[2]):
            index = row, case.layer, head
            if not shape.num_tokens or not case.tables.idle_pages[index]:
                continue
            places, count = case.places(row, head), int(case.tables.count[index])
            is_written[places] = True
            before, after = (
                dict(zip(t.positions[places].tolist(), t.entries[places].tolist(), strict=True))
                for t in (case.tables, actual)
            )
            assert after == before, "a page was lost, or is not where the table says"
            pages = actual.positions[places].tolist()
            listed, idle = pages[:count], pages[count:]
            assert listed == sorted(listed) and idle == sorted(idle)
            last = shape.num_pages - protected.recent
            scores = case.scores(row, head, channel_share) | {
                page: torch.inf for page in pages if page < protected.sinks or page >= last
            }
            ranked = torch.tensor([scores[page] for page in pages])
            assert shortfall(ranked[:count], ranked[count:]) <= SAME_SCORE
    for name in ("entries", "positions"):
        found, expected = getattr(actual, name), getattr(case.tables, name)
        assert torch.equal(found[~is_written], expected[~is_written])
