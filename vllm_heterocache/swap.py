"""Page transfers between the GPU pool and the host pool, behind one asynchronous interface."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from vllm_heterocache.cpu_pool import CpuPool
from vllm_heterocache.kernels.page_gather_ref import page_gather_ref


class Transfer(NamedTuple):
    """Copies of whole pages in one direction; page ids are [n] integer tensors."""

    ticket: int
    gpu_pages: torch.Tensor
    host_pages: torch.Tensor


class SwapManager(Protocol):
    """Starts copies and reports them when they are done; never waits.

    Until a transfer is reported complete, the pages it reads must not be written or given
    away, and the pages it writes must not be named by a page table.
    """

    def offload(self, transfer: Transfer) -> None:
        """Copy GPU pages to host pages."""

    def fetch(self, transfer: Transfer) -> None:
        """Copy host pages to GPU pages."""

    def settle(self, tickets: list[int]) -> None:
        """The pages of these transfers are about to be given away: order whatever is done with
        them from now on after the transfers. Tickets that are complete already are no error."""

    def take_completed(self) -> list[int]:
        """Tickets of the transfers completed since the last call, in order of completion."""


class SynchronousSwap:
    """The swap manager of the CPU platform: a transfer is complete when its call returns."""

    def __init__(self, gpu_pool: torch.Tensor, host_pool: CpuPool) -> None:
        self._gpu_pages = gpu_pool  # [num_pages, page_size, 2 * head_dim]
        self._host_pages = host_pool.pages
        self._completed: list[int] = []

    def offload(self, transfer: Transfer) -> None:
        page_gather_ref(self._gpu_pages, transfer.gpu_pages, self._host_pages, transfer.host_pages)
        self._completed.append(transfer.ticket)

    def fetch(self, transfer: Transfer) -> None:
        page_gather_ref(self._host_pages, transfer.host_pages, self._gpu_pages, transfer.gpu_pages)
        self._completed.append(transfer.ticket)

    def settle(self, tickets: list[int]) -> None:
        """Nothing to do: every transfer that was started is complete."""

    def take_completed(self) -> list[int]:
        completed, self._completed = self._completed, []
        return completed
