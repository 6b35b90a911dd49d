"""Which decode rows may get pages from the host, and from which step on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_heterocache.kernels.tables import HeadMaps
    from vllm_heterocache.kernels.values import DriftRule
    from vllm_heterocache.worker.ops.interface import Ops
    from vllm_heterocache.worker.requests import CompactRequest

# Nothing is fetched for a request before its pages are on the host. They may all leave at once,
# after a hit in the prefix cache; a bus of 50 GB/s takes so many bytes in a step of 10 ms.
OFFLOAD_BYTES_A_STEP = 512 << 20


class Fetching:
    """What `Retriever` and `Finding` have in common: they follow the decode rows of each step."""

    def __init__(self, rule: DriftRule, interval: int, maps: HeadMaps, ops: Ops) -> None:
        """
        Args:
            rule: a threshold of 0 switches fetching off; benchmarks change it between steps.
            interval: decode steps of a request from one that is due to the next.
            maps: the satellites are the heads whose KV lies on the host.
        """
        self.rule, self._interval, self._maps = rule, interval, maps
        self._host_block_bytes = maps.satellite_heads.numel() * ops.memory.pool[0].nbytes
        self._batch: list[CompactRequest | None] = []  # of each decode row of the step

    @property
    def is_watching(self) -> bool:
        """Whether anything is ever fetched."""
        return self.rule.threshold > 0 and self._maps.satellite_heads.numel() > 0

    def first_check(self, request: CompactRequest) -> int:
        """The first decode step, counted from 1, in which a request is due. It follows from the
        length of the prompt, so that prefilled prompts and cached ones are served alike."""
        return 1 + request.num_pages * self._host_block_bytes // OFFLOAD_BYTES_A_STEP

    def _is_due(self, request: CompactRequest) -> bool:
        """Whether the coming step of the request may ask for pages."""
        since_first = request.num_decodes + 1 - self.first_check(request)
        return (
            self.is_watching
            and request.host is not None
            and since_first >= 0
            and since_first % self._interval == 0
        )

    def _count_step(self) -> None:
        for request in self._batch:
            if request is not None:
                request.num_decodes += 1
        self._batch = []
