"""The satellites' pages of prompts on their way to the host, and in its pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.worker.requests import HostCopy

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from vllm_heterocache.metrics import Counters
    from vllm_heterocache.worker.host.host_pool import HostPool
    from vllm_heterocache.worker.host.swap import SwapManager


class HostCopies:
    """Takes host blocks for prompts and sends pages there, while the prefill goes on.

    A copy belongs to its request's id until the prompt is compacted (`take`), and to the compacted
    request after that.
    """

    def __init__(self, pool: HostPool, swap: SwapManager, counters: Counters) -> None:
        self._pool, self._swap, self._counters = pool, swap, counters
        self._of_prefills: dict[str, HostCopy] = {}

    def start(self, request_id: str, num_pages: int) -> None:
        """Send pages as they come; where the host pool is full, `take` tries once more."""
        copy = self._new(num_pages)
        if copy is not None:
            self._of_prefills[request_id] = copy

    def of_prefill(self, request_id: str) -> HostCopy | None:
        """The copy of a prompt that is not compacted yet."""
        return self._of_prefills.get(request_id)

    def take(self, request_id: str, num_pages: int, is_wanted: bool) -> HostCopy | None:
        """The copy of a prompt that is compacted now: the one that was started, else a new one if
        `is_wanted`. None where there is none, or no room for it."""
        copy = self._of_prefills.pop(request_id, None)
        return self._new(num_pages) if copy is None and is_wanted else copy

    def _new(self, num_pages: int) -> HostCopy | None:
        host_blocks = self._pool.allocate(num_pages)
        return None if host_blocks is None else HostCopy(host_blocks)

    def send(self, copy: HostCopy, blocks: torch.Tensor) -> None:
        """Copy the pages in the next dense blocks of the prompt, [n] int32."""
        first, end = copy.num_copied, copy.num_copied + blocks.numel()
        if end > first:
            self._swap.offload(blocks, copy.host_blocks[first:end])
            copy.num_copied = end
            self._counters.pages_offloaded += blocks.numel() * self._pool.num_satellites

    def release(self, copy: HostCopy) -> None:
        # A copy to these blocks may be under way; the next one to them comes after it.
        self._pool.release(copy.host_blocks)

    def forget(self, request_id: str) -> None:
        """The prompt is not compacted after all."""
        if copy := self._of_prefills.pop(request_id, None):
            self.release(copy)

    def check_integrity(self, of_requests: Iterable[HostCopy]) -> None:
        """Raise AssertionError unless every host block is free or of one copy, each once."""
        copies = [*of_requests, *self._of_prefills.values()]
        self._pool.check_integrity([copy.host_blocks for copy in copies])
