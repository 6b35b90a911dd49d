"""Reference of step selection by one-bit keys: the pages of the tokens with the largest logits.

For requests whose whole prompt stays in its dense blocks, as `step_select_ref`. A key of one bit a
channel is the least or the largest key of its page, whichever is nearer: with the page's summaries
as zero point and scale, keys are rounded to nearest in groups of a page.
"""

from __future__ import annotations

import torch

from vllm_heterocache.kernels.page_summaries_ref import CHUNK_BLOCKS
from vllm_heterocache.kernels.step_select_ref import fill_lists, partly_read_prompts
from vllm_heterocache.kernels.tables import DecodeRows, PageTables, StepTables
from vllm_heterocache.kernels.top_pages_ref import signed_keys_ref
from vllm_heterocache.kernels.values import PAGE_SIZE, Protected


def page_bits_ref(
    pages: torch.Tensor, blocks: torch.Tensor, pages_per_block: int, step: StepTables
) -> None:
    """Note the bits of all keys of some blocks, whose summaries are written.

    Args:
        pages: [num_pages, PAGE_SIZE, 2 * D], K then V.
        blocks: [n] integer ids of full blocks.
        pages_per_block: layers times KV heads.
        step: `bits` is written at the pages of these blocks. A key in the middle is the least.
    """
    assert step.bits is not None
    head_dim = pages.shape[2] // 2
    within = torch.arange(pages_per_block, device=pages.device)
    powers = 1 << (torch.arange(PAGE_SIZE, device=pages.device) % 8)
    for some in blocks.long().split(CHUNK_BLOCKS):
        ids = (some[:, None] * pages_per_block + within).flatten()
        least, largest = _summaries(step, ids)
        is_large = 2 * _keys(pages, ids, head_dim) > (least + largest)[:, None]
        bits = (is_large * powers[:, None]).view(-1, 2, PAGE_SIZE // 2, head_dim).sum(2)
        step.bits[ids] = bits.transpose(1, 2).flatten(1).to(torch.uint8)  # [n, D * 2]


def one_bit_keys_ref(step: StepTables, page_ids: torch.Tensor) -> torch.Tensor:
    """[..., PAGE_SIZE, D] fp32: the keys that the bits of pages [...] int64 stand for."""
    assert step.bits is not None
    least, largest = _summaries(step, page_ids)
    bits = step.bits[page_ids].unflatten(-1, (-1, 2)).transpose(-1, -2)  # [..., 2, D]
    shifts = torch.arange(PAGE_SIZE // 2, dtype=torch.uint8, device=bits.device)
    is_large = (bits[..., None, :] >> shifts[:, None] & 1).bool().flatten(-3, -2)
    return torch.where(is_large, largest[..., None, :], least[..., None, :])


def one_bit_step_select_ref(
    query: torch.Tensor,
    tables: PageTables,
    step: StepTables,
    rows: DecodeRows,
    layer: int,
    protected: Protected,
) -> None:
    """Fill the lists of one layer with the pages of the largest one-bit logits.

    The score of page p for KV head h is `max_g max_{t in p} q_g . k_t`, where k_t is the one-bit
    key of token t. Lists, protected pages and rows are those of `step_select_ref`.

    Args:
        query: [num_rows, num_q_heads, D].
        tables: `entries` and `positions` of the lists are written; `count` says how long they are.
        step: `summaries` and `bits` are read; `keys` is a workspace. Summaries of fp8 pages need no
            scale.
        rows: the block table names the prompt's dense blocks.
        layer: index of this layer in a block.
        protected: pages that come before all others.
    """
    num_kv_heads, head_dim = tables.count.shape[2], query.shape[2]
    for prompt in partly_read_prompts(tables, rows, layer):
        keys = one_bit_keys_ref(step, prompt.page_ids)  # [H, P, PAGE_SIZE, D]
        grouped = query[prompt.row].float().view(num_kv_heads, -1, head_dim)
        logits = grouped @ keys.flatten(1, 2).transpose(1, 2)  # [H, G, P * PAGE_SIZE]
        scores = logits.unflatten(2, keys.shape[1:3]).amax(dim=(1, 3))
        fill_lists(tables, prompt, layer, signed_keys_ref(scores), protected)


def _summaries(step: StepTables, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest key of pages [...], [..., D] fp32 each."""
    least, largest = step.summaries[page_ids].float().unbind(-2)
    return least, largest


def _keys(pages: torch.Tensor, ids: torch.Tensor, head_dim: int) -> torch.Tensor:
    return pages[ids, :, :head_dim].float()
