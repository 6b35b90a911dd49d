"""Drift and retrieval: replace the satellites' pages when their pivot's attention moved.

Nothing here waits. Every step one lane of clusters is checked on the device, which also plans the
retrieval; the pages are fetched into spare pages while decode goes on, and one update of the
tables makes them visible at a later step boundary, when the host sees that they have arrived.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.kernels.tables import HeadMaps, Moves
from vllm_heterocache.metrics import Counters
from vllm_heterocache.worker.host.swap import SwapManager
from vllm_heterocache.worker.ops.interface import Ops
from vllm_heterocache.worker.requests import CompactRequest
from vllm_heterocache.worker.tables.page_table import PageTable
from vllm_heterocache.worker.tables.upload import StagedTensor

# So many retrievals may be under way, each with its part of the spare pages: while one is fetched
# and waits for its step boundary, another lane is checked.
MAX_PLANS = 2
# A triggered cluster takes part in the retrievals of this many checks: what it wants rarely fits
# the spare pages at once. (Forced chain, 8 x 4,000 tokens, gpu_budget 0.1: 114 of 128 right with
# 4 waves and 107 with 1, with 5 % more pages fetched.)
REFRESH_WAVES = 4
# Most pages of one retrieval; 8 KiB pages take 2.6 ms over the bus then.
MAX_MOVES = 16384


class Plan:
    """One retrieval: its rows, its moves, and the fetch under way (None: idle)."""

    def __init__(self, max_rows: int, depth: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._staged = StagedTensor(3 * max_rows, depth, device)
        self.moves = Moves.allocate(MAX_MOVES, device)
        self.requests: list[CompactRequest | None] = []
        self.lane = 0
        self.is_under_way = False
        self.fetch: object = None

    @property
    def slots(self) -> torch.Tensor:
        """[R] int32 slot of each row; -1 where none is to be served."""
        return self._staged.tensor[: len(self.requests)]

    @property
    def spares(self) -> torch.Tensor:
        """[R, 2] int32 first spare entry, relative to the slot's first entry, and number."""
        flat = self._staged.tensor[self._max_rows :]
        return flat[: 2 * len(self.requests)].view(-1, 2)

    def set_rows(self, requests: list[CompactRequest | None], spares: np.ndarray) -> None:
        """Say which rows take part; `spares` is [R, 2]."""
        values = np.zeros(3 * self._max_rows, np.int32)
        values[: len(requests)] = [-1 if r is None else r.slot for r in requests]
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
        """`num_micro_batches` batches come in turn, each with requests of its own (pipeline
        parallelism)."""
        self._config, self._maps, self._table = config, maps, table
        self._ops, self._swap, self._counters = ops, swap, counters
        device = maps.pivot_heads.device
        num_pivots = maps.pivot_heads.numel()
        self._dirty = torch.zeros(
            (table.dense_slot + 1, num_pivots), dtype=torch.int32, device=device
        )
        num_plans = min(MAX_PLANS, config.drift_interval)
        self._plans = [Plan(max_rows, depth, device) for _ in range(num_plans)]
        self._current: Plan | None = None
        self._step = 0  # steps with compacted requests in the batch
        self._num_micro_batches = num_micro_batches
        interval = config.drift_interval
        lane_of_pivot = torch.arange(num_pivots, device=device) % interval
        self._due_pivots = [_where(lane_of_pivot == lane) for lane in range(interval)]
        led = lane_of_pivot[maps.leaders.long()]
        self._due_satellites = [_where(led == lane) for lane in range(interval)]
        self._due_masks = [_mask(maps, lane_of_pivot == lane) for lane in range(interval)]
        self.due_pivot = torch.full_like(maps.pivot_of_head, -1)
        self._nothing_due = self.due_pivot.clone()
        self._is_anything_due = False

    @property
    def is_watching(self) -> bool:
        """Whether drift is watched at all."""
        return self._config.watches_drift and self._maps.satellite_heads.numel() > 0

    def set_drift(self, drift_threshold: float, debug_force_triggers: float) -> None:
        """Change what triggers a retrieval; prompts compacted so far keep what they have."""
        self._config = replace(
            self._config,
            drift_threshold=drift_threshold,
            debug_force_triggers=debug_force_triggers,
        )

    # --- before the forward pass ---

    def begin_step(self, num_requests: int) -> None:
        """Make arrived pages visible; choose the clusters whose scores this step writes."""
        for plan in self._plans:
            if plan.is_under_way and self._swap.is_done(plan.fetch):
                self._ops.flip(plan.moves, plan.slots)
                plan.is_under_way = False
        self._current = None
        if num_requests and self.is_watching:
            self._current = self._idle_plan()
            if self._current is None:
                self._counters.drift_checks_skipped += 1
        if self._current is not None:
            self.due_pivot.copy_(self._due_masks[self._lane])
            self._is_anything_due = True
        elif self._is_anything_due:
            self.due_pivot.copy_(self._nothing_due)
            self._is_anything_due = False

    # --- after the forward pass ---

    def check(self, requests: list[CompactRequest | None]) -> None:
        """Check the lane's clusters by the page scores that this step's rows wrote, and start
        the retrieval.

        Args:
            requests: request of each decode row of the batch; None for dense rows.
        """
        plan, self._current = self._current, None
        if not any(requests):
            return
        lane, config = self._lane, self._config
        self._step += 1
        ready = [r if r is not None and r.is_on_host else None for r in requests]
        if plan is None or not any(ready):
            return
        plan.set_rows(ready, self._spares(ready, self._plans.index(plan)))
        max_pages = max(r.num_pages for r in ready if r is not None)
        self._ops.check_drift(
            plan.slots,
            self._due_pivots[lane],
            self._dirty,
            config.drift_threshold,
            REFRESH_WAVES,
            max_pages,
            config.debug_force_triggers,
            self._step,
        )
        self._ops.plan_retrieval(
            plan.slots,
            self._due_satellites[lane],
            self._dirty,
            plan.spares,
            plan.moves,
            config.sink_pages,
            config.recent_pages,
            self._step,
            max_pages,
        )
        plan.fetch, plan.lane = self._swap.fetch(plan.moves), lane
        plan.is_under_way = True

    def forget(self, request: CompactRequest) -> None:
        """The request leaves and its pages are given away."""
        for plan in self._plans:
            if plan.is_under_way and request in plan.requests:
                plan.drop(request)
                self._swap.settle(plan.fetch)
        self._dirty[request.slot].zero_()

    def _idle_plan(self) -> Plan | None:
        """A plan for the lane of this step. None while a retrieval of the same lane is under way:
        both could fetch the same page."""
        if any(plan.is_under_way and plan.lane == self._lane for plan in self._plans):
            return None
        return next((plan for plan in self._plans if not plan.is_under_way), None)

    @property
    def _lane(self) -> int:
        """The lane of the next check: every request's clusters take their turns."""
        return self._step // self._num_micro_batches % self._config.drift_interval

    def _spares(self, requests: Iterable[CompactRequest | None], part: int) -> np.ndarray:
        """[R, 2]: the part of each request's spare entries that one plan may use."""
        spares = []
        for request in requests:
            if request is None:
                spares.append((0, 0))
                continue
            count = self._table.num_spares(request.slot)
            parts = len(self._plans)
            first, end = count * part // parts, count * (part + 1) // parts
            spares.append((self._table.num_listed(request.slot) + first, end - first))
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
