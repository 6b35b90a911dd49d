"""A swap manager whose transfers happen when the test lets them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vllm_heterocache.kernels.tables import HeadMaps, Moves
from vllm_heterocache.worker.host.host_pool import HostPool


class Offload(NamedTuple):
    """Pages on their way to the host."""

    gpu_pages: torch.Tensor
    host_pages: torch.Tensor


@dataclass(eq=False)
class Fetch:
    """Pages on their way from the host, and the moves that name them."""

    moves: Moves
    gpu_pages: torch.Tensor
    host_pages: torch.Tensor
    after: int  # offloads before this mark come first
    has_arrived: bool = False


class LaterSwap:
    """A swap manager whose transfers happen when the test lets them; those to the host in the
    order in which they were started.

    Until then the pages they write hold NaN, and they read what is there at that time.
    """

    def __init__(self, pool: torch.Tensor, host: HostPool, maps: HeadMaps) -> None:
        self._gpu, self._host, self._maps = pool, host, maps
        self.to_host: deque[Offload | int] = deque()  # copies, and the marks between them
        self.fetches: list[Fetch] = []  # those under way
        self.settled: list[Fetch] = []
        self._num_late = 0
        self._num_marks = 0
        self._completed: list[int] = []

    def offload(self, dense_blocks: torch.Tensor, host_blocks: np.ndarray) -> None:
        assert dense_blocks.shape == host_blocks.shape and host_blocks.size
        heads = self._maps.satellite_heads.tolist()
        num_heads = self._maps.pivot_of_head.numel()
        pages = [block * num_heads + head for block in dense_blocks.tolist() for head in heads]
        host = [block * len(heads) + i for block in host_blocks for i in range(len(heads))]
        copy = Offload(torch.tensor(pages), torch.tensor(host))
        self._host.pages[copy.host_pages] = torch.nan
        self.to_host.append(copy)

    def mark(self) -> int:
        self._num_marks += 1
        self.to_host.append(self._num_marks)
        return self._num_marks

    def take_completed(self) -> list[int]:
        completed, self._completed = self._completed, []
        return completed

    def let_offload(self, count: int | None = None) -> None:
        """Let the first `count` things in the queue happen; None: all."""
        for _ in range(len(self.to_host) if count is None else min(count, len(self.to_host))):
            first = self.to_host.popleft()
            if isinstance(first, int):
                self._completed.append(first)
            else:
                self._host.pages[first.host_pages] = self._gpu[first.gpu_pages]

    def await_offloads(self, mark: int) -> None:
        if mark in self.to_host:
            self.let_offload(self.to_host.index(mark) + 1)

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def fetch(self, moves: Moves, after: int) -> Fetch:
        total = int(moves.total)
        fetch = Fetch(moves, moves.gpu_page[:total].long(), moves.host_page[:total].long(), after)
        self._gpu[fetch.gpu_pages] = torch.nan
        self.fetches.append(fetch)
        return fetch

    def let_fetch(self, fetches: Iterable[Fetch] | None = None) -> None:
        """Let fetches happen; None: all that are under way."""
        for fetch in list(self.fetches if fetches is None else fetches):
            self._arrive(fetch)

    def _arrive(self, fetch: Fetch) -> None:
        if fetch.has_arrived:
            return
        while fetch.after in self.to_host:
            self.let_offload(1)
        total = int(fetch.moves.total)  # a fetch on a device reads its moves late, too
        assert torch.equal(fetch.moves.gpu_page[:total].long(), fetch.gpu_pages)
        assert torch.equal(fetch.moves.host_page[:total].long(), fetch.host_pages)
        self._gpu[fetch.gpu_pages] = self._host.pages[fetch.host_pages]
        fetch.has_arrived = True
        self.fetches.remove(fetch)

    def settle(self, fetch: Fetch) -> None:
        self.settled.append(fetch)
        self._num_late += not fetch.has_arrived
        self._arrive(fetch)

    def settle_all(self) -> None:
        self.let_fetch()

    def take_late(self) -> int:
        num_late, self._num_late = self._num_late, 0
        return num_late
