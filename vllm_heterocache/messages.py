"""Everything that crosses the boundary between the scheduler's process and the workers'."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_heterocache.compat import KVConnectorMetadata, KVConnectorWorkerMetadata


class CompactionOrder(NamedTuple):
    """Scheduler to worker: this step completes a prefill; compact it into these blocks."""

    ticket: int  # names this compaction in the worker's report
    request_id: str
    num_tokens: int  # T, tokens prefilled
    block_ids: list[int]  # fresh kernel blocks, N_c or more; none where the prompt stays


class PrefillStart(NamedTuple):
    """Scheduler to worker: a prompt that will be compacted begins its prefill with this step."""

    request_id: str
    num_tokens: int  # T, tokens to be prefilled


@dataclass
class CompactionOrders(KVConnectorMetadata):
    """Scheduler to worker, with each step's batch."""

    orders: list[CompactionOrder] = field(default_factory=list)
    starts: list[PrefillStart] = field(default_factory=list)
    # Kernel blocks to poison before this step's forward pass (`debug_poison`).
    poison: list[int] = field(default_factory=list)


@dataclass
class CompactionAnswers(KVConnectorWorkerMetadata):
    """Worker to scheduler, with each step's output: ticket -> number of workers."""

    done: dict[int, int] = field(default_factory=dict)
    refused: dict[int, int] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, CompactionAnswers)
        return CompactionAnswers(_sum(self.done, other.done), _sum(self.refused, other.refused))


def _sum(left: dict[int, int], right: dict[int, int]) -> dict[int, int]:
    return {key: left.get(key, 0) + right.get(key, 0) for key in left.keys() | right.keys()}
