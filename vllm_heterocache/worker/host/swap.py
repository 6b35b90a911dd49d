"""Page transfers between the GPU pool and the host pool, behind one asynchronous interface."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_heterocache.kernels.page_gather_ref import page_gather_ref

if TYPE_CHECKING:
    import numpy as np

    from vllm_heterocache.kernels.tables import HeadMaps, Moves
    from vllm_heterocache.worker.host.host_pool import HostPool


class SwapManager(Protocol):
    """Starts copies and reports them when they are done; never makes the host wait."""

    def offload(self, dense_blocks: torch.Tensor, host_blocks: np.ndarray) -> None:
        """Copy the satellites' pages of dense blocks [n] int32 to host blocks [n].

        The dense blocks must keep their content until a later `mark` is completed.
        """

    def mark(self) -> int:
        """A number that `take_completed` returns once all offloads before it are done."""

    def take_completed(self) -> list[int]:
        """Marks completed since the last call, in order."""

    def await_offloads(self, mark: int) -> None:
        """Order whatever the compute stream does from now on after the offloads before a mark."""

    def beside(self) -> AbstractContextManager[object]:
        """What is enqueued within, a fetch included, comes after all that the compute stream was
        given so far, in order. The compute stream does not wait for it until it settles a fetch."""

    def fetch(self, moves: Moves, after: int) -> Any:
        """Start copying host pages to the spare pages of a retrieval; within `beside` alone.

        Args:
            after: the offloads before this mark bring pages that the moves read; 0: none does.

        Returns:
            A handle.
        """

    def settle(self, fetch: Any) -> None:
        """Order whatever the compute stream does from now on after the fetch."""

    def settle_all(self) -> None:
        """The same after all that runs beside it by now, which is not counted as late."""

    def take_late(self) -> int:
        """Fetches for which the compute stream turned out to have waited, since the last call."""

    def close(self) -> None:
        """No transfer will be asked for any more; the host pool may go."""


class SynchronousSwap:
    """The swap manager of the CPU platform: a transfer is complete when its call returns."""

    def __init__(self, pool: torch.Tensor, host: HostPool, maps: HeadMaps) -> None:
        self._pool, self._host, self._maps = pool, host, maps
        self._num_marks = 0
        self._completed: list[int] = []

    def offload(self, dense_blocks: torch.Tensor, host_blocks: np.ndarray) -> None:
        source = satellite_pages(dense_blocks, self._maps)
        within = torch.arange(self._host.num_satellites)
        target = torch.from_numpy(host_blocks)[:, None] * self._host.num_satellites + within
        page_gather_ref(self._pool, source.flatten(), self._host.pages, target.flatten())

    def mark(self) -> int:
        self._num_marks += 1
        self._completed.append(self._num_marks)
        return self._num_marks

    def take_completed(self) -> list[int]:
        completed, self._completed = self._completed, []
        return completed

    def await_offloads(self, mark: int) -> None:
        """Nothing to do: they are complete."""

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def fetch(self, moves: Moves, after: int) -> Any:
        total = int(moves.total)
        page_gather_ref(
            self._host.pages, moves.host_page[:total], self._pool, moves.gpu_page[:total]
        )

    def settle(self, fetch: Any) -> None:
        """Nothing to do: every transfer that was started is complete."""

    def settle_all(self) -> None:
        """Nothing to do, likewise."""

    def take_late(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing to do."""


def satellite_pages(blocks: torch.Tensor, maps: HeadMaps) -> torch.Tensor:
    """Page ids of all satellites in the given blocks.

    Args:
        blocks: [n] int32.

    Returns:
        [n, num_satellites] int32, block by block as a host block holds them.
    """
    return blocks[:, None] * maps.pivot_of_head.numel() + maps.satellite_heads[None, :]
