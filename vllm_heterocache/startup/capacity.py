"""How many requests a pool holds once their prompts are compacted."""

from __future__ import annotations

from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.startup.serving_plan import serving_policy


def steady_state_requests(
    num_blocks: int, num_tokens: int, gpu_budget: float, page_size: int, frees_prompt: bool = True
) -> tuple[int, int]:
    """Requests of `num_tokens` prompt tokens that fit at once: (compacted, stock vLLM).

    Where the policy frees nothing they are as many as in stock vLLM. Else a compacted prompt
    keeps N_c blocks and its partial last block, and the last request to come in needs, for the
    time of its prefill, its dense blocks as well.
    """
    usable = num_blocks - 1  # block 0 is vLLM's null block
    dense = -(-num_tokens // page_size)
    if not frees_prompt:
        return usable // dense, usable // dense
    kept = compact_blocks(num_tokens, gpu_budget, page_size) + (num_tokens % page_size > 0)
    peak = dense + compact_blocks(num_tokens, gpu_budget, page_size)
    compacted = 0 if peak > usable else 1 + (usable - peak) // kept
    return compacted, usable // dense


def steady_state_line(num_blocks: int, max_model_len: int, config: HeteroCacheConfig) -> str:
    """The start-up line: tokens and requests of max_model_len in steady state, against stock."""
    assert config.compact_min_tokens is not None, "set by the plugin"
    if not serving_policy(config).frees_prompt:
        stock, _ = steady_state_requests(
            num_blocks, max_model_len, config.gpu_budget, PAGE_SIZE, frees_prompt=False
        )
        return (
            f"HeteroCache: policy {config.policy} frees no memory: {num_blocks:,} KV blocks keep "
            f"{(num_blocks - 1) * PAGE_SIZE:,} tokens, {stock} requests of "
            f"{max_model_len:,} tokens at once, as in stock vLLM. Each decode step reads "
            f"gpu_budget={config.gpu_budget:g} of a prompt; prompts below "
            f"{config.compact_min_tokens} tokens are read whole."
        )
    compacted, stock = steady_state_requests(
        num_blocks, max_model_len, config.gpu_budget, PAGE_SIZE
    )
    tokens = (num_blocks - 1) * PAGE_SIZE
    kept = int(tokens / config.gpu_budget)
    if max_model_len < config.compact_min_tokens:  # no prompt is ever compacted
        compacted, kept = stock, tokens
    return (
        f"HeteroCache: gpu_budget={config.gpu_budget:g} keeps about {kept:,} prompt tokens in "
        f"{num_blocks:,} KV blocks (stock vLLM: {tokens:,}); requests of {max_model_len:,} tokens "
        f"at once: {compacted} (stock: {stock}). Prompts below {config.compact_min_tokens} tokens "
        "stay dense."
    )
