"""How much the pools hold: requests in the KV pool, blocks in the host pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.budget import compact_blocks, whole_blocks
from vllm_heterocache.kv_cache_dtype import element_bytes
from vllm_heterocache.refusal import Sentence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_heterocache.compat.other_groups import OtherGroup
    from vllm_heterocache.heads.assignment import HeadAssignment
    from vllm_heterocache.startup.serving_plan import ServingPlan


def steady_state_requests(
    num_blocks: int,
    num_tokens: int,
    gpu_budget: float,
    block_size: int = PAGE_SIZE,
    frees_prompt: bool = True,
    others: Sequence[OtherGroup] = (),
) -> tuple[int, int]:
    """Requests of `num_tokens` prompt tokens that fit at once: (compacted, stock vLLM).

    Where the policy frees nothing they are as many as in stock vLLM. Else a compacted prompt
    keeps the blocks of N_c kernel blocks and its partial last block, and the last request to come
    in needs, for the time of its prefill, its dense blocks as well. Blocks of `others`, KV-cache
    groups that vLLM serves, are those of stock vLLM.
    """
    usable = num_blocks - 1  # block 0 is vLLM's null block
    in_decode = sum(group.decode_blocks(num_tokens) for group in others)
    in_prefill = sum(group.prefill_blocks(num_tokens) for group in others)
    dense = -(-num_tokens // block_size)
    stock = requests_at_once(usable, dense + in_prefill, dense + in_decode)
    if not frees_prompt:
        return stock, stock
    compact = whole_blocks(compact_blocks(num_tokens, gpu_budget), block_size)
    kept = compact + (num_tokens % block_size > 0) + in_decode
    return requests_at_once(usable, dense + compact + in_prefill, kept), stock


def requests_at_once(usable: int, peak: int, kept: int) -> int:
    """Requests that keep so many blocks each, the last of which has `peak` blocks in prefill."""
    return 0 if peak > usable else 1 + (usable - peak) // kept


def _others_line(others: Sequence[OtherGroup], max_model_len: int) -> str:
    """What groups that vLLM serves keep: sentences, each behind a blank."""
    sliding = [group for group in others if group.window is not None]
    recurrent = [group for group in others if group.num_states is not None]
    lines = [
        f" A drafter's layers keep the whole KV, in a block for each {group.block_size} tokens."
        for group in others
        if group.is_of_drafter
    ]
    if recurrent:
        blocks = sum(group.decode_blocks(max_model_len) for group in recurrent)
        lines.append(f" Recurrent layers keep {blocks} more blocks a request.")
    if sliding:
        windows = " and ".join(str(window) for window in sorted({g.window or 0 for g in sliding}))
        blocks = sum(group.decode_blocks(max_model_len) for group in sliding)
        lines.append(
            f" Layers with a window of {windows} tokens keep {blocks} more blocks a request."
        )
    return "".join(lines)


def steady_state_line(
    num_blocks: int,
    max_model_len: int,
    plan: ServingPlan,
    others: Sequence[OtherGroup] = (),
    block_size: int = PAGE_SIZE,
) -> str:
    """The start-up line: tokens and requests of max_model_len in steady state, against stock.

    Args:
        others: KV-cache groups beside the one that is served here.
    """
    config, places = plan.config, (num_blocks - 1) * block_size
    # blocks of other groups for each block of a prompt
    share = sum(
        block_size / group.block_size
        if group.is_of_drafter
        else group.decode_blocks(max_model_len) * block_size / max_model_len
        for group in others
    )
    tokens = int(places / (1 + share))
    line_of_others = _others_line(others, max_model_len)
    if not plan.policy.frees_prompt:
        stock, _ = steady_state_requests(
            num_blocks,
            max_model_len,
            config.gpu_budget,
            block_size,
            frees_prompt=False,
            others=others,
        )
        return (
            f"HeteroCache: policy {config.policy} frees no memory: {num_blocks:,} KV blocks keep "
            f"{tokens:,} tokens, {stock} requests of "
            f"{max_model_len:,} tokens at once, as in stock vLLM. Each decode step reads "
            f"gpu_budget={config.gpu_budget:g} of a prompt; prompts below "
            f"{plan.compact_min_tokens} tokens are read whole.{line_of_others}"
        )
    compacted, stock = steady_state_requests(
        num_blocks, max_model_len, config.gpu_budget, block_size, others=others
    )
    kept = int(places / (config.gpu_budget + share))
    shortest = plan.shortest_compacted(block_size)
    if max_model_len < shortest:  # no prompt is ever compacted
        compacted, kept = stock, tokens
    return (
        f"HeteroCache: gpu_budget={config.gpu_budget:g} keeps about {kept:,} prompt tokens in "
        f"{num_blocks:,} KV blocks (stock vLLM: {tokens:,}); requests of {max_model_len:,} tokens "
        f"at once: {compacted} (stock: {stock}). Prompts below {shortest} tokens "
        f"stay dense.{line_of_others}"
    )


def nothing_compacted(
    max_model_len: int, plan: ServingPlan, block_size: int = PAGE_SIZE
) -> Sentence | None:
    """The warning of a start where every prompt stays dense; None for other starts."""
    config, shortest = plan.config, plan.shortest_compacted(block_size)
    if config.keeps_everything or max_model_len >= shortest:
        return None
    if config.min_prompt_tokens == shortest:
        cause, fix = f"min_prompt_tokens={config.min_prompt_tokens}", "lower it"
    elif plan.compact_min_tokens < shortest:
        cause = (
            f"gpu_budget={config.gpu_budget:g}, as shorter ones save none of their blocks of "
            f"{block_size} tokens"
        )
        fix = "lower gpu_budget"
    else:
        cause = (
            f"gpu_budget={config.gpu_budget:g} with {config.min_pages} pages or more in every "
            "compressed head"
        )
        fix = "raise gpu_budget, lower sink_pages or recent_pages"
    return Sentence(
        f"HeteroCache compacts no prompt: prompts below {shortest} tokens stay dense by {cause}",
        f"{fix}, or raise --max-model-len ({max_model_len})",
    )


def page_bytes(vllm_config: Any, head_size: int) -> int:
    """Bytes of a page, of K and V of one head, in the KV cache of this config."""
    return 2 * PAGE_SIZE * head_size * element_bytes(vllm_config)


# Automatic sizing takes at most this share of the memory that is free on the host at start-up.
MAX_HOST_SHARE = 0.25


def host_pool_blocks(
    config: HeteroCacheConfig,
    assignment: HeadAssignment,
    wanted_blocks: int,
    page_bytes: int,
    available_bytes: int,
) -> int:
    """Blocks of one worker's host pool, each a page of every satellite or finder; 0 where
    nothing is ever fetched back.

    Args:
        assignment: the roles of this worker's heads.
        wanted_blocks: what automatic sizing aims at, within MAX_HOST_SHARE of the free memory.
        page_bytes: bytes of a page.
        available_bytes: memory free on the host for this worker.
    """
    if not assignment.num_led or not config.watches_drift:
        return 0
    block_bytes = assignment.num_led * page_bytes
    if config.cpu_pool_gib is not None:
        return int(config.cpu_pool_gib * 2**30) // block_bytes
    return min(wanted_blocks, int(available_bytes * MAX_HOST_SHARE) // block_bytes)
