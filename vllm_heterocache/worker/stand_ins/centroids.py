"""Worker side: a prompt's evicted tokens merged to centroids, and written to its pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.soft_matching import soft_matching
from vllm_heterocache.worker.stand_ins.pages import storable, write_stand_ins

if TYPE_CHECKING:
    from vllm_heterocache.worker.ops.interface import Geometry, Memory
    from vllm_heterocache.worker.tables.page_table import PageTable

MOST_BYTES = 1 << 30  # memory that is aimed at for the heads that are merged at a time


def merging_bytes(geometry: Geometry, num_tokens: int, chunk_tokens: int) -> int:
    """Memory that merging a prompt takes at most at a time."""
    return max(MOST_BYTES, head_bytes(geometry, num_tokens, chunk_tokens))


def head_bytes(geometry: Geometry, num_tokens: int, chunk_tokens: int) -> int:
    """Memory for a head: K and V of its tokens in fp32, copies for a round, and cosines."""
    return 4 * num_tokens * (10 * geometry.head_dim + min(chunk_tokens, num_tokens))


class CentroidsFiller:
    """Fills the stand-in pages of a prompt, whose lists have protected pages alone.

    All of it is enqueued; nothing waits for the device.
    """

    def __init__(
        self, geometry: Geometry, memory: Memory, table: PageTable, chunk_tokens: int
    ) -> None:
        """
        Args:
            chunk_tokens: as of `soft_matching`.
        """
        self._geometry, self._memory, self._table = geometry, memory, table
        self._chunk_tokens = chunk_tokens

    def fill(self, table_slot: int, dense_blocks: torch.Tensor, num_recent: int) -> None:
        """Merge what the heads do not list: one part of the prompt, the same of all of them.

        Args:
            table_slot: of the request, whose lists are chosen.
            dense_blocks: [P] int32, blocks of the prompt's full pages.
            num_recent: the last pages of the prompt, which the lists have.
        """
        extent = self._table.extents[table_slot]
        pages, listed = extent.stand_in_pages, extent.count
        assert (pages == pages.flat[0]).all() and (listed == listed.flat[0]).all()
        num_kept = int(pages.flat[0]) * PAGE_SIZE
        if not num_kept:
            return
        g, pool = self._geometry, self._memory.pool
        first = int(listed.flat[0]) - num_recent
        blocks = dense_blocks[first : extent.num_pages - num_recent].long()
        num_heads = g.num_layers * g.num_kv_heads
        of_head = head_bytes(g, blocks.shape[0] * PAGE_SIZE, self._chunk_tokens)
        for heads in torch.arange(num_heads, device=pool.device).split(
            max(1, MOST_BYTES // of_head)
        ):
            kv = storable(pool)[blocks * num_heads + heads[:, None]].view(pool.dtype)
            centroids = soft_matching(kv.flatten(1, 2), num_kept, self._chunk_tokens)
            counts = torch.full_like(heads, num_kept)
            total = num_kept * heads.shape[0]
            nothing = torch.zeros_like(heads)
            write_stand_ins(self._memory, table_slot, heads, nothing, counts, total, centroids)
