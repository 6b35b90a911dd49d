"""Reference of causal attention of a prefill chunk over the request's dense pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gather_dense_ref(kv_cache: torch.Tensor, block_ids: torch.Tensor, num_tokens: int):
    """Collect the K and V of one request's dense blocks.

    Args:
        kv_cache: [num_blocks, num_kv_heads, page_size, 2 * head_dim] of one layer.
        block_ids: [num_request_blocks] int32.
        num_tokens: tokens to collect, at most num_request_blocks * page_size.

    Returns:
        (keys, values), each [num_kv_heads, num_tokens, head_dim].
    """
    _, num_kv_heads, _, width = kv_cache.shape
    kv = kv_cache[block_ids].transpose(0, 1).reshape(num_kv_heads, -1, width)[:, :num_tokens]
    return kv[..., : width // 2], kv[..., width // 2 :]


def prefill_attention_ref(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of the last tokens of a sequence over all of it.

    Args:
        query: [num_new_tokens, num_q_heads, head_dim], the last tokens of the sequence.
        keys, values: [num_kv_heads, num_tokens, head_dim].
        scale: softmax scale.

    Returns:
        [num_new_tokens, num_q_heads, head_dim]; query row i sees the first
        num_tokens - num_new_tokens + i + 1 tokens.
    """
    num_new, num_q_heads, _ = query.shape
    num_kv_heads, num_tokens, _ = keys.shape
    group = num_q_heads // num_kv_heads
    keys = keys.repeat_interleave(group, dim=0)
    values = values.repeat_interleave(group, dim=0)
    mask = None
    if num_new != num_tokens:
        mask = torch.ones(num_new, num_tokens, dtype=torch.bool, device=query.device)
        mask = mask.tril(diagonal=num_tokens - num_new)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return output[0].transpose(0, 1)
