"""Which decode rows' finders look for their pages.

A finder chooses and fetches within the forward pass, before its layer's attention reads the list
(kernels/exchange_pages_ref.py). So there is nothing to check after a step, and nothing under way
between two steps. All that is left to the host is to say which rows may: those whose KV is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.kernels.values import DriftRule
from vllm_heterocache.worker.fetching import Fetching

if TYPE_CHECKING:
    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.kernels.tables import HeadMaps
    from vllm_heterocache.worker.host.swap import SwapManager
    from vllm_heterocache.worker.ops.interface import Ops
    from vllm_heterocache.worker.requests import CompactRequest


class Finding(Fetching):
    """Takes the place of a `Retriever` on ranks that have finders: they look in every step.

    A step calls `begin_batch`, then comes the forward pass, then `check`.
    """

    def __init__(
        self, config: HeteroCacheConfig, maps: HeadMaps, ops: Ops, swap: SwapManager
    ) -> None:
        """
        Args:
            swap: brings the finders' pages to the host.
        """
        # nothing is asked for again by waves, as a finder looks again in the next step
        super().__init__(DriftRule(config.drift_threshold, waves=1), 1, maps, ops)
        self._swap = swap

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
            if request is not None and self._is_due(request):
                rows.append(row)
                if request.offload_mark is not None:  # not known yet to have arrived
                    self._swap.await_offloads(request.offload_mark)
        return rows

    def check(self) -> None:
        """Count the step."""
        self._count_step()

    def forget(self, request: CompactRequest) -> None:
        """The request leaves. Nothing of it is under way."""
