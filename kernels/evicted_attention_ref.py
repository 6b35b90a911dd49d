"""What evicted tokens do to reference queries, in plain torch (kernel: evicted_attention.py).

B heads, T tokens of a prompt, N reference queries, D the size of a head. A share is attention on
one token divided by that on the whole prompt, and on the sink of the query head where it has one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_heterocache.kernels.soft_cap_ref import soft_capped_ref

# fp32 elements of one temporary: 64 MiB
BLOCK_ELEMENTS = 1 << 24


class EvictedAttention(NamedTuple):
    """The evicted tokens' part of the attention of N queries, in the dtype of the queries."""

    lse: torch.Tensor  # [B, N], log-sum-exp of the logits of all tokens, evicted or not, and sink
    share: torch.Tensor  # [B, N], sum of the evicted tokens' shares
    output: torch.Tensor  # [B, N, D], sum of their shares times their values
    importance: torch.Tensor  # [B, T], mean squared share of a token; -1 if it is not evicted


def evicted_attention_ref(
    keys: torch.Tensor,
    values: torch.Tensor,
    is_evicted: torch.Tensor,
    queries: torch.Tensor,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    block_elements: int = BLOCK_ELEMENTS,
) -> EvictedAttention:
    """A block of tokens at a time.

    Args:
        keys: [B, T, D], any float dtype, after RoPE.
        values: [B, T, D], any float dtype; those of tokens that are not evicted are not used.
        is_evicted: [B, T] bool.
        queries: [B, N, D], fp32 or fp64, after RoPE, times the softmax scale.
        sink_logits: [B, N] in the dtype of the queries: one more logit of each query, without a
            value; None: no sinks.
        soft_cap: of the logits (soft_cap_ref.py); 0: none.
        block_elements: bound of a temporary over tokens, in elements.
    """
    blocks = _token_blocks(keys, queries, block_elements)
    lse = queries.new_full(queries.shape[:2], -torch.inf) if sink_logits is None else sink_logits
    for tokens in blocks:
        lse = torch.logaddexp(lse, logits(queries, keys[:, tokens], soft_cap).logsumexp(-1))
    share, output = torch.zeros_like(lse), torch.zeros_like(queries)
    importance = queries.new_empty(is_evicted.shape)
    for tokens in blocks:
        is_mine = is_evicted[:, tokens]
        shares = logits(queries, keys[:, tokens], soft_cap).sub_(lse[..., None]).exp_()
        shares.mul_(is_mine[:, None])
        share += shares.sum(-1)
        # 0 times whatever stands in a value that is not evicted would not be 0
        mine = values[:, tokens].to(queries.dtype).masked_fill(~is_mine[..., None], 0)
        output.baddbmm_(shares, mine)
        importance[:, tokens] = shares.square_().mean(1).masked_fill_(~is_mine, -1)
    return EvictedAttention(lse, share, output, importance)


def logits(queries: torch.Tensor, keys: torch.Tensor, soft_cap: float = 0.0) -> torch.Tensor:
    """[B, N, m], in the dtype of the queries [B, N, D]; of keys [B, m, D] of any dtype."""
    return soft_capped_ref(queries @ keys.to(queries.dtype).mT, soft_cap)


def _token_blocks(keys: torch.Tensor, queries: torch.Tensor, block_elements: int) -> list[slice]:
    """Blocks of tokens whose logits for all heads and queries have `block_elements` or fewer."""
    num_heads, num_tokens, _ = keys.shape
    size = max(1, block_elements // (num_heads * queries.shape[1]))
    return [slice(first, first + size) for first in range(0, num_tokens, size)]
