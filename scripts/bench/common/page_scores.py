"""`page_scores` of a prompt by one token and by several, beside a copy of as many bytes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from common.cells import PAGE, D, G, H, random_pages
from common.timing import DEVICE, expect_close, seconds
from vllm_heterocache.kernels.page_scores import page_scores, page_scores_workspace
from vllm_heterocache.kernels.page_scores_ref import page_scores_ref
from vllm_heterocache.policies.heterocache import SCORING_QUERIES

NUM_LAYERS = 32
LENGTHS, TINY = (32768, 131072), (1024, 1)  # tokens; tokens and layers
MOST_ERROR = 1e-4


def scores_row(num_tokens: int, num_layers: int = NUM_LAYERS) -> dict[str, Any]:
    """In ms for a prompt of so many tokens, all layers."""
    num_blocks = num_tokens // PAGE
    pages = random_pages(num_blocks * num_layers * H)
    blocks = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32)
    row: dict[str, Any] = {
        "benchmark": "page_scores",
        "cell": f"1x{num_tokens // 1024}K, {num_layers} layers",
        "config": {"queries": [1, SCORING_QUERIES]},
        "values": "median, 90th and 10th percentile of the time",
    }
    for name, count in (("one", 1), ("several", SCORING_QUERIES)):
        row[f"{name}_ms"] = _times(pages, blocks, num_layers, count)
    keys = pages.view(-1)[: pages.numel() // 2]  # half of a page is keys
    row["copy_ms"] = [
        1e3 * s for s in seconds(functools.partial(torch.empty_like(keys).copy_, keys))
    ]
    return row


def _times(pages: torch.Tensor, blocks: torch.Tensor, num_layers: int, count: int) -> list[float]:
    rows, num_tokens = count * G, blocks.shape[0] * PAGE
    queries = torch.randn(num_layers, H * rows, D, device=DEVICE, dtype=pages.dtype)
    scores = torch.empty(num_layers, H, blocks.shape[0], device=DEVICE)
    workspace = torch.empty(page_scores_workspace(num_tokens, H, rows), device=DEVICE)
    inputs = queries, pages, blocks, num_tokens, D**-0.5
    page_scores(*inputs, scores, workspace)
    expected = torch.empty_like(scores)
    page_scores_ref(*inputs, expected)
    expect_close(scores, expected, "page_scores", MOST_ERROR)
    return [1e3 * s for s in seconds(functools.partial(page_scores, *inputs, scores, workspace))]
