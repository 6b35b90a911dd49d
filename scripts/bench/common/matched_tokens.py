"""`match_tokens` for a prompt, as many heads at a time as the engine fits, and its halves."""

from __future__ import annotations

import functools
from typing import Any

import torch

from common.cells import PAGE, D, G, H
from common.timing import DEVICE, expect, seconds
from vllm_heterocache.heads.matched_tokens import most_pages
from vllm_heterocache.kernels.bounded_least_squares import bounded_least_squares
from vllm_heterocache.kernels.evicted_attention import evicted_attention
from vllm_heterocache.kernels.matched_tokens import (
    REFERENCE,
    MatchKernels,
    find_candidates,
    fit_bytes,
    match_candidates,
    match_tokens,
)
from vllm_heterocache.worker.stand_ins.matched_tokens import MOST_BYTES

POSITIONS = 128  # of reference queries
BUDGET, SHARE = 0.1, 0.5
MOST_ERROR = 0.3  # of the attention that evicted tokens took
NUM_HEADS = 32 * H
LENGTHS, TINY = (32768, 131072), (1024, 2)  # tokens; tokens and heads
# The interpreter takes minutes for them.
KERNELS = (
    MatchKernels(evicted_attention, bounded_least_squares) if DEVICE.type == "cuda" else REFERENCE
)


def matched_row(num_tokens: int, num_heads: int = NUM_HEADS) -> dict[str, Any]:
    """In ms for `num_heads` heads, of which every second page is evicted.

    Keys are random walks, so that neighbours resemble one another as those of a text do.
    """
    torch.manual_seed(0)
    pages = min(most_pages(G, BUDGET), int(BUDGET * SHARE * num_tokens / PAGE))
    num_matched = max(1, pages) * PAGE
    at_a_time = min(num_heads, MOST_BYTES // fit_bytes(POSITIONS * G, D, num_matched))
    kv = torch.randn(at_a_time, num_tokens, 2 * D, device=DEVICE, dtype=torch.bfloat16)
    keys, values = kv.split(D, dim=2)
    walk = torch.randn(num_tokens, D, device=DEVICE).cumsum(0) / 10
    keys += (walk / torch.arange(1, num_tokens + 1, device=DEVICE).sqrt()[:, None]).bfloat16()
    queries = torch.randn(at_a_time, POSITIONS * G, D, device=DEVICE) * D**-0.5
    page = torch.arange(num_tokens, device=DEVICE) // PAGE
    is_evicted = (page % 2 == 0).expand(at_a_time, -1).contiguous()

    case = keys, values, is_evicted, queries, num_matched
    found = find_candidates(*case, KERNELS)
    matched = match_candidates(found, queries, num_matched, kernels=KERNELS)
    shares = (queries @ matched.keys.mT + matched.bias[:, None] - found.lse[..., None]).exp()
    error = (shares.sum(-1) - found.share).norm() / found.share.norm()
    expect(bool(error < MOST_ERROR), f"match_tokens (attention off by {error:.3f})")
    halves = {
        "candidates": functools.partial(find_candidates, *case, KERNELS),
        "match": functools.partial(match_candidates, found, queries, num_matched, kernels=KERNELS),
        "whole": functools.partial(match_tokens, *case, kernels=KERNELS),
    }
    scale = 1e3 * num_heads / at_a_time
    times = {name: [scale * s for s in seconds(call)] for name, call in halves.items()}
    return {
        "benchmark": "matched_tokens",
        "cell": f"1x{num_tokens // 1024}K, {num_heads} heads",
        "config": {
            "num_matched": num_matched,
            "queries": POSITIONS * G,
            "heads_at_a_time": at_a_time,
        },
        **{f"{name}_ms": time for name, time in times.items()},
        "values": "median, 90th and 10th percentile of the time",
    }
