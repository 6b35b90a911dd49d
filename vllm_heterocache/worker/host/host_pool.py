"""Host pages: the whole KV of the satellites of every compacted request."""

from __future__ import annotations

import numpy as np
import torch


class HostPool:
    """Fixed pool of host blocks, each one page of every satellite.

    `pages` is [num_blocks * num_satellites, page_size, 2 * head_dim]; the page of block b and
    satellite s is b * num_satellites + s. Blocks are handed out lowest first, so that those of a
    request mostly follow one another and are copied together.
    """

    def __init__(
        self,
        num_blocks: int,
        num_satellites: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks, self.num_satellites = num_blocks, num_satellites
        shape = (num_blocks * num_satellites, page_size, 2 * head_dim)
        self.pages = torch.empty(shape, dtype=dtype)
        self._is_free = np.ones(num_blocks, bool)
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        return self._num_free

    def allocate(self, num_blocks: int) -> np.ndarray | None:
        """Take blocks; None, and no change, where fewer are free.

        Returns:
            [num_blocks] int64 block ids, ascending.
        """
        if num_blocks > self._num_free:
            return None
        blocks = np.flatnonzero(self._is_free)[:num_blocks]
        self._is_free[blocks] = False
        self._num_free -= num_blocks
        return blocks

    def release(self, blocks: np.ndarray) -> None:
        """Give blocks back."""
        assert not self._is_free[blocks].any(), "host blocks released twice"
        self._is_free[blocks] = True
        self._num_free += blocks.size

    def check_integrity(self, used: list[np.ndarray]) -> None:
        """Raise AssertionError unless free and used blocks are all blocks, each once."""
        known = np.concatenate([np.flatnonzero(self._is_free), *used])
        assert np.array_equal(np.sort(known), np.arange(self.num_blocks)), "host blocks lost"
