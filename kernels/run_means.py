"""Means of runs of evicted pages, beside which matched tokens are fitted, in plain torch.

A token that no reference query looks at is in no matched token. Means stand for every evicted
token, if only roughly. So a few of them are kept, and matched tokens do what means do not do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_heterocache.kernels.evicted_attention_ref import logits
from vllm_heterocache.kernels.matched_tokens import ABSENT_BIAS, Candidates
from vllm_heterocache.kernels.values import PAGE_SIZE


class RunMeans(NamedTuple):
    """Means that B heads keep, n at most."""

    keys: torch.Tensor  # [B, n, D] fp32
    values: torch.Tensor  # [B, n, D] fp32
    bias: torch.Tensor  # [B, n] fp32, ln of the tokens of a run; ABSENT_BIAS where there is none


def run_means(
    kv: torch.Tensor, is_evicted: torch.Tensor, counts: torch.Tensor, most: int
) -> RunMeans:
    """The evicted pages of a head, in order, are divided into runs, whose lengths differ by a page.

    Args:
        kv: [B, P, PAGE_SIZE, 2 * D], any float dtype; pages that are not evicted are not used.
        is_evicted: [B, P] bool.
        counts: [B] int64, runs of each head. A run that finds no page is absent.
        most: n, the largest of them.
    """
    number = torch.arange(most, device=kv.device)
    num_evicted, counts = is_evicted.sum(1, keepdim=True), counts[:, None]
    run = (is_evicted.cumsum(1) * counts - 1) // num_evicted.clamp(min=1)
    is_of_run = (run[:, None] == number[:, None]) & is_evicted[:, None]  # [B, n, P]
    if kv.itemsize == 1:  # torch adds no fp8
        kv = kv.to(torch.bfloat16)
    sums = kv.sum(2, dtype=torch.float32).masked_fill(~is_evicted[..., None], 0)
    num_pages = is_of_run.sum(2)
    means = is_of_run.float() @ sums / (PAGE_SIZE * num_pages.clamp(min=1))[..., None]
    bias = (PAGE_SIZE * num_evicted / counts.clamp(min=1)).log().expand(num_pages.shape)
    bias = bias.masked_fill((num_pages == 0) | (number >= counts), ABSENT_BIAS)
    keys, values = means.chunk(2, dim=2)
    return RunMeans(keys, values, bias)


def beside_means(
    found: Candidates, queries: torch.Tensor, means: RunMeans, soft_cap: float = 0.0
) -> Candidates:
    """The same candidates, of which is asked what the means do not do; a share is 0 at least.

    Args:
        queries: [B, N, D] fp32, as in `match_tokens`.
        soft_cap: of the logits (soft_cap_ref.py); 0: none.
    """
    of_means = logits(queries, means.keys, soft_cap) + means.bias[:, None]
    shares = (of_means - found.lse[..., None]).exp_()
    return found._replace(
        share=(found.share - shares.sum(2)).clamp_(min=0),
        output=found.output - shares @ means.values,
    )
