"""Reference of page scores: the attention mass of a prompt's last queries on its pages."""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.kv_scales import KVScales, check_scales, logit_scales
from vllm_heterocache.kernels.soft_cap_ref import soft_capped_ref
from vllm_heterocache.kernels.tables import layer_page_ids


def page_scores_ref(
    queries: torch.Tensor,
    pages: torch.Tensor,
    dense_blocks: torch.Tensor,
    num_tokens: int,
    scale: float,
    out: torch.Tensor,
    kv_scales: KVScales | None = None,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Score the full pages of a dense prompt by some query rows of each KV head, in fp32.

    The softmax runs over all tokens of the prompt, those of a partial last page included, and over
    the head's sink; only full pages are scored. Sinks matter, because a score is the largest over
    query heads, each of which has a sink of its own.

    Args:
        queries: [L, H * G, D], the G rows of a KV head behind one another. They ask from behind the
            prompt: query heads of its last token, or of more tokens.
        pages: [num_pages, page_size, 2 * D], K then V; page (b * L + l) * H + h is that of block
            b, layer l, KV head h.
        dense_blocks: [at least the pages of the prompt, a partial last one included] integer
            block ids, in token order.
        num_tokens: T, tokens of the prompt.
        scale: softmax scale.
        out: [L, H, T // page_size] fp32, written: the largest mass over the rows.
        kv_scales: of fp8 pages.
        sink_logits: [L, H * G], of the rows, any float dtype; None: heads without sinks.
        soft_cap: of the logits (soft_cap_ref.py); 0: none.
    """
    num_layers, num_kv_heads, num_full = out.shape
    page_size, head_dim = pages.shape[1], pages.shape[2] // 2
    assert num_full == num_tokens // page_size
    check_scales(pages, kv_scales, out.shape[:2])
    blocks = dense_blocks[: -(-num_tokens // page_size)]
    for layer in range(num_layers):
        ids = layer_page_ids(blocks, layer, num_layers, num_kv_heads)
        keys = pages[..., :head_dim][ids].flatten(1, 2)[:, :num_tokens].float()  # [H, T, D]
        query = queries[layer].float().view(num_kv_heads, -1, head_dim)  # [H, G, D]
        query = query * logit_scales(scale, kv_scales, layer)
        logits = soft_capped_ref(torch.matmul(query, keys.transpose(1, 2)), soft_cap)  # [H, G, T]
        total = logits.logsumexp(dim=-1, keepdim=True)
        if sink_logits is not None:
            total = total.logaddexp(sink_logits[layer].float().view(total.shape))
        weights = (logits - total).exp_()
        masses = weights[..., : num_full * page_size].unflatten(-1, (num_full, page_size)).sum(-1)
        out[layer] = masses.amax(dim=1)
