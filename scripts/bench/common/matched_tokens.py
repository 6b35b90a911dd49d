"""`match_tokens` for one layer of a prompt, and its parts."""

from __future__ import annotations

import functools
from typing import Any

import torch

from common.cells import PAGE, D, G, H
from common.timing import DEVICE, expect, seconds
from vllm_heterocache.heads.matched_tokens import MOST_PAGES
from vllm_heterocache.kernels.matched_tokens import (
    attention_lse,
    choose_keys,
    evicted_attention,
    fit_chosen,
    match_tokens,
)

POSITIONS = 128  # of reference queries
BUDGET, SHARE = 0.1, 0.5
MOST_ERROR = 0.3  # of the attention that evicted tokens took
LENGTHS, TINY_LENGTHS = (32768, 131072), (1024,)


def matched_row(num_tokens: int, num_layers: int = 32) -> dict[str, Any]:
    """All heads of a layer at once, in ms for `num_layers` of them; every second page is evicted.

    Keys are random walks, so that neighbours resemble one another as those of a text do.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16
    steps = torch.randn(H, num_tokens, D, device=DEVICE) * 0.1
    keys = (steps.cumsum(1) / torch.arange(1, num_tokens + 1, device=DEVICE).sqrt()[:, None]).to(
        dtype
    )
    keys += torch.randn_like(keys)
    values = torch.randn(H, num_tokens, D, device=DEVICE, dtype=dtype)
    queries = torch.randn(H, POSITIONS * G, D, device=DEVICE) * D**-0.5
    page = torch.arange(num_tokens, device=DEVICE) // PAGE
    is_evicted = (page % 2 == 0).expand(H, -1).contiguous()
    pages = min(MOST_PAGES, int(BUDGET * SHARE * num_tokens / PAGE))
    num_matched = max(1, pages) * PAGE

    lse = attention_lse(keys, queries)
    gone = evicted_attention(keys, values, is_evicted, queries, lse)
    chosen, present = choose_keys(keys, queries, lse, gone.importance, num_matched)
    fit = functools.partial(fit_chosen, keys, values, queries, lse, gone, chosen, present)
    matched = fit()
    shares = (queries @ matched.keys.mT + matched.bias[:, None] - lse[..., None]).exp().sum(-1)
    error = (shares - gone.share).norm() / gone.share.norm()
    expect(bool(error < MOST_ERROR), f"match_tokens (attention off by {error:.3f})")
    parts = {
        "lse": functools.partial(attention_lse, keys, queries),
        "evicted": functools.partial(evicted_attention, keys, values, is_evicted, queries, lse),
        "choice": functools.partial(choose_keys, keys, queries, lse, gone.importance, num_matched),
        "fit": fit,
        "whole": functools.partial(match_tokens, keys, values, is_evicted, queries, num_matched),
    }
    times = {name: [num_layers * 1e3 * s for s in seconds(call)] for name, call in parts.items()}
    return {
        "benchmark": "matched_tokens",
        "cell": f"1x{num_tokens // 1024}K, {num_layers} layers",
        "config": {"num_matched": num_matched, "queries": POSITIONS * G},
        **{f"{name}_ms": time for name, time in times.items()},
        "values": "median, 90th and 10th percentile of the time",
    }
