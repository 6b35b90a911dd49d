"""Worker-side state of one request that is, or is being, compacted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vllm_heterocache.messages import CompactionOrder


@dataclass(eq=False)
class HostCopy:
    """The satellites' pages of one request on their way to the host."""

    host_blocks: np.ndarray  # [P] host block of each prompt page
    num_copied: int = 0  # prompt pages whose copy was started


class References(NamedTuple):
    """Queries of consecutive tokens at a prompt's end, to which matched tokens are fitted."""

    queries: torch.Tensor  # [n, L, num_q_heads, head_dim]
    behind: int  # tokens from the first of them to the prompt's end


@dataclass(eq=False)
class FinishedPrefill:
    """What the step that completes a prefill leaves behind for the compaction."""

    order: CompactionOrder
    query_place: int | None = None  # of the last prompt token's query among the last queries
    dense_blocks: torch.Tensor | None = None  # [ceil(T / page_size)] int32
    masses: torch.Tensor | None = None  # [L, H, P] fp32, where all queries' masses are summed up
    references: References | None = None  # what matched tokens are fitted to, if anything is


@dataclass(eq=False)
class CompactRequest:
    """A request that decodes from page lists."""

    order: CompactionOrder
    table_slot: int
    host: HostCopy | None  # None where nothing is offloaded, or the host pool was full
    offload_mark: int | None = None  # set until the host holds all pages
    # [P] int32 blocks of a prompt that stays where it is; None where the request owns its pages
    dense_blocks: torch.Tensor | None = None
    num_decodes: int = 0  # steps since the compaction
    num_checks: int = 0  # of its drift

    @property
    def num_pages(self) -> int:
        """Host and GPU pages are counted in these: full pages of the prompt."""
        return 0 if self.host is None else self.host.host_blocks.size
