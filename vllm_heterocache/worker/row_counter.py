"""Counts the decode rows of a worker, and the pages they read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.policies.policy import Policy, StepChoice
from vllm_heterocache.worker.fallbacks import COMPACTED

if TYPE_CHECKING:
    from vllm_heterocache.heads.assignment import HeadAssignment
    from vllm_heterocache.metrics import Counters
    from vllm_heterocache.worker.requests import CompactRequest
    from vllm_heterocache.worker.tables.page_table import PageTable

# What choosing at each step reads of a compressed head, in pages for each page that it chooses
# from: the smallest and largest key of its 16, either of them, both and a bit for each element of
# the keys (of 16 bits), or all keys.
CHOOSING_PAGES = {
    StepChoice.SUMMARIES: 1 / 16,
    StepChoice.HYBRID: 1 / 32,
    StepChoice.ONE_BIT: 3 / 32,
    StepChoice.EXACT: 1 / 2,
}


class RowCounter:
    """Adds to `decode_rows`, `decode_pages_dense` and `decode_pages_read` of the counters."""

    def __init__(
        self,
        counters: Counters,
        table: PageTable,
        assignment: HeadAssignment,
        policy: Policy,
    ) -> None:
        self._counters, self._table, self._assignment = counters, table, assignment
        self._frees_prompt, choice = policy.frees_prompt, policy.step_selection
        self._choosing_pages = CHOOSING_PAGES[choice] * policy.step_channel_share if choice else 0.0

    def count_compact(self, num_tokens: int, request: CompactRequest) -> None:
        """A row of `num_tokens` tokens, this step's included, that reads page lists."""
        heads = self._assignment.num_heads
        prompt = request.order.num_tokens // PAGE_SIZE
        instead = self._table.num_read(request.table_slot) - heads * prompt
        choosing = self._choosing_pages * self._num_candidates(request, prompt)
        self._counters.decode_rows["compact", COMPACTED] += 1
        self._count_pages(num_tokens, instead + int(choosing))

    def _num_candidates(self, request: CompactRequest, prompt: int) -> int:
        """Pages that a step chooses from, over all heads."""
        if self._frees_prompt:
            return self._table.num_listed(request.table_slot)
        return (self._assignment.num_heads - self._assignment.num_full) * prompt

    def count_dense(self, num_tokens: int, reason: str) -> None:
        """A row of `num_tokens` tokens, this step's included, that reads the whole KV."""
        self._counters.decode_rows["dense", reason] += 1
        self._count_pages(num_tokens, 0)

    def _count_pages(self, num_tokens: int, more: int) -> None:
        """What full attention would read, in whole pages, and what the row reads."""
        dense = self._assignment.num_heads * -(-num_tokens // PAGE_SIZE)
        self._counters.decode_pages_dense += dense
        self._counters.decode_pages_read += dense + more
