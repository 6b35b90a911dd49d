"""Worker side: what happens around each forward pass (the step protocol of docs/design.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_heterocache.calibration.probe import AttentionProbe
from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.kernels.tables import HeadMaps, drift_counters
from vllm_heterocache.kernels.values import DriftCounter
from vllm_heterocache.messages import CompactionOrder, PrefillStart
from vllm_heterocache.metrics import Counters, PageCounts, worker_snapshot
from vllm_heterocache.policies.policy import ALL_QUERIES, StepChoice
from vllm_heterocache.startup.serving_plan import serving_policy
from vllm_heterocache.worker.batch import Batch, KeptQueries
from vllm_heterocache.worker.compaction import PromptCompactor
from vllm_heterocache.worker.host.host_copies import HostCopies
from vllm_heterocache.worker.host.host_pool import CpuPool
from vllm_heterocache.worker.host.swap import SwapManager
from vllm_heterocache.worker.observe.prompt_observer import PromptObserver
from vllm_heterocache.worker.ops.interface import Geometry, Ops
from vllm_heterocache.worker.requests import (
    CAPTURE_LIMIT,
    COMPACTED,
    HOST_POOL_FULL,
    SHORT_PROMPT,
    TABLE_FULL,
    Capture,
    CompactRequest,
    HostCopy,
    stays_dense,
)
from vllm_heterocache.worker.retrieval import Retriever
from vllm_heterocache.worker.step_selection import StepSelection
from vllm_heterocache.worker.tables.integrity import check_table
from vllm_heterocache.worker.tables.page_table import PageTable
from vllm_heterocache.worker.tables.upload import StagedTensor, upload

logger = init_logger("vllm.heterocache")

# What choosing at each step reads of a compressed head, in pages for each page of the prompt: the
# smallest and largest key of its 16, or all keys.
CHOOSING_PAGES = {None: 0.0, StepChoice.SUMMARIES: 1 / 16, StepChoice.EXACT: 1 / 2}


@dataclass
class StepState:
    """What one step gathers for its own end."""

    captures: dict[str, Capture]
    decoded: list[CompactRequest | None]  # of each decode row
    copies: list[tuple[HostCopy, torch.Tensor]]  # prompt blocks that this step completes


class HeteroCacheRuntime:
    """Follows requests through a worker: compaction, page lists, drift and retrieval.

    Order within a step: `begin_step` (requests that left, new orders), `begin_batch` (the
    metadata builder), the forward pass (which reads page lists and leaves the scores and queries
    behind), `after_forward` (drift and retrieval, compaction, copies to the host),
    `take_answers`.
    """

    def __init__(
        self,
        config: HeteroCacheConfig,
        assignment: HeadAssignment,
        geometry: Geometry,
        layer_ids: list[int],
        model_layers: int,
        rank: int,
        steps_in_flight: int,
        request_ids_of_batch: Callable[[int], list[str]],
        num_micro_batches: int = 1,
    ) -> None:
        assert assignment.roles.shape == (geometry.num_layers, geometry.num_kv_heads)
        self.config, self.assignment, self.geometry = config, assignment, geometry
        self.policy = serving_policy(config)
        self.layer_ids, self.model_layers, self.rank = layer_ids, model_layers, rank
        self.counters = Counters()
        self.probe: AttentionProbe | None = None
        self.has_pool = False  # set by `bind_pool`; the pools' attributes exist only then
        self._depth, self._num_micro_batches = steps_in_flight + 2, num_micro_batches
        self._request_ids_of_batch = request_ids_of_batch
        self._requests: dict[str, CompactRequest] = {}
        self._dense_reason: dict[str, str] = {}
        self._step: StepState | None = None
        self._done: list[int] = []
        self._refused: list[int] = []

    def bind_pool(
        self,
        num_blocks: int,
        table: PageTable,
        ops: Ops,
        host_pool: CpuPool,
        swap: SwapManager,
    ) -> None:
        """Start with an empty pool of `num_blocks` blocks."""
        max_rows, device = self.geometry.max_rows, ops.memory.pool.device
        self.table, self.ops, self.host_pool, self.swap = table, ops, host_pool, swap
        self.host_copies = HostCopies(host_pool, swap, self.counters)
        self._rows = StagedTensor(2 * max_rows, self._depth, device)
        self._device_counters = drift_counters("cpu", pin_memory=device.type != "cpu")
        self.retriever = Retriever(
            self.config,
            self.maps,
            table,
            ops,
            swap,
            self.counters,
            max_rows,
            self._depth,
            self._num_micro_batches,
        )
        sums_masses = self.policy.observed_queries == ALL_QUERIES
        self.observer = PromptObserver(self.geometry, ops.memory, sums_masses)
        self.step_selection = (
            StepSelection(self.policy.step_selection, self.config.protected, self.assignment, ops)
            if self.policy.step_selection
            else None
        )
        self.compactor = PromptCompactor(
            self.config,
            self.policy,
            self.assignment,
            self.geometry,
            self.layer_ids,
            self.model_layers,
            table,
            ops,
            self.step_selection,
        )
        self.num_blocks = num_blocks
        self.has_pool = True

    def close(self) -> None:
        """Let go of the pools, whoever still refers to this object (vLLM keeps globals)."""
        if self.has_pool:
            self.swap.close()
            self.has_pool = False
            del self.table, self.ops, self.host_pool, self.swap, self.retriever
            del self.host_copies, self.observer, self.step_selection, self.compactor

    @property
    def maps(self) -> HeadMaps:
        return self.ops.memory.maps

    def request(self, request_id: str) -> CompactRequest | None:
        """The state of a compacted request; None for others."""
        return self._requests.get(request_id)

    @property
    def due_pivot(self) -> torch.Tensor:
        """[L, H] int32: pivots whose page scores this step writes, -1 for other heads."""
        return self.retriever.due_pivot

    # --- before the forward pass ---

    def begin_step(
        self,
        gone: Iterable[str],
        starts: Iterable[PrefillStart] = (),
        orders: Iterable[CompactionOrder] = (),
        poison: list[int] | None = None,
    ) -> None:
        """Forget requests that finished or were preempted, and take the step's orders.

        `poison` (debugging) names blocks that were freed: nothing may read them any more.
        """
        for request_id in gone:
            self.forget(request_id)
        if poison:
            self.ops.memory.pool.view(self.num_blocks, -1)[poison] = torch.nan
        self.retriever.begin_step(len(self._requests))
        for start in starts:
            if self.retriever.is_watching:
                num_pages = start.num_tokens // PAGE_SIZE
                self.host_copies.start(start.request_id, num_pages)
            self.observer.start(start.request_id, start.num_tokens)
        captures = {order.request_id: Capture(order) for order in orders}
        for order in orders:
            self.observer.start(order.request_id, order.num_tokens)
        self._step = StepState(captures, [], [])

    def begin_batch(self, batch: Batch) -> list[KeptQueries]:
        """Note how each row is to be served.

        Returns:
            Queries of prefill rows that are to be kept. Decode rows store theirs by themselves.
        """
        num_rows, max_rows = batch.query_lens.size, self.geometry.max_rows
        values = np.empty((2, max_rows), np.int32)
        values[0], values[1] = self.table.dense_slot, -1
        last_tokens = np.cumsum(batch.query_lens) - 1
        from_prefill = []
        ids = []
        self.observer.begin_batch()
        if self._step is not None:  # else vLLM measures or captures, with rows of no request
            self._step.decoded, self._step.copies = [], []
            ids = self._request_ids_of_batch(num_rows)
        for row, request_id in enumerate(ids):
            kept = self._begin_row(batch, row, request_id, int(last_tokens[row]))
            is_decode = row < batch.num_decodes
            request = self._requests.get(request_id)
            assert is_decode or request is None, "a compacted request is not decoding"
            if request is not None:
                values[0, row] = request.slot
            if kept is not None and is_decode:
                values[1, row] = kept.index
            elif kept is not None:
                from_prefill.append(kept)
        self._rows.write(values)
        return from_prefill

    def row_buffers(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot [num_rows] and query index [num_rows] int32 of each decode row, at addresses that
        never change."""
        flat, max_rows = self._rows.tensor, self.geometry.max_rows
        return flat[:num_rows], flat[max_rows : max_rows + num_rows]

    def _begin_row(
        self, batch: Batch, row: int, request_id: str, last_token: int
    ) -> KeptQueries | None:
        """Count the row; return which of its queries are kept."""
        assert self._step is not None
        request = self._requests.get(request_id)
        is_decode, num_tokens = row < batch.num_decodes, int(batch.seq_lens[row])
        if is_decode:
            self._step.decoded.append(request)
        kept = self.observer.begin_row(
            request_id,
            int(batch.query_lens[row]),
            num_tokens,
            last_token,
            is_decode,
            batch.block_table[row],
        )
        capture = self._step.captures.get(request_id)
        if capture is not None:
            self._set_capture(capture, kept, num_tokens, batch.block_table[row])
        elif request is not None:
            self.counters.decode_rows["compact", COMPACTED] += 1
            self._count_pages(num_tokens, request)
        elif is_decode and not batch.is_prefilling[row]:
            reason = self._dense_reason.get(request_id, SHORT_PROMPT)
            self.counters.decode_rows["dense", reason] += 1
            self._count_pages(num_tokens, None)
        copy = self.host_copies.of_prefill(request_id)
        if copy is not None:
            end = min(num_tokens // PAGE_SIZE, copy.host_blocks.size)
            blocks = batch.block_table[row, copy.num_copied : end].clone()
            self._step.copies.append((copy, blocks))
        return kept

    def _set_capture(
        self, capture: Capture, kept: KeptQueries | None, num_tokens: int, blocks: torch.Tensor
    ) -> None:
        """Note what the compaction at the end of the step will need, or refuse it."""
        assert self._step is not None
        order = capture.order
        assert num_tokens >= order.num_tokens
        if kept is None:
            del self._step.captures[order.request_id]
            self._refuse(order, CAPTURE_LIMIT)
            return
        capture.query = kept.index + kept.count - 1
        capture.masses = self.observer.masses(order.request_id)
        capture.dense_blocks = blocks[: -(-order.num_tokens // PAGE_SIZE)].clone()

    def _count_pages(self, num_tokens: int, request: CompactRequest | None) -> None:
        """Count what a decode row reads, in whole pages, and what full attention would."""
        heads = self.assignment.num_heads
        dense = read = heads * -(-num_tokens // PAGE_SIZE)
        if request is not None:
            prompt = request.order.num_tokens // PAGE_SIZE
            read += self.table.num_listed(request.slot) - heads * prompt
            choosing = CHOOSING_PAGES[self.policy.step_selection]
            read += int(choosing * (heads - self.assignment.num_full) * prompt)
        self.counters.decode_pages_dense += dense
        self.counters.decode_pages_read += read

    # --- after the forward pass ---

    def after_forward(self) -> None:
        """Check drift, compact what finished its prefill, and send pages to the host."""
        step, self._step = self._step, None
        if step is None:
            return
        self.retriever.check(step.decoded)
        for copy, blocks in step.copies:
            self.host_copies.send(copy, blocks)
        self.observer.finish_step()
        for request_id, capture in step.captures.items():
            self.compact(capture)
            self.observer.forget(request_id)
        if step.decoded:
            self._device_counters.copy_(self.ops.memory.counters, non_blocking=True)

    def take_answers(self) -> tuple[list[int], list[int]]:
        """Tickets whose dense blocks are no longer needed, and tickets refused; ends the step."""
        self._step = None  # also where there was no forward pass
        self._complete_offloads()
        done, refused = self._done, self._refused
        self._done, self._refused = [], []
        return done, refused

    def _complete_offloads(self) -> None:
        """Note the requests whose pages have all arrived on the host."""
        if completed := set(self.swap.take_completed()):
            for request in self._requests.values():
                if request.offload_mark in completed:
                    request.offload_mark = None
                    self._done.append(request.order.ticket)

    def snapshot(self) -> dict:
        """Counters and held pages, for the stats; the device's are those of a recent step."""
        counts = self._device_counters.tolist()
        self.counters.drift_checks = counts[DriftCounter.CHECKS]
        self.counters.drift_triggers = counts[DriftCounter.TRIGGERS]
        self.counters.pages_fetched = counts[DriftCounter.PAGES_FETCHED]
        held = {r.order.ticket: self._page_counts(r) for r in self._requests.values()}
        return worker_snapshot(self.counters, held, self.assignment.num_heads)

    def reset_counters(self) -> None:
        """Forget what was counted so far (warm-up)."""
        self.counters.__init__()
        self.ops.memory.counters.zero_()
        self._device_counters.zero_()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for exactly once."""
        requests = self._requests.values()
        check_table(
            self.table,
            {
                r.slot: r.order.block_ids if r.dense_blocks is None else r.dense_blocks.tolist()
                for r in requests
            },
        )
        self.host_copies.check_integrity(r.host for r in requests if r.host is not None)

    # --- compaction ---

    def compact(self, capture: Capture) -> None:
        """Compact a prompt whose prefill is complete and send its satellites' pages to the host,
        or refuse it."""
        order, blocks = capture.order, capture.dense_blocks
        assert blocks is not None
        num_pages = order.num_tokens // PAGE_SIZE
        if not self.table.has_room(compact_blocks(order.num_tokens, self.config.gpu_budget)):
            self._refuse(order, TABLE_FULL)
            return
        is_watching = self.retriever.is_watching
        host = self.host_copies.take(order.request_id, num_pages, is_watching)
        if is_watching and host is None:
            self._refuse(order, HOST_POOL_FULL)
            return
        request = self.compactor.compact(capture, host)
        if host is None:
            self._done.append(order.ticket)
        else:
            self.host_copies.send(host, blocks[host.num_copied : num_pages])
            host_blocks = upload(host.host_blocks.astype(np.int32), blocks.device)
            self.table.set_host_blocks(request.slot, host_blocks)
            request.offload_mark = self.swap.mark()
        self._requests[order.request_id] = request
        self.counters.requests_compacted += 1

    def _refuse(self, order: CompactionOrder, reason: str) -> None:
        self._refused.append(order.ticket)
        self.observer.forget(order.request_id)
        self.host_copies.forget(order.request_id)
        self._dense_reason[order.request_id] = reason
        text = stays_dense(
            order.request_id,
            reason,
            needed_blocks=order.num_tokens // PAGE_SIZE,
            free_blocks=self.host_pool.num_free,
            num_query_windows=self.geometry.num_query_windows,
            window=self.geometry.window,
        )
        logger.warning("%s", text)

    def forget(self, request_id: str) -> None:
        """The request has left, or starts again: its pages are given away."""
        self.observer.forget(request_id)
        self._dense_reason.pop(request_id, None)
        self.host_copies.forget(request_id)
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.retriever.forget(request)
            self.table.release(request.slot)
            if request.host is not None:
                self.host_copies.release(request.host)

    def _page_counts(self, request: CompactRequest) -> PageCounts:
        if request.dense_blocks is not None:
            return PageCounts(0, 0, 0)  # the scheduler counts its blocks as dense
        spare = self.table.num_spares(request.slot)
        owned = len(request.order.block_ids) * self.assignment.num_heads
        host = 0 if request.host is None else request.host.host_blocks.size
        return PageCounts(owned - spare, host * self.host_pool.num_satellites, spare)
