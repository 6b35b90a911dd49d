"""The quantised keys of finders, which stand beside the page lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_heterocache.kernels.tables import FinderTables, HeadMaps, first_finders
from vllm_heterocache.worker.tables.upload import upload

if TYPE_CHECKING:
    from vllm_heterocache.heads.assignment import HeadAssignment


@dataclass(frozen=True)
class FinderKeys:
    """Which heads have quantised keys, and how large these are."""

    heads: np.ndarray  # [num_finders] int32 flat heads
    head_dim: int
    dtype: torch.dtype  # of queries

    @classmethod
    def of(cls, assignment: HeadAssignment, head_dim: int, dtype: torch.dtype) -> FinderKeys | None:
        """None where no head is a finder."""
        heads = assignment.finders.astype("int32")
        return cls(heads, head_dim, dtype) if heads.size else None

    @property
    def num_finders(self) -> int:
        return self.heads.size

    @property
    def bytes_per_page(self) -> int:
        """Codes and grids of a page of one head."""
        return self.head_dim * (4 + 2 * self.dtype.itemsize)

    def tables(self, maps: HeadMaps, num_stripes: int, width: int) -> FinderTables:
        device = maps.pivot_of_head.device
        heads = upload(self.heads, device)
        places = num_stripes * width
        return FinderTables(
            torch.zeros(places, 2, self.head_dim, dtype=torch.int16, device=device),
            torch.zeros(places, 2, self.head_dim, dtype=self.dtype, device=device),
            width,
            heads,
            maps.pivot_of_head.view(-1)[heads.long()].contiguous(),
            first_finders(self.heads.tolist(), *maps.pivot_of_head.shape),
        )
