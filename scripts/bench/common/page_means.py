"""`page_means`, beside a copy of as many bytes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from common.cells import PAGE, D, H, make_tables, random_pages
from common.timing import DEVICE, rates, seconds
from vllm_heterocache.heads.evicted_means import mean_pages
from vllm_heterocache.kernels.page_means import page_means
from vllm_heterocache.kernels.page_means_ref import page_means_ref

NUM_LAYERS, PROMPT_PAGES, SHARE = 8, 8192, 0.05
TINY_LAYERS, TINY_PROMPT_PAGES = 1, 48


def means_row(num_layers: int = NUM_LAYERS, prompt_pages: int = PROMPT_PAGES) -> dict[str, Any]:
    """The means of one prompt: layers of 8 heads that keep one page in 20."""
    per_block = num_layers * H
    budget = max(6, round(SHARE * prompt_pages))
    num_blocks = prompt_pages + budget + 1
    pages = random_pages(num_blocks * per_block)
    blocks = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32)
    dense, own = blocks[:prompt_pages], blocks[prompt_pages:].long()
    entries = (own[:, None] * per_block + torch.arange(per_block, device=DEVICE)).flatten().int()
    budgets = torch.full((H,), budget)
    means = int(mean_pages(budgets[:1, None].numpy(), prompt_pages, 5, [31], 32)[0, 0])
    tables = make_tables(entries, budgets, 1, num_layers, prompt_pages, 0)
    heads = torch.rand(per_block, prompt_pages, device=DEVICE)
    kept = heads.topk(budget - means, dim=1).indices.sort(dim=1).values.int()
    positions = torch.full((per_block, budget), -1, dtype=torch.int32, device=DEVICE)
    positions[:, : budget - means] = kept
    means_of_head = means * (tables.count > 0).int()
    tables = tables._replace(
        positions=positions.flatten(),
        count=tables.count - means_of_head,
        stand_in_pages=means_of_head,
        has_stand_ins=True,
    )
    expected = pages.clone()
    page_means_ref(expected, tables, 0, dense)
    page_means(pages, tables, 0, dense)
    torch.testing.assert_close(pages, expected, rtol=2**-7, atol=1e-5, msg="page_means is wrong")
    moved = (prompt_pages - budget + means) * per_block * PAGE * 2 * D * 2
    del expected
    times = seconds(functools.partial(page_means, pages, tables, 0, dense))
    flat = pages.view(-1)[: moved // 2]
    copy_times = seconds(functools.partial(torch.empty_like(flat).copy_, flat))
    return {
        "benchmark": "page_means",
        "cell": f"1x{prompt_pages * PAGE // 1024}K, {num_layers} layers",
        "config": {"budget_pages": budget, "mean_pages": means},
        "read_bytes": moved,
        "ms": [s * 1e3 for s in times],
        "copy_ms": [s * 1e3 for s in copy_times],
        "read_gb_per_s": rates(moved, times),
        "values": "median, 90th and 10th percentile of the time",
    }
