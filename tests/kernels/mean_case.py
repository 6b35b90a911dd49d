"""A compacted prompt for the tests of `page_means`, poisoned all over."""

from __future__ import annotations

from typing import NamedTuple

import torch

from common.tables import tables_for
from vllm_heterocache.kernels.tables import PageTables

N = 16
SLOT, NUM_SLOTS, FIRST_STRIPE = 1, 3, 2
OUT_OF_RANGE = 10**9


class Case(NamedTuple):
    pages: torch.Tensor
    tables: PageTables
    dense_blocks: torch.Tensor
    mean_ids: list[torch.Tensor]  # of each flat head, its mean pages
    evicted: list[list[int]]  # of each flat head, the dense pages it evicted, in order


def make_mean_case(shape, lengths, generator, device) -> Case:
    """A prompt in blocks of no order; NaN in every page that may not be read, listed ones too."""
    num_layers, num_kv_heads, head_dim, dtype = shape
    num_pages, of_heads = lengths
    num_heads = num_layers * num_kv_heads
    of_heads = [of_heads[i % len(of_heads)] for i in range(num_heads)]
    own = torch.tensor([listed + means for listed, means in of_heads])
    rows = -(-int(own.sum()) // num_heads)
    blocks = torch.randperm(num_pages + rows + 3, generator=generator)
    dense, compact = blocks[:num_pages], blocks[num_pages : num_pages + rows]
    pages = torch.full((len(blocks) * num_heads, N, 2 * head_dim), torch.nan).to(dtype)
    entries = torch.full(((FIRST_STRIPE + rows + 1) * num_heads,), OUT_OF_RANGE, dtype=torch.int32)
    mine = (compact[:, None] * num_heads + torch.arange(num_heads)).flatten()
    first = FIRST_STRIPE * num_heads
    entries[first : first + len(mine)] = mine[torch.randperm(len(mine), generator=generator)].int()
    positions = torch.full_like(entries, -1)
    table = torch.full((NUM_SLOTS, num_layers, num_kv_heads), OUT_OF_RANGE, dtype=torch.int64)
    start, count, stand_in_pages = table, table.int(), table.int()
    start[SLOT] = (first + own.cumsum(0) - own).view(num_layers, num_kv_heads)
    count[SLOT] = torch.tensor([n for n, _ in of_heads]).view(num_layers, num_kv_heads)
    stand_in_pages[SLOT] = torch.tensor([m for _, m in of_heads]).view(num_layers, num_kv_heads)
    mean_ids, evicted = [], []
    for head, (listed, means) in enumerate(of_heads):
        begin = int(start[SLOT].flatten()[head])
        kept = torch.randperm(num_pages, generator=generator)[:listed].sort().values
        positions[begin : begin + listed] = kept.int()
        gone = torch.ones(num_pages, dtype=torch.bool)
        gone[kept] = False
        ids = dense[gone] * num_heads + head
        if means:
            filled = torch.randn(len(ids), N, 2 * head_dim, generator=generator)
            pages[ids] = (filled + torch.randn(2 * head_dim, generator=generator)).to(dtype)
        mean_ids.append(entries[begin + listed : begin + listed + means].long())
        evicted.append(ids.tolist())
    prompt_pages = torch.tensor([7, num_pages, 7], dtype=torch.int32)
    tables = tables_for(
        (NUM_SLOTS, num_layers, num_kv_heads), device, poison=OUT_OF_RANGE,
        entries=entries, positions=positions, start=start, count=count,
        stand_in_pages=stand_in_pages, prompt_pages=prompt_pages, has_stand_ins=True,
    )  # fmt: skip
    return Case(pages.to(device), tables, dense.int().to(device), mean_ids, evicted)
