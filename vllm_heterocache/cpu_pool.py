"""Host pages: the whole KV of the satellites of every compacted request."""

from __future__ import annotations

import torch


class CpuPool:
    """Fixed pool of host pages [num_pages, page_size, 2 * head_dim], handed out one by one."""

    def __init__(self, num_pages: int, page_size: int, head_dim: int, dtype: torch.dtype) -> None:
        self.pages = torch.empty((num_pages, page_size, 2 * head_dim), dtype=dtype)
        self._free = torch.arange(num_pages, dtype=torch.int64)
        self._num_free = num_pages

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return self.num_pages - self._num_free

    def allocate(self, num_pages: int) -> torch.Tensor | None:
        """Take pages; None, and no change, where fewer are free.

        Returns:
            [num_pages] int64 page ids.
        """
        if num_pages > self._num_free:
            return None
        self._num_free -= num_pages
        return self._free[self._num_free : self._num_free + num_pages].clone()

    def release(self, page_ids: torch.Tensor) -> None:
        """Give pages back."""
        end = self._num_free + page_ids.numel()
        assert end <= self.num_pages, "host pages released twice"
        self._free[self._num_free : end] = page_ids.flatten()
        self._num_free = end

    def check_integrity(self, used: list[torch.Tensor]) -> None:
        """Raise AssertionError unless free and used pages are all pages, each once."""
        known = torch.cat([self._free[: self._num_free], *[ids.flatten() for ids in used]])
        expected = torch.arange(self.num_pages)
        assert torch.equal(known.sort().values, expected), "host pages lost or used twice"
