"""Decode batches whose rows verify drafts, for the tests of `paged_decode` and its reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from decode_cases import PAGE, Case, Results

from vllm_heterocache.kernels.tables import DecodeRows


@dataclass
class DraftCase:
    """A batch with up to `max_queries` queries a row, and the same with a row for each query."""

    several: Case
    single: Case
    starts: list[int]  # [num_rows + 1]

    @property
    def num_queries(self) -> int:
        return self.starts[-1]

    def joined(self, of_single: Results) -> Results:
        """Results of the single rows, where those of the batch belong."""
        num_kv_heads = self.several.tables.count.shape[2]
        num_rows = len(self.starts) - 1
        shape = (of_single.head_lse.shape[0], (num_rows + 2) * num_kv_heads, self.several.group)
        head_lse = of_single.head_lse.new_full(shape, torch.nan)
        for row, (first, end) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            if end > first:
                mine = slice(row * num_kv_heads, (row + 1) * num_kv_heads)
                head_lse[:, mine] = of_single.head_lse[:, first * num_kv_heads :][:, :num_kv_heads]
        return of_single._replace(head_lse=head_lse)

    def check_nothing_behind(self, results: Results) -> None:
        """The outputs behind the rows' queries stay NaN, as those queries are."""
        assert results.output[self.num_queries :].isnan().all()


def with_drafts(case: Case, max_queries: int, generator: torch.Generator) -> DraftCase:
    """Rows of `case` with 1 to `max_queries` queries, at most those of the live tail's tokens. The
    first row that has room has all of them, and padded rows have none."""
    rows, device = case.rows, case.query.device
    tails = rows.seq_lens - case.tables.prompt_pages[rows.row_to_table_slot.long()] * PAGE
    room = torch.where(rows.seq_lens > 0, tails, 0).clamp(max=max_queries).cpu()
    counts = torch.minimum(room, torch.randint(1, max_queries + 1, room.shape))
    counts[int(room.argmax())] = room.max()
    assert room.max() == max_queries, "no row has room for so many"
    starts = [0, *counts.cumsum(0).tolist()]
    row_of_query = torch.repeat_interleave(counts)
    later = torch.cat([torch.arange(int(n)) for n in counts]).to(device)
    row_of_query = row_of_query.to(device)
    behind = 3
    shape = (starts[-1] + behind, *case.query.shape[1:])
    query = torch.randn(shape, generator=generator, device=device).to(case.query.dtype)
    query[starts[-1] :] = torch.nan
    query_place = torch.randperm(starts[-1] + 5, generator=generator, device=device).int()
    query_place = query_place[: starts[-1] + behind]
    query_place[::3] = -1
    missing = counts.to(device)[row_of_query] - 1 - later
    single = DecodeRows(
        rows.row_to_table_slot[row_of_query],
        rows.block_table[row_of_query],
        (rows.seq_lens[row_of_query] - missing).int(),
        query_place[: starts[-1]],
        torch.where(later == 0, rows.is_due[row_of_query], 0),
    )
    query_start = torch.tensor(starts, dtype=torch.int32, device=device)
    several = rows._replace(
        query_place=query_place, query_start=query_start, max_queries=max_queries
    )
    return DraftCase(
        replace(case, query=query, rows=several),
        replace(case, query=query[: starts[-1]], rows=single),
        starts,
    )
