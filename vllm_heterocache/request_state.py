"""Worker-side state of one request that is, or is being, compacted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


class CompactionOrder(NamedTuple):
    """Scheduler to worker: this step completes a prefill; compact it into these blocks."""

    ticket: int  # names this compaction in the worker's report
    request_id: str
    num_tokens: int  # T, tokens prefilled
    block_ids: list[int]  # N_c fresh blocks; none where the prompt stays where it is


class PrefillStart(NamedTuple):
    """Scheduler to worker: a prompt that will be compacted begins its prefill with this step."""

    request_id: str
    num_tokens: int  # T, tokens to be prefilled


@dataclass(eq=False)
class HostCopy:
    """The satellites' pages of one request on their way to the host."""

    host_blocks: np.ndarray  # [P] host block of each prompt page
    num_copied: int = 0  # prompt pages whose copy was started


@dataclass(eq=False)
class Capture:
    """What the step that completes a prefill leaves behind for the compaction."""

    order: CompactionOrder
    query: int | None = None  # index of the last prompt token's query in `last_queries`
    dense_blocks: torch.Tensor | None = None  # [ceil(T / page_size)] int32
    masses: torch.Tensor | None = None  # [L, H, P] fp32, where all queries' masses are summed up


@dataclass(eq=False)
class CompactRequest:
    """A request that decodes from page lists."""

    order: CompactionOrder
    slot: int
    host: HostCopy | None  # None where nothing is offloaded
    offload_mark: int | None = None  # set until the host holds all pages
    # [P] int32 blocks of a prompt that stays where it is; None where the request owns its pages
    dense_blocks: torch.Tensor | None = None

    @property
    def is_on_host(self) -> bool:
        """Whether pages can be fetched back."""
        return self.host is not None and self.offload_mark is None

    @property
    def num_pages(self) -> int:
        """Host and GPU pages are counted in these: full pages of the prompt."""
        return 0 if self.host is None else self.host.host_blocks.size
