"""The swap manager of CUDA: DMA to the host, and gathers from it, on streams of their own."""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_heterocache import compat
from vllm_heterocache.kernels.page_gather import page_gather, page_gather_launch
from vllm_heterocache.worker.host.swap import satellite_pages

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from vllm_heterocache.kernels.tables import HeadMaps, Moves
    from vllm_heterocache.worker.host.host_pool import HostPool

STAGING_BYTES = 32 << 20  # GPU memory through which pages pass on their way to the host
# Programs of a fetch, an SM each: enough reads in flight to fill the bus, few enough to leave the
# SMs to decode (docs/performance.md).
FETCH_PROGRAMS = 6


class CudaSwap:
    """Transfers between the GPU pool and a pinned host pool (protocol: swap.SwapManager).

    Offload: a kernel collects the satellites' pages of some blocks in a staging buffer, the copy
    engine moves them on. Both are in order on one stream, which starts after what the compute
    stream was given so far. Fetch: a kernel reads pinned memory over the bus.
    """

    def __init__(self, pool: torch.Tensor, host: HostPool, maps: HeadMaps) -> None:
        self._pool, self._host, self._maps = pool, host, maps
        pin(host.pages)
        lowest, _ = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]  # static
        self._offload_stream = torch.cuda.Stream(pool.device, priority=lowest)
        self._fetch_stream = torch.cuda.Stream(pool.device, priority=lowest)
        self._given = torch.cuda.Event()  # what the compute stream was given before a fetch
        self._fetches: dict[tuple[int, ...], Callable[[], None]] = {}  # by addresses of the moves
        self._num_marks = 0
        self._marks: deque[tuple[int, torch.cuda.Event]] = deque()
        # of settled fetches: when the compute stream came to wait, and when the pages were there
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._blocks_at_once = self.staged_blocks(pool, maps)
        staged_pages = self._blocks_at_once * host.num_satellites
        self._staging = pool.new_empty(staged_pages, *pool.shape[1:])
        self._staged_ids = torch.arange(staged_pages, dtype=torch.int32, device=pool.device)

    @staticmethod
    def staged_blocks(pool: torch.Tensor, maps: HeadMaps) -> int:
        """Blocks whose satellites' pages fit into the staging buffer, at least one."""
        block_bytes = maps.satellite_heads.numel() * pool[0].nbytes
        return STAGING_BYTES // block_bytes if 0 < block_bytes <= STAGING_BYTES else 1

    def offload(self, dense_blocks: torch.Tensor, host_blocks: np.ndarray) -> None:
        assert dense_blocks.shape == host_blocks.shape
        stream = self._offload_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            dense_blocks.record_stream(stream)
            for first in range(0, host_blocks.size, self._blocks_at_once):
                some = slice(first, first + self._blocks_at_once)
                self._copy(dense_blocks[some], host_blocks[some])

    def _copy(self, dense_blocks: torch.Tensor, host_blocks: np.ndarray) -> None:
        pages = satellite_pages(dense_blocks, self._maps).flatten()
        page_gather(self._pool, pages, self._staging, self._staged_ids[: pages.numel()])
        per_block = self._host.num_satellites
        breaks = np.flatnonzero(np.diff(host_blocks) != 1) + 1
        for run in np.split(np.arange(host_blocks.size), breaks):
            source = slice(int(run[0]) * per_block, (int(run[-1]) + 1) * per_block)
            first = int(host_blocks[run[0]]) * per_block
            target = self._host.pages[first : first + run.size * per_block]
            target.copy_(self._staging[source], non_blocking=True)

    def mark(self) -> int:
        self._num_marks += 1
        event = torch.cuda.Event()
        event.record(self._offload_stream)
        self._marks.append((self._num_marks, event))
        return self._num_marks

    def take_completed(self) -> list[int]:
        completed = []
        while self._marks and self._marks[0][1].query():
            completed.append(self._marks.popleft()[0])
        return completed

    def await_offloads(self, mark: int) -> None:
        self._await(mark, torch.cuda.current_stream())

    def _await(self, mark: int, stream: torch.cuda.Stream) -> None:
        for number, event in self._marks:
            if number == mark:
                stream.wait_event(event)

    def beside(self) -> AbstractContextManager[object]:
        # waiting takes the event as it is now, so that the next one may record it again
        self._given.record(torch.cuda.current_stream())
        self._fetch_stream.wait_event(self._given)
        return torch.cuda.stream(self._fetch_stream)

    def fetch(self, moves: Moves, after: int) -> torch.cuda.Event:
        stream = self._fetch_stream
        assert torch.cuda.current_stream() == stream, "a fetch is started within beside()"
        self._await(after, stream)
        self._launch_of(moves)()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _launch_of(self, moves: Moves) -> Callable[[], None]:
        """The launch that fetches the pages of these moves, kept for the next time."""
        ids = moves.host_page, moves.gpu_page, moves.total
        key = tuple(tensor.data_ptr() for tensor in ids)
        if key not in self._fetches:
            self._fetches[key] = page_gather_launch(
                self._host.pages,
                moves.host_page,
                self._pool,
                moves.gpu_page,
                moves.total,
                FETCH_PROGRAMS,
            )
        return self._fetches[key]

    def settle(self, fetch: torch.cuda.Event) -> None:
        compute = torch.cuda.current_stream()
        reached = torch.cuda.Event(enable_timing=True)
        reached.record(compute)
        compute.wait_event(fetch)
        self._waits.append((reached, fetch))

    def settle_all(self) -> None:
        torch.cuda.current_stream().wait_stream(self._fetch_stream)

    def take_late(self) -> int:
        num_late = 0
        while self._waits and all(event.query() for event in self._waits[0]):
            reached, fetch = self._waits.popleft()
            num_late += reached.elapsed_time(fetch) > 0
        return num_late

    def close(self) -> None:
        """Wait for all transfers and let go of the pinned memory."""
        torch.cuda.synchronize()
        if self._host.num_blocks:
            torch.cuda.cudart().cudaHostUnregister(self._host.pages.data_ptr())


def pin(pages: torch.Tensor) -> None:
    """Register host memory with CUDA. Touching it first, with all cores, halves the time."""
    if not pages.numel():
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    pages.zero_()
    torch.set_num_threads(threads)
    compat.pin_tensor(pages)
