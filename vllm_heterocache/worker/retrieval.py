"""Drift and retrieval: replace the satellites' pages when their pivot's attention moved.

A request is checked at steps of its own: from `Retriever.first_check` on, every `drift_interval` of
its decode steps. The pages that a check wants are fetched into spare pages while decode goes on,
and one update of the tables makes them visible VISIBLE_AFTER steps later, or after one step with
`drift_interval` 1. What a request reads thus depends on its own steps, and on no transfer's speed:
where a fetch is late, the device waits. The host never does. Only where requests that are checked
in the same step want more than MAX_MOVES pages does one depend on the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_heterocache.kernels.tables import HeadMaps, Moves
from vllm_heterocache.kernels.values import DriftRule
from vllm_heterocache.worker.fetching import Fetching
from vllm_heterocache.worker.tables.upload import StagedTensor

if TYPE_CHECKING:
    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.worker.host.swap import SwapManager
    from vllm_heterocache.worker.ops.interface import Ops
    from vllm_heterocache.worker.requests import CompactRequest
    from vllm_heterocache.worker.tables.page_table import PageTable

# Decode steps of a request from the check that asks for pages to the step that reads them. The step
# between them hides the fetch. With `drift_interval` 1 the next step reads them.
VISIBLE_AFTER = 2
# A triggered cluster takes part in the retrievals of this many checks: what it wants rarely fits
# the spare pages at once. (Forced chain, 8 x 4,000 tokens, gpu_budget 0.1: 114 of 128 right with
# 4 waves and 107 with 1, with 5 % more pages fetched.)
WAVES = 4
# Most pages of one retrieval, which its rows share; 8 KiB pages take 2.6 ms over the bus then.
MAX_MOVES = 16384


class Retrieval:
    """One retrieval: its rows, its moves and its fetch. It is used again when it has no row."""

    table_slots: torch.Tensor  # [R] int32 table slot of each row; -1 where none is to be served
    rotations: torch.Tensor  # [R] int32 which satellite goes short: checks of each row so far
    # [R, 2] int32 first spare entry, relative to the slot's first entry, and number
    spares: torch.Tensor

    def __init__(self, max_rows: int, depth: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._num_set = 0  # rows that took part when they were set
        self._staged = StagedTensor(4 * max_rows, depth, device)
        self._staged_shown = StagedTensor(max_rows, depth, device)
        self._set_num_rows(0)
        self.moves = Moves.allocate(MAX_MOVES, device)
        self.rows: dict[CompactRequest, int] = {}  # of requests whose pages are not visible yet
        self.fetch: object = None

    def _set_num_rows(self, num_rows: int) -> None:
        self._num_rows = num_rows
        table_slots, rotations, *_ = self._staged.tensor.split(self._max_rows)
        spares = self._staged.tensor[2 * self._max_rows :].view(-1, 2)
        self.table_slots, self.rotations = table_slots[:num_rows], rotations[:num_rows]
        self.spares = spares[:num_rows]

    def set_rows(self, requests: list[CompactRequest | None], table: PageTable) -> None:
        """Say which rows take part."""
        values = np.zeros(4 * self._max_rows, np.int32)
        table_slots, rotations = values[: self._max_rows], values[self._max_rows :]
        spares = values[2 * self._max_rows :]
        table_slots.fill(-1)
        self.rows = {r: row for row, r in enumerate(requests) if r is not None}
        self._num_set = len(self.rows)
        for request, row in self.rows.items():
            slot = request.table_slot
            num_spares = min(table.num_spares(slot), MAX_MOVES // len(self.rows))
            table_slots[row], rotations[row] = slot, request.num_checks
            spares[2 * row : 2 * row + 2] = table.num_listed(slot), num_spares
        if len(requests) != self._num_rows:
            self._set_num_rows(len(requests))
        self._staged.write(values)

    def release_rows(self, requests: list[CompactRequest]) -> torch.Tensor:
        """Let go of the rows whose pages become visible now.

        Returns:
            [R] int32 table slots of these, -1 for all others.
        """
        if len(requests) == self._num_set:  # all that take part, so no other has a slot
            self.rows = {}
            return self.table_slots
        values = np.full(self._max_rows, -1, np.int32)
        for request in requests:
            values[self.rows.pop(request)] = request.table_slot
        self._staged_shown.write(values)
        return self._staged_shown.tensor[: self._num_rows]


class Retriever(Fetching):
    """Watches the pivots of compacted requests and keeps their satellites' pages current.

    A step calls `begin_batch`, then comes the forward pass, then `check`.
    """

    def __init__(
        self,
        config: HeteroCacheConfig,
        maps: HeadMaps,
        table: PageTable,
        ops: Ops,
        swap: SwapManager,
        max_rows: int,
        depth: int,
    ) -> None:
        """
        Args:
            maps: which heads lead and which follow.
            table: page lists of the requests.
            swap: fetches the pages of a retrieval from the host.
            max_rows: most rows of a decode batch.
            depth: steps after which a buffer of per-step inputs may be written again
                (`StagedTensor`).
        """
        rule = DriftRule(config.drift_threshold, WAVES)
        super().__init__(rule, config.drift_interval, maps, ops)
        self._protected = config.protected
        self._visible_after = min(VISIBLE_AFTER, config.drift_interval)
        self._table, self._ops, self._swap = table, ops, swap
        device = maps.pivot_heads.device
        self._sizes = max_rows, depth, device
        # [S + 1, num_pivots] waves that are still wanted
        shape = table.dense_slot + 1, maps.pivot_heads.numel()
        self._waves_left = torch.zeros(shape, dtype=torch.int32, device=device)
        self._retrievals = [Retrieval(*self._sizes) for _ in range(self._visible_after)]
        # of each request with a retrieval under way: that, and the step that is to see its pages
        self._under_way: dict[CompactRequest, tuple[Retrieval, int]] = {}
        # the requests of the step's decode rows that are due; None for others
        self._due: list[CompactRequest | None] = []

    # --- before the forward pass ---

    def begin_batch(self, requests: list[CompactRequest | None]) -> list[int]:
        """Make pages visible whose step has come. It may be called again in a step.

        Args:
            requests: request of each decode row of the batch; None for dense rows.

        Returns:
            The rows that are due: their drift is checked after the step.
        """
        self._batch = requests
        self._show([r for r in requests if r is not None and self._is_awaited(r)])
        self._due = [r if r is not None and self._is_due(r) else None for r in requests]
        return [row for row, request in enumerate(self._due) if request is not None]

    def _is_awaited(self, request: CompactRequest) -> bool:
        """Whether the coming step is to see what was fetched for the request."""
        under_way = self._under_way.get(request)
        return under_way is not None and request.num_decodes + 1 >= under_way[1]

    def _show(self, requests: list[CompactRequest]) -> None:
        """Update the tables. The rows of a retrieval mostly come together."""
        by_retrieval: dict[Retrieval, list[CompactRequest]] = {}
        for request in requests:
            by_retrieval.setdefault(self._under_way.pop(request)[0], []).append(request)
        for retrieval, shown in by_retrieval.items():
            self._swap.settle(retrieval.fetch)
            self._ops.flip(retrieval.moves, retrieval.release_rows(shown))

    # --- after the forward pass ---

    def check(self) -> None:
        """Check the requests that are due, by the log-sum-exps of pages that the step left, and
        start their retrieval."""
        self._count_step()
        due, self._due = self._due, []
        requests = [request for request in due if request is not None]
        if not requests:
            return
        retrieval = self._idle_retrieval()
        retrieval.set_rows(due, self._table)
        max_pages = max(request.num_pages for request in requests)
        self._ops.check_drift(retrieval.table_slots, self._waves_left, self.rule, max_pages)
        last_mark = max(request.offload_mark or 0 for request in requests)
        # the next step leaves alone what this reads: it checks and flips other requests
        with self._swap.beside():
            self._ops.list_moves(
                retrieval.table_slots,
                self._waves_left,
                retrieval.spares,
                retrieval.moves,
                self._protected,
                retrieval.rotations,
                max_pages,
            )
            retrieval.fetch = self._swap.fetch(retrieval.moves, last_mark)
        for request in requests:
            assert request not in self._under_way
            request.num_checks += 1
            self._under_way[request] = retrieval, request.num_decodes + self._visible_after

    def _idle_retrieval(self) -> Retrieval:
        """There are as many as are under way at a time, where all requests decode in every step. It
        takes more for the micro-batches of a pipeline, and for requests that leave steps out."""
        for retrieval in self._retrievals:
            if not retrieval.rows:
                return retrieval
        self._retrievals.append(Retrieval(*self._sizes))
        return self._retrievals[-1]

    def forget(self, request: CompactRequest) -> None:
        """The request leaves and its pages are given away: its moves must change nothing."""
        if request in self._under_way:
            retrieval, _ = self._under_way.pop(request)
            del retrieval.rows[request]
            self._swap.settle(retrieval.fetch)
        self._waves_left[request.table_slot].zero_()
