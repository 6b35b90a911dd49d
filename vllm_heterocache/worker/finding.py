"""Which decode rows' finders look for their pages.

A finder chooses and fetches within the forward pass, before its layer's attention reads the list
(kernels/exchange_pages_ref.py). So there is nothing to check after a step, and nothing under way
between two steps. All that is left to the host is to say which rows may: those whose KV is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.worker.retrieval import first_fetching_step

if TYPE_CHECKING:
    from vllm_heterocache.kernels.tables import HeadMaps
    from vllm_heterocache.kernels.values import DriftRule
    from vllm_heterocache.worker.host.swap import SwapManager
    from vllm_heterocache.worker.ops.interface import Ops
    from vllm_heterocache.worker.requests import CompactRequest


class Finding:
    """Takes the place of a `Retriever` on ranks that have finders: they look in every step.

    A step calls `begin_batch`, then comes the forward pass, then `check`.
    """

    def __init__(self, rule: DriftRule, maps: HeadMaps, ops: Ops, swap: SwapManager) -> None:
        """
        Args:
            rule: a threshold of 0 switches finders off; benchmarks change it between steps.
            swap: brings the finders' pages to the host.
        """
        self.rule, self._swap = rule, swap
        self._host_block_bytes = maps.satellite_heads.numel() * ops.memory.pool[0].nbytes
        self._batch: list[CompactRequest | None] = []  # of each decode row of the step

    @property
    def is_watching(self) -> bool:
        """Whether finders fetch at all."""
        return self.rule.threshold > 0

    def first_check(self, request: CompactRequest) -> int:
        """The first decode step, counted from 1, in which a request's finders look."""
        return first_fetching_step(request, self._host_block_bytes)

    def begin_batch(self, requests: list[CompactRequest | None]) -> list[int]:
        """It may be called again in a step.

        Args:
            requests: request of each decode row of the batch; None for dense rows.

        Returns:
            The rows whose finders look.
        """
        self._batch = requests
        rows = []
        for row, request in enumerate(requests):
            if request is None or request.host is None or not self.is_watching:
                continue
            if request.num_decodes + 1 >= self.first_check(request):
                rows.append(row)
                if request.offload_mark is not None:  # not known yet to have arrived
                    self._swap.await_offloads(request.offload_mark)
        return rows

    def check(self) -> None:
        """Count the step."""
        for request in self._batch:
            if request is not None:
                request.num_decodes += 1
        self._batch = []

    def forget(self, request: CompactRequest) -> None:
        """The request leaves. Nothing of it is under way."""
