"""Reference of causal attention of a prefill chunk over the request's dense pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_heterocache.kernels.soft_cap_ref import soft_capped_ref

# fp32 elements of one temporary: 16 MiB
BLOCK_ELEMENTS = 1 << 22


def prefill_attention_ref(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    block_elements: int = BLOCK_ELEMENTS,
) -> torch.Tensor:
    """Causal attention of the last tokens of a sequence over all of it.

    Args:
        query: [num_new_tokens, num_q_heads, head_dim], the last tokens of the sequence.
        keys, values: [num_kv_heads, num_tokens, head_dim], in a dtype of their own, in which
            attention is computed.
        scale: softmax scale.
        sink_logits: [num_q_heads], any float dtype: one more logit of each head, which takes weight
            and has no value; None: heads without sinks.
        soft_cap: of the logits (soft_cap_ref.py); 0: none.
        block_elements: bound of the logits of a block of queries, with sinks or a soft cap.

    Returns:
        [num_new_tokens, num_q_heads, head_dim] in the query's dtype; query row i sees the first
        num_tokens - num_new_tokens + i + 1 tokens.
    """
    if sink_logits is not None or soft_cap:
        return _by_blocks(query, keys, values, scale, sink_logits, soft_cap, block_elements)
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


def _by_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    sink_logits: torch.Tensor | None,
    soft_cap: float,
    block_elements: int,
) -> torch.Tensor:
    """The same where torch has no operation for it: logits of a block of queries at a time, in
    fp32 at least."""
    num_new, num_q_heads, head_dim = query.shape
    num_kv_heads, num_tokens, _ = keys.shape
    dtype = torch.promote_types(keys.dtype, torch.float32)
    keys, values = keys.to(dtype), values.to(dtype)
    grouped = query.to(dtype).view(num_new, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3) * scale
    output = torch.empty_like(query)
    token = torch.arange(num_tokens, device=query.device)
    step = max(1, block_elements // (num_q_heads * num_tokens))
    for first in range(0, num_new, step):
        last = min(first + step, num_new)
        seen = num_tokens - num_new + last
        logits = grouped[:, :, first:last] @ keys[:, None, :seen].mT  # [H, G, n, seen]
        logits = soft_capped_ref(logits, soft_cap)
        own = torch.arange(seen - (last - first), seen, device=query.device)
        logits = logits.masked_fill(token[:seen] > own[:, None], -torch.inf)
        total = logits.logsumexp(-1, keepdim=True)
        if sink_logits is not None:
            total = total.logaddexp(sink_logits.to(dtype).view(num_kv_heads, -1, 1, 1))
        of_block = (logits - total).exp_() @ values[:, None, :seen]  # [H, G, n, D]
        output[first:last] = of_block.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return output
