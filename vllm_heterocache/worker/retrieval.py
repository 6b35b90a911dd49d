"""Drift and retrieval: replace the satellites' pages when their pivot's attention moved.

Nothing here waits. The clusters take turns: every step the device checks those of one turn, and
lists the moves of a retrieval. The pages are fetched into spare pages while decode goes on. One
update of the tables makes them visible at a later step boundary, when the host sees that they have
arrived.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_heterocache.kernels.tables import HeadMaps, Moves
from vllm_heterocache.kernels.values import DriftRule
from vllm_heterocache.worker.tables.upload import StagedTensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.metrics import Counters
    from vllm_heterocache.worker.host.swap import SwapManager
    from vllm_heterocache.worker.ops.interface import Ops
    from vllm_heterocache.worker.requests import CompactRequest
    from vllm_heterocache.worker.tables.page_table import PageTable

# A request may take part in so many retrievals at a time, each with its part of the request's spare
# pages: while one is fetched and waits for its step boundary, the clusters of another turn are
# checked.
MAX_RETRIEVALS = 2
# A triggered cluster takes part in the retrievals of this many checks: what it wants rarely fits
# the spare pages at once. (Forced chain, 8 x 4,000 tokens, gpu_budget 0.1: 114 of 128 right with
# 4 waves and 107 with 1, with 5 % more pages fetched.)
REFRESH_WAVES = 4
# Most pages of one retrieval; 8 KiB pages take 2.6 ms over the bus then.
MAX_MOVES = 16384


class Retrieval:
    """One retrieval: its rows, its moves and its fetch. It is used again when it is done."""

    def __init__(self, max_rows: int, depth: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._staged = StagedTensor(3 * max_rows, depth, device)
        self.moves = Moves.allocate(MAX_MOVES, device)
        self.requests: list[CompactRequest | None] = []
        self.turn = 0
        self.part = 0  # of its requests' spare pages
        self.is_under_way = False
        self.fetch: object = None

    @property
    def table_slots(self) -> torch.Tensor:
        """[R] int32 table slot of each row; -1 where none is to be served."""
        return self._staged.tensor[: len(self.requests)]

    @property
    def spares(self) -> torch.Tensor:
        """[R, 2] int32 first spare entry, relative to the slot's first entry, and number."""
        flat = self._staged.tensor[self._max_rows :]
        return flat[: 2 * len(self.requests)].view(-1, 2)

    def set_rows(self, requests: list[CompactRequest | None], spares: np.ndarray) -> None:
        """Say which rows take part; `spares` is [R, 2]."""
        values = np.zeros(3 * self._max_rows, np.int32)
        values[: len(requests)] = [-1 if r is None else r.table_slot for r in requests]
        values[self._max_rows : self._max_rows + spares.size] = spares.ravel()
        self._staged.write(values)
        self.requests = requests

    def drop(self, request: CompactRequest) -> None:
        """The request has left: its moves must change nothing."""
        row = self.requests.index(request)
        self.requests[row] = None
        self._staged.tensor[row : row + 1].fill_(-1)


class Retriever:
    """Watches the pivots of compacted requests and keeps their satellites' pages current."""

    def __init__(
        self,
        config: HeteroCacheConfig,
        maps: HeadMaps,
        table: PageTable,
        ops: Ops,
        swap: SwapManager,
        counters: Counters,
        max_rows: int,
        depth: int,
        num_micro_batches: int = 1,
    ) -> None:
        """
        Args:
            maps: which heads lead and which follow.
            table: page lists of the requests.
            swap: fetches the pages of a retrieval from the host.
            counters: `drift_checks_skipped` is counted here; `ops` counts all else on the device.
            max_rows: most rows of a decode batch.
            depth: steps after which a buffer of per-step inputs may be written again
                (`StagedTensor`).
            num_micro_batches: batches that come in turn, each with requests of its own (pipeline
                parallelism).
        """
        self.rule = DriftRule(config.drift_threshold, REFRESH_WAVES)  # may change between steps
        self._protected, self._interval = config.protected, config.drift_interval
        self._maps, self._table = maps, table
        self._ops, self._swap, self._counters = ops, swap, counters
        device = maps.pivot_heads.device
        num_pivots = maps.pivot_heads.numel()
        self._dirty = torch.zeros(
            (table.dense_slot + 1, num_pivots), dtype=torch.int32, device=device
        )
        self._num_parts = min(MAX_RETRIEVALS, self._interval)
        self._retrievals = [
            Retrieval(max_rows, depth, device) for _ in range(self._num_parts * num_micro_batches)
        ]
        self._ready: list[CompactRequest | None] = []  # of each decode row of the step
        self._current: Retrieval | None = None
        self._num_lists = 0  # of moves so far
        # of each table slot and turn
        self._num_checks = np.zeros((table.dense_slot + 1, self._interval), np.int64)
        turns = range(self._interval)
        turn_of_pivot = torch.arange(num_pivots, device=device) % self._interval
        self._due_pivots = [_where(turn_of_pivot == turn) for turn in turns]
        turn_of_satellite = turn_of_pivot[maps.leaders.long()]
        self._due_satellites = [_where(turn_of_satellite == turn) for turn in turns]
        self._due_masks = [_mask(maps, turn_of_pivot == turn) for turn in turns]
        self.due_pivot = torch.full_like(maps.pivot_of_head, -1)
        self._nothing_due = self.due_pivot.clone()
        self._is_anything_due = False

    @property
    def is_watching(self) -> bool:
        """Whether drift is watched at all."""
        return self.rule.threshold > 0 and self._maps.satellite_heads.numel() > 0

    # --- before the forward pass ---

    def begin_step(self) -> None:
        """Make arrived pages visible."""
        for retrieval in self._retrievals:
            if retrieval.is_under_way and self._swap.is_done(retrieval.fetch):
                self._ops.flip(retrieval.moves, retrieval.table_slots)
                retrieval.is_under_way = False

    def begin_batch(self, requests: list[CompactRequest | None]) -> None:
        """Choose the clusters whose scores this step writes. It may be called again in a step.

        Args:
            requests: request of each decode row of the batch; None for dense rows.
        """
        self._ready = []
        if self.is_watching:
            self._ready = [r if r is not None and r.is_on_host else None for r in requests]
        self._current = self._idle_retrieval()
        if self._current is not None:
            self.due_pivot.copy_(self._due_masks[self._current.turn])
            self._is_anything_due = True
        elif self._is_anything_due:
            self.due_pivot.copy_(self._nothing_due)
            self._is_anything_due = False

    def _idle_retrieval(self) -> Retrieval | None:
        """One for the step, with its turn and its part of the spare pages.

        The turn is the one in which the requests were checked least often. A turn that has to wait
        is the next one therefore, and all clusters of a request are checked equally often. None
        where nobody can be checked: a retrieval of that turn is under way for one of the requests,
        and both could fetch the same page, or no part of the spare pages is free.
        """
        requests = {r for r in self._ready if r is not None}
        if not requests:
            return None
        turn = int(self._num_checks[[r.table_slot for r in requests]].sum(axis=0).argmin())
        sharing = [
            retrieval
            for retrieval in self._retrievals
            if retrieval.is_under_way and not requests.isdisjoint(retrieval.requests)
        ]
        parts = set(range(self._num_parts)) - {retrieval.part for retrieval in sharing}
        idle = next((r for r in self._retrievals if not r.is_under_way), None)
        if idle is None or not parts or any(r.turn == turn for r in sharing):
            return None
        idle.turn, idle.part = turn, min(parts)
        return idle

    # --- after the forward pass ---

    def check(self) -> None:
        """Check the clusters of this step's turn by the page scores that the step's rows wrote, and
        start their retrieval."""
        ready, retrieval = self._ready, self._current
        self._ready, self._current = [], None
        if not any(ready):
            return
        if retrieval is None:
            self._counters.drift_checks_skipped += 1
            return
        self._num_checks[[r.table_slot for r in ready if r is not None], retrieval.turn] += 1
        self._num_lists += 1
        retrieval.set_rows(ready, self._spares(ready, retrieval.part))
        max_pages = max(r.num_pages for r in ready if r is not None)
        self._ops.check_drift(
            retrieval.table_slots,
            self._due_pivots[retrieval.turn],
            self._dirty,
            self.rule,
            max_pages,
        )
        self._ops.list_moves(
            retrieval.table_slots,
            self._due_satellites[retrieval.turn],
            self._dirty,
            retrieval.spares,
            retrieval.moves,
            self._protected,
            self._num_lists,
            max_pages,
        )
        retrieval.fetch = self._swap.fetch(retrieval.moves)
        retrieval.is_under_way = True

    def forget(self, request: CompactRequest) -> None:
        """The request leaves and its pages are given away."""
        for retrieval in self._retrievals:
            if retrieval.is_under_way and request in retrieval.requests:
                retrieval.drop(request)
                self._swap.settle(retrieval.fetch)
        self._dirty[request.table_slot].zero_()
        self._num_checks[request.table_slot] = 0

    def _spares(self, requests: Iterable[CompactRequest | None], part: int) -> np.ndarray:
        """[R, 2]: the part of each request's spare entries that one retrieval may use."""
        spares = []
        for request in requests:
            if request is None:
                spares.append((0, 0))
                continue
            count = self._table.num_spares(request.table_slot)
            parts = self._num_parts
            first, end = count * part // parts, count * (part + 1) // parts
            spares.append((self._table.num_listed(request.table_slot) + first, end - first))
        return np.array(spares, np.int32)


def _where(mask: torch.Tensor) -> torch.Tensor:
    return mask.nonzero().flatten().to(torch.int32)


def _mask(maps: HeadMaps, is_due: torch.Tensor) -> torch.Tensor:
    """[L, H] int32: index of each pivot that is due, -1 for all other heads."""
    pivot = maps.pivot_of_head.long()
    if not is_due.numel():
        return maps.pivot_of_head.clone()
    due = is_due[pivot.clamp(min=0)] & (pivot >= 0)
    return torch.where(due, maps.pivot_of_head, -1)
