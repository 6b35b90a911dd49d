"""Worker-side state of one request that is, or is being, compacted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class CompactionOrder(NamedTuple):
    """Scheduler to worker: this step completes a prefill; compact it into these blocks."""

    ticket: int  # names this compaction in the worker's report
    request_id: str
    num_tokens: int  # T, tokens prefilled
    block_ids: list[int]  # N_c fresh blocks


@dataclass(frozen=True)
class RetrievalPlan:
    """Pages to retrieve: prompt page positions[i] of a satellite replaces entry listed[i]."""

    listed: torch.Tensor  # [n] int64 entries of the page table, relative to the slot's base
    positions: torch.Tensor  # [n] int64 prompt pages
    host_pages: torch.Tensor  # [n] int64 host page ids

    @property
    def size(self) -> int:
        return self.listed.shape[0]

    def take(self, rows: torch.Tensor | slice) -> RetrievalPlan:
        return RetrievalPlan(self.listed[rows], self.positions[rows], self.host_pages[rows])

    @staticmethod
    def join(plans: list[RetrievalPlan]) -> RetrievalPlan:
        return RetrievalPlan(
            torch.cat([plan.listed for plan in plans]),
            torch.cat([plan.positions for plan in plans]),
            torch.cat([plan.host_pages for plan in plans]),
        )


@dataclass
class Capture:
    """What the forward pass of the last prefill chunk leaves behind for the compaction."""

    order: CompactionOrder
    last_query: torch.Tensor  # [L, num_q_heads, head_dim], filled layer by layer
    dense_blocks: torch.Tensor | None = None  # [ceil(T / page_size)] int32, set by the builder


@dataclass
class CompactRequest:
    """A request that decodes from page lists."""

    order: CompactionOrder
    slot: int
    scores: torch.Tensor  # [num_pivots, P] fp32, page scores of the last query
    reference: torch.Tensor  # [num_pivots, top_k] int64, top pages at the last refresh
    host_pages: torch.Tensor  # [num_satellites, P] int64 host page ids
    idle_spares: torch.Tensor  # [n] int64 entries relative to the slot's base
    steps_since_check: int = 0
    offload_ticket: int | None = None
    pending: RetrievalPlan | None = None
    in_flight: dict[int, tuple[RetrievalPlan, torch.Tensor]] = field(default_factory=dict)
