"""Worker side: what happens around each forward pass (the step protocol of docs/design.md)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from vllm.logger import init_logger

from vllm_heterocache.attention_probe import AttentionProbe
from vllm_heterocache.budget import page_budgets, spare_pages
from vllm_heterocache.compaction import fill_page_lists, prompt_page_scores, satellite_pages
from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.cpu_pool import CpuPool
from vllm_heterocache.drift import reference_sets
from vllm_heterocache.head_profile import HeadAssignment
from vllm_heterocache.metrics import Counters, PageCounts, worker_snapshot
from vllm_heterocache.page_table import PageTable
from vllm_heterocache.request_state import Capture, CompactionOrder, CompactRequest
from vllm_heterocache.retrieval import Clusters, Retriever
from vllm_heterocache.swap import SynchronousSwap, Transfer

logger = init_logger("vllm.heterocache")

SHORT_PROMPT = "short_prompt"
HOST_POOL_FULL = "host_pool_full"
COMPACTED = "compacted"


@dataclass(frozen=True)
class LayerGroup:
    """The attention layers of this rank, in block order, and their geometry."""

    layer_names: list[str]
    layer_ids: list[int]  # global layer indices
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    device: torch.device

    @property
    def num_layers(self) -> int:
        return len(self.layer_names)


class Row(NamedTuple):
    """How one row of a batch is to be served."""

    slot: int
    request: CompactRequest | None  # set for rows that decode from page lists
    capture: Capture | None  # set for rows whose prefill this step completes


class HeteroCacheRuntime:
    """Follows requests through a worker: compaction, page lists, drift and retrieval.

    Order within a step: `begin_step` (requests that left, new orders), `rows` (the metadata
    builder), the forward pass (which reads page lists, writes page scores and leaves captures),
    `after_forward` (compaction, then retrieval), `take_answers`.
    """

    def __init__(
        self,
        config: HeteroCacheConfig,
        assignment: HeadAssignment,
        group: LayerGroup,
        rank: int,
        max_num_seqs: int,
        request_ids_of_batch: Callable[[int], list[str]],
    ) -> None:
        assert assignment.roles.shape == (group.num_layers, group.num_kv_heads)
        self.config, self.assignment, self.group, self.rank = config, assignment, group, rank
        self.clusters = Clusters(assignment)
        self.pivots_of_layer = [
            self.clusters.pivots_of_layer(layer) for layer in range(group.num_layers)
        ]
        self.counters = Counters()
        self.probe: AttentionProbe | None = None
        self.request_ids_of_batch = request_ids_of_batch
        self._max_num_seqs = max_num_seqs
        self._tickets = itertools.count()
        self._requests: dict[str, CompactRequest] = {}
        self._captures: dict[str, Capture] = {}
        self._dense_reason: dict[str, str] = {}
        self._decoded: list[CompactRequest] = []
        self._done: list[int] = []
        self._refused: list[int] = []

    def bind_pool(self, pool: torch.Tensor, kv_caches: list[torch.Tensor], host_pages: int) -> None:
        """Start with an empty pool.

        Args:
            pool: [num_blocks * L * H, page_size, 2 * head_dim], the packed pool as pages.
            kv_caches: per layer, the view [num_blocks, H, page_size, 2 * head_dim].
            host_pages: size of the host pool.
        """
        group = self.group
        self.pool, self.kv_caches = pool, kv_caches
        self.table = PageTable(
            self._max_num_seqs,
            kv_caches[0].shape[0],
            group.num_layers,
            group.num_kv_heads,
            group.device,
        )
        self.host_pool = CpuPool(host_pages, pool.shape[1], group.head_dim, pool.dtype)
        self.swap = SynchronousSwap(pool, self.host_pool)
        self._retriever = Retriever(
            self.config,
            self.clusters,
            self.table,
            self.swap,
            lambda: next(self._tickets),
            self.counters,
        )

    # --- before the forward pass ---

    def begin_step(self, gone: Iterable[str], orders: Iterable[CompactionOrder]) -> None:
        """Forget requests that finished or were preempted, and take the step's orders."""
        for request_id in gone:
            self._dense_reason.pop(request_id, None)
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._release(request)
        group = self.group
        shape = (group.num_layers, group.num_q_heads, group.head_dim)
        self._captures = {
            order.request_id: Capture(
                order, torch.empty(shape, dtype=group.dtype, device=group.device)
            )
            for order in orders
        }
        self._decoded = []

    def rows(self, request_ids: list[str], decoding: list[bool]) -> list[Row]:
        """How to serve the rows of a batch; counts the rows that decode.

        Args:
            request_ids: request of each row.
            decoding: whether the row's prefill was complete before this step.
        """
        rows = []
        for request_id, is_decode in zip(request_ids, decoding, strict=True):
            request = self._requests.get(request_id)
            slot = self.table.dense_slot if request is None else request.slot
            rows.append(Row(slot, request, self._captures.get(request_id)))
            if request is not None:
                self._decoded.append(request)
                self.counters.decode_rows["compact", COMPACTED] += 1
            elif is_decode:
                reason = self._dense_reason.get(request_id, SHORT_PROMPT)
                self.counters.decode_rows["dense", reason] += 1
        return rows

    def score_buffers(self, request: CompactRequest, layer: int) -> dict[int, torch.Tensor]:
        """Where the decode kernel writes the page scores of a layer's pivots."""
        return {head: request.scores[pivot] for head, pivot in self.pivots_of_layer[layer]}

    # --- after the forward pass ---

    def after_forward(self) -> None:
        """Compact what finished its prefill, then let the drift rule run for the others."""
        for capture in self._captures.values():
            self._compact(capture)
        self._captures = {}
        for request in self._decoded:
            self._retriever.step(request)
        self._decoded = []
        self._complete_transfers()

    def take_answers(self) -> tuple[list[int], list[int]]:
        """Tickets whose dense blocks are no longer needed, and tickets refused."""
        done, refused = self._done, self._refused
        self._done, self._refused = [], []
        return done, refused

    def snapshot(self) -> dict:
        """Counters and held pages, for the stats."""
        held = {r.order.ticket: self._page_counts(r) for r in self._requests.values()}
        return worker_snapshot(self.counters, held, self.assignment.num_heads)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for exactly once."""
        requests = self._requests.values()
        self.table.check_integrity({r.slot: r.order.block_ids for r in requests})
        self.host_pool.check_integrity([r.host_pages for r in requests])
        for request in requests:
            spares = self.table.spare_entries(request.slot)
            base = self.table.base(request.slot)
            flying = [spare for _, spare in request.in_flight.values()]
            known = torch.cat([request.idle_spares, *flying]).sort().values + base
            assert torch.equal(known, torch.arange(spares.start, spares.stop)), "spares lost"

    def _compact(self, capture: Capture) -> None:
        order = capture.order
        num_pages = order.num_tokens // self.config.page_size
        host_pages = self.host_pool.allocate(len(self.clusters.satellites) * num_pages)
        if host_pages is None:
            self._refuse(order, num_pages)
            return
        request = self._new_request(order, num_pages, host_pages)
        scores = torch.stack(
            [
                prompt_page_scores(capture, layer, kv_cache, num_pages, self.group.scale)
                for layer, kv_cache in enumerate(self.kv_caches)
            ]
        )
        fill_page_lists(
            self.table,
            request.slot,
            self.pool,
            capture,
            scores,
            self.config.sink_pages,
            self.config.recent_pages,
        )
        if len(self.clusters.pivots):
            pivots = torch.from_numpy(self.clusters.pivots).to(scores.device)
            request.scores.copy_(scores.view(-1, num_pages)[pivots])
            request.reference = reference_sets(request.scores)
        self._offload(request, capture, num_pages)
        self._requests[order.request_id] = request
        self.counters.requests_compacted += 1

    def _new_request(
        self, order: CompactionOrder, num_pages: int, host_pages: torch.Tensor
    ) -> CompactRequest:
        total = len(order.block_ids) * self.assignment.num_heads
        budgets = page_budgets(
            self.assignment,
            num_pages,
            total - spare_pages(self.assignment, num_pages, total),
            min(self.config.min_pages, num_pages),
        )
        slot = self.table.allocate(order.block_ids, budgets, num_pages)
        spares = self.table.spare_entries(slot)
        device = self.group.device
        return CompactRequest(
            order,
            slot,
            scores=torch.zeros(len(self.clusters.pivots), num_pages, device=device),
            reference=torch.zeros(0, 0, dtype=torch.int64, device=device),
            host_pages=host_pages.view(len(self.clusters.satellites), num_pages),
            idle_spares=torch.arange(spares.start, spares.stop) - self.table.base(slot),
        )

    def _offload(self, request: CompactRequest, capture: Capture, num_pages: int) -> None:
        """Copy the satellites' prompts to the host; the answer goes out when that is done."""
        if not request.host_pages.numel():
            self._done.append(request.order.ticket)
            return
        assert capture.dense_blocks is not None
        pages = satellite_pages(
            self.assignment, self.clusters.satellites, capture.dense_blocks[:num_pages]
        )
        request.offload_ticket = next(self._tickets)
        self.swap.offload(
            Transfer(request.offload_ticket, pages.flatten(), request.host_pages.flatten())
        )
        self.counters.pages_offloaded += pages.numel()

    def _refuse(self, order: CompactionOrder, num_pages: int) -> None:
        self._refused.append(order.ticket)
        self._dense_reason[order.request_id] = HOST_POOL_FULL
        logger.warning(
            "HeteroCache: request %s stays dense: its satellites need %d host pages and %d are "
            "free; raise cpu_pool_gib or lower --max-num-seqs.",
            order.request_id,
            len(self.clusters.satellites) * num_pages,
            self.host_pool.num_free,
        )

    def _complete_transfers(self) -> None:
        """Make what arrived visible, and go on with plans that waited for spare pages.

        With a synchronous swap manager this carries out whole plans at once; with an
        asynchronous one it returns as soon as nothing more has arrived.
        """
        owners = {ticket: r for r in self._requests.values() for ticket in r.in_flight}
        offloads = {r.offload_ticket: r for r in self._requests.values()}
        while completed := self.swap.take_completed():
            for ticket in completed:
                if ticket in offloads:
                    offloads[ticket].offload_ticket = None
                    self._done.append(offloads[ticket].order.ticket)
                elif ticket in owners:
                    request = owners[ticket]
                    self._retriever.complete(request, ticket)
                    self._retriever.submit(request)
                    owners |= dict.fromkeys(request.in_flight, request)

    def _release(self, request: CompactRequest) -> None:
        offload = [] if request.offload_ticket is None else [request.offload_ticket]
        self.swap.settle([*offload, *request.in_flight])
        self.table.release(request.slot)
        self.host_pool.release(request.host_pages)

    def _page_counts(self, request: CompactRequest) -> PageCounts:
        spares = self.table.spare_entries(request.slot)
        spare = spares.stop - spares.start
        owned = len(request.order.block_ids) * self.assignment.num_heads
        return PageCounts(owned - spare, request.host_pages.numel(), spare)
