"""Reference of causal attention of a prefill chunk over the request's dense pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def prefill_attention_ref(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of the last tokens of a sequence over all of it.

    Args:
        query: [num_new_tokens, num_q_heads, head_dim], the last tokens of the sequence.
        keys, values: [num_kv_heads, num_tokens, head_dim], in a dtype of their own, in which
            attention is computed.
        scale: softmax scale.

    Returns:
        [num_new_tokens, num_q_heads, head_dim] in the query's dtype; query row i sees the first
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
        query.transpose(0, 1)[None].to(keys.dtype),
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return output[0].transpose(0, 1).to(query.dtype)
