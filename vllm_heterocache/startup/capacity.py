"""How much the pools hold: requests in the KV pool, blocks in the host pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.budget import compact_blocks

if TYPE_CHECKING:
    from vllm_heterocache.startup.serving_plan import ServingPlan


def steady_state_requests(
    num_blocks: int,
    num_tokens: int,
    gpu_budget: float,
    page_size: int = PAGE_SIZE,
    frees_prompt: bool = True,
    drafter_block: int | None = None,
) -> tuple[int, int]:
    """Requests of `num_tokens` prompt tokens that fit at once: (compacted, stock vLLM).

    Where the policy frees nothing they are as many as in stock vLLM. Else a compacted prompt
    keeps N_c blocks and its partial last block, and the last request to come in needs, for the
    time of its prefill, its dense blocks as well. The layers of a drafter keep all blocks of
    `drafter_block` tokens, in stock vLLM too.
    """
    usable = num_blocks - 1  # block 0 is vLLM's null block
    drafter = 0 if drafter_block is None else -(-num_tokens // drafter_block)
    dense = -(-num_tokens // page_size) + drafter
    if not frees_prompt:
        return usable // dense, usable // dense
    compact = compact_blocks(num_tokens, gpu_budget, page_size)
    kept = compact + (num_tokens % page_size > 0) + drafter
    peak = dense + compact
    compacted = 0 if peak > usable else 1 + (usable - peak) // kept
    return compacted, usable // dense


def steady_state_line(
    num_blocks: int, max_model_len: int, plan: ServingPlan, drafter_block: int | None = None
) -> str:
    """The start-up line: tokens and requests of max_model_len in steady state, against stock.

    Args:
        drafter_block: tokens of a block of a drafter's own layers; None where there are none.
    """
    config, places = plan.config, (num_blocks - 1) * PAGE_SIZE
    share = 0.0 if drafter_block is None else PAGE_SIZE / drafter_block  # blocks of the drafter
    tokens = int(places / (1 + share))
    drafter = (
        ""
        if drafter_block is None
        else f" A drafter's layers keep the whole KV, in a block for each {drafter_block} tokens."
    )
    if not plan.policy.frees_prompt:
        stock, _ = steady_state_requests(
            num_blocks,
            max_model_len,
            config.gpu_budget,
            PAGE_SIZE,
            frees_prompt=False,
            drafter_block=drafter_block,
        )
        return (
            f"HeteroCache: policy {config.policy} frees no memory: {num_blocks:,} KV blocks keep "
            f"{tokens:,} tokens, {stock} requests of "
            f"{max_model_len:,} tokens at once, as in stock vLLM. Each decode step reads "
            f"gpu_budget={config.gpu_budget:g} of a prompt; prompts below "
            f"{plan.compact_min_tokens} tokens are read whole.{drafter}"
        )
    compacted, stock = steady_state_requests(
        num_blocks, max_model_len, config.gpu_budget, drafter_block=drafter_block
    )
    kept = int(places / (config.gpu_budget + share))
    if max_model_len < plan.compact_min_tokens:  # no prompt is ever compacted
        compacted, kept = stock, tokens
    return (
        f"HeteroCache: gpu_budget={config.gpu_budget:g} keeps about {kept:,} prompt tokens in "
        f"{num_blocks:,} KV blocks (stock vLLM: {tokens:,}); requests of {max_model_len:,} tokens "
        f"at once: {compacted} (stock: {stock}). Prompts below {plan.compact_min_tokens} tokens "
        f"stay dense.{drafter}"
    )


def nothing_compacted(max_model_len: int, plan: ServingPlan) -> str | None:
    """The warning of a start where every prompt stays dense; None for other starts."""
    config, shortest = plan.config, plan.compact_min_tokens
    if config.keeps_everything or max_model_len >= shortest:
        return None
    cause = (
        f"min_prompt_tokens={config.min_prompt_tokens}; lower it"
        if config.min_prompt_tokens == shortest
        else f"gpu_budget={config.gpu_budget:g} with {config.min_pages} pages or more in every "
        "compressed head; raise gpu_budget, lower sink_pages or recent_pages"
    )
    return (
        f"HeteroCache compacts no prompt: prompts below {shortest} tokens stay dense by {cause}, "
        f"or raise --max-model-len ({max_model_len})."
    )


# Automatic sizing takes at most this share of the memory that is free on the host at start-up.
MAX_HOST_SHARE = 0.25


def num_satellites(assignment: HeadAssignment) -> int:
    return assignment.count(HeadRole.SATELLITE)


def host_pool_blocks(
    config: HeteroCacheConfig,
    assignment: HeadAssignment,
    wanted_blocks: int,
    page_bytes: int,
    available_bytes: int,
) -> int:
    """Blocks of one worker's host pool, each a page of every satellite; 0 where nothing is ever
    fetched back.

    Args:
        assignment: the roles of this worker's heads.
        wanted_blocks: what automatic sizing aims at, within MAX_HOST_SHARE of the free memory.
        page_bytes: bytes of a page.
        available_bytes: memory free on the host for this worker.
    """
    if not num_satellites(assignment) or not config.watches_drift:
        return 0
    block_bytes = num_satellites(assignment) * page_bytes
    if config.cpu_pool_gib is not None:
        return int(config.cpu_pool_gib * 2**30) // block_bytes
    return min(wanted_blocks, int(available_bytes * MAX_HOST_SHARE) // block_bytes)
