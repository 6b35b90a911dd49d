"""Drift and retrieval: replace the satellites' pages when their pivot's attention moved."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.drift import update_drifted
from vllm_heterocache.head_profile import HeadAssignment, HeadRole
from vllm_heterocache.kernels.page_select_ref import page_select_ref
from vllm_heterocache.metrics import Counters
from vllm_heterocache.page_table import PageTable
from vllm_heterocache.request_state import CompactRequest, RetrievalPlan
from vllm_heterocache.swap import SwapManager, Transfer


class Clusters:
    """Pivots that lead satellites, and who follows whom; heads are flat indices l * H + h."""

    def __init__(self, assignment: HeadAssignment) -> None:
        leaders = assignment.leaders.ravel()
        self.num_kv_heads = assignment.roles.shape[1]
        self.pivots = np.unique(leaders[leaders >= 0])
        self.satellites = np.flatnonzero(assignment.roles.ravel() == HeadRole.SATELLITE)
        self.followers = [np.flatnonzero(leaders[self.satellites] == p) for p in self.pivots]

    def pivots_of_layer(self, layer: int) -> list[tuple[int, int]]:
        """(KV head, pivot index) of each leading pivot of a layer."""
        return [
            (int(flat) % self.num_kv_heads, index)
            for index, flat in enumerate(self.pivots)
            if int(flat) // self.num_kv_heads == layer
        ]


class Retriever:
    """Watches the pivots of compacted requests and keeps their satellites' pages current.

    Nothing here waits: a plan is carried out as far as spare pages allow, and what a transfer
    brought becomes visible by one table update at a later step boundary.
    """

    def __init__(
        self,
        config: HeteroCacheConfig,
        clusters: Clusters,
        table: PageTable,
        swap: SwapManager,
        new_ticket: Callable[[], int],
        counters: Counters,
    ) -> None:
        self._config = config
        self._clusters = clusters
        self._table = table
        self._swap = swap
        self._new_ticket = new_ticket
        self._counters = counters

    def step(self, request: CompactRequest) -> None:
        """Once per decode step of a request, after the forward pass wrote its page scores."""
        request.steps_since_check += 1
        # While a plan cannot start or is under way, a check could only replace it by another, and
        # pivots whose reference set has moved already would be forgotten.
        is_idle = request.offload_ticket is None and not request.in_flight
        if is_idle and request.steps_since_check >= self._config.drift_interval:
            request.steps_since_check = 0
            self._check(request)
        self.submit(request)

    def submit(self, request: CompactRequest) -> None:
        """Start as much of the pending plan as there are idle spare pages."""
        if request.pending is None:
            return
        size = min(request.pending.size, request.idle_spares.numel())
        if size == 0:
            return
        now, later = request.pending.take(slice(size)), request.pending.take(slice(size, None))
        spares, request.idle_spares = request.idle_spares[:size], request.idle_spares[size:]
        request.pending = later if later.size else None
        ticket = self._new_ticket()
        request.in_flight[ticket] = (now, spares)
        gpu_pages = self._table.entries[spares + self._table.base(request.slot)]
        self._swap.fetch(Transfer(ticket, gpu_pages, now.host_pages))
        self._counters.pages_fetched += size

    def complete(self, request: CompactRequest, ticket: int) -> None:
        """A transfer is done: its pages enter the lists, those they replace become spare."""
        plan, spares = request.in_flight.pop(ticket)
        self._table.flip(request.slot, plan.listed, spares, plan.positions)
        request.idle_spares = torch.cat((request.idle_spares, spares))

    def _check(self, request: CompactRequest) -> None:
        threshold = self._config.drift_threshold
        if threshold == 0 or not len(self._clusters.pivots):
            return
        drifted = update_drifted(request.scores, request.reference, threshold)
        self._counters.drift_checks += drifted.numel()
        self._counters.drift_triggers += int(drifted.sum())
        plans = [
            self._plan_satellite(request, request.scores[pivot], int(satellite))
            for pivot in drifted.nonzero().flatten().tolist()
            for satellite in self._clusters.followers[pivot]
        ]
        if plans:
            request.pending = _most_wanted_first(plans)

    def _plan_satellite(
        self, request: CompactRequest, scores: torch.Tensor, satellite: int
    ) -> RetrievalPlan:
        """What one satellite lacks of the best pages, by its pivot's scores [P]."""
        layer, head = divmod(int(self._clusters.satellites[satellite]), self._clusters.num_kv_heads)
        entries = self._table.head_entries(request.slot, layer, head)
        held = self._table.positions[entries].long()
        wanted = page_select_ref(
            scores, held.numel(), self._config.sink_pages, self._config.recent_pages
        )
        is_held = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, held, True)
        is_wanted = torch.zeros_like(is_held).index_fill_(0, wanted, True)
        missing = wanted[~is_held[wanted]]
        replaced = (~is_wanted[held]).nonzero().flatten()
        listed = replaced + (entries.start - self._table.base(request.slot))
        return RetrievalPlan(listed, missing, request.host_pages[satellite][missing])


def _most_wanted_first(plans: list[RetrievalPlan]) -> RetrievalPlan | None:
    """Join plans; each head's best missing page comes before any head's second best."""
    rank = torch.cat([torch.arange(plan.size) for plan in plans])
    if not rank.numel():
        return None
    return RetrievalPlan.join(plans).take(rank.argsort(stable=True))
