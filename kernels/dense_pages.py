"""K and V of a request whose prompt lies in the dense blocks of its block table."""

from __future__ import annotations

import torch


def gather_dense(
    kv_cache: torch.Tensor,
    block_ids: torch.Tensor,
    num_tokens: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Collect the K and V of one request's dense blocks.

    Args:
        kv_cache: [num_blocks, num_kv_heads, page_size, 2 * head_dim] of one layer.
        block_ids: [num_request_blocks] int32.
        num_tokens: tokens to collect, at most num_request_blocks * page_size.
        scales: of an fp8 cache, those of keys and those of values, [num_kv_heads] fp32 each.

    Returns:
        (keys, values), each [num_kv_heads, num_tokens, head_dim]; of an fp8 cache in fp32.
    """
    _, num_kv_heads, _, width = kv_cache.shape
    kv = kv_cache[block_ids].transpose(0, 1).reshape(num_kv_heads, -1, width)[:, :num_tokens]
    keys, values = kv.chunk(2, dim=-1)
    if scales is None:
        return keys, values
    of_keys, of_values = (one[:, None, None] for one in scales)
    return keys.float() * of_keys, values.float() * of_values
