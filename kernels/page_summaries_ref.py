"""Reference of page summaries: the box around each page's keys."""

from __future__ import annotations

import torch

CHUNK_BLOCKS = 64  # blocks looked at together, so that temporaries stay small


def page_summaries_ref(
    pages: torch.Tensor, dense_blocks: torch.Tensor, pages_per_block: int, summaries: torch.Tensor
) -> None:
    """Least and largest K of each channel over the tokens of every page of some blocks.

    Args:
        pages: [num_pages, page_size, 2 * D], K then V; block b is the pages from
            b * pages_per_block on. Only K of the blocks that are named is read.
        dense_blocks: [n] integer block ids, full ones.
        pages_per_block: layers times KV heads.
        summaries: [num_pages, 2, D] in the pages' dtype; of each page of these blocks the least
            K [0] and the largest [1] are written. The rest stays as it is.
    """
    head_dim = summaries.shape[2]
    assert pages.shape[0] == summaries.shape[0] and pages.shape[2] == 2 * head_dim
    within = torch.arange(pages_per_block, device=pages.device)
    for blocks in dense_blocks.long().split(CHUNK_BLOCKS):
        ids = (blocks[:, None] * pages_per_block + within).flatten()
        keys = pages[ids, :, :head_dim].float()  # torch orders no fp8 elements
        boxes = torch.stack((keys.amin(dim=1), keys.amax(dim=1)), dim=1)
        summaries[ids] = boxes.to(summaries.dtype)
