"""Prompts some of whose tokens are evicted, for the tests of `evicted_attention`."""

from __future__ import annotations

import torch


def make_evicted_case(generator, num_heads, num_tokens, num_queries, head_dim, dtype=torch.float32):
    """Keys, values, flags and queries, on the CPU.

    Keys and values are halves of rows, as they lie in the pool; a value that stays is NaN.
    """
    kv = torch.randn(num_heads, num_tokens, 2 * head_dim, generator=generator)
    is_evicted = torch.rand(num_heads, num_tokens, generator=generator) < 0.6
    kv[..., head_dim:].masked_fill_(~is_evicted[..., None], torch.nan)
    queries = 2 * torch.randn(num_heads, num_queries, head_dim, generator=generator) / head_dim**0.5
    keys, values = kv.to(dtype).split(head_dim, dim=2)
    return keys, values, is_evicted, queries
