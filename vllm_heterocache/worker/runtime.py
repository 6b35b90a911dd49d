"""Worker side: what happens around each forward pass (the step protocol of docs/design.md)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_heterocache.calibration.probe import AttentionProbe
from vllm_heterocache.compat.engine import RequestIdsReader
from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.dense_pages import gather_dense
from vllm_heterocache.kernels.tables import DecodeRows, drift_counters
from vllm_heterocache.kernels.values import DriftCounter
from vllm_heterocache.metrics import Counters, PageCounts, worker_snapshot
from vllm_heterocache.worker.answers import Answers
from vllm_heterocache.worker.compaction import PromptCompactor
from vllm_heterocache.worker.fallbacks import (
    CAPTURE_LIMIT,
    TABLE_FULL,
    stays_dense,
    stays_short_of_reference_queries,
    stays_without_retrieval,
)
from vllm_heterocache.worker.finding import Finding
from vllm_heterocache.worker.host.host_copies import HostCopies
from vllm_heterocache.worker.host.host_pool import HostPool
from vllm_heterocache.worker.host.swap import SwapManager
from vllm_heterocache.worker.observe.prompt_observer import PromptObserver
from vllm_heterocache.worker.ops.interface import Ops
from vllm_heterocache.worker.rank import Rank
from vllm_heterocache.worker.requests import CompactRequest, FinishedPrefill, HostCopy
from vllm_heterocache.worker.retrieval import Retriever
from vllm_heterocache.worker.row_buffers import RowBuffers
from vllm_heterocache.worker.row_counter import RowCounter
from vllm_heterocache.worker.step_selection import StepSelection, first_queries
from vllm_heterocache.worker.tables.integrity import check_table
from vllm_heterocache.worker.tables.page_table import PageTable
from vllm_heterocache.worker.tables.upload import upload

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_heterocache.compat import AttentionLayer
    from vllm_heterocache.messages import CompactionOrder, PrefillStart
    from vllm_heterocache.worker.batch import Batch, KeptQueries, PrefillBatch

logger = logging.getLogger("vllm.heterocache")


@dataclass
class StepState:
    """What one step gathers for its own end."""

    finished: dict[str, FinishedPrefill]
    decoded: list[CompactRequest | None]  # of each decode row
    copies: list[tuple[HostCopy, torch.Tensor]]  # prompt blocks that this step completes


# A number of such bytes is NaN in every dtype of a pool, or else large but finite: vLLM's own
# attention on the CPU multiplies what it masks by zero.
NAN_BYTE, LARGE_BYTE = 0xFF, 0x5F


@dataclass(eq=False, kw_only=True)
class HeteroCacheRuntime:
    """Follows requests through a worker: compaction, page lists, drift and retrieval.

    Order within a step: `begin_step` (requests that left, compaction of prompts that the step
    before completed, new orders), `begin_batch` (the metadata builder), the forward pass (which
    reads page lists and leaves the scores and queries behind), `after_forward` (drift and
    retrieval, copies to the host), `take_answers`. A prompt's first token thus leaves before its
    compaction begins.

    `assemble.assemble_runtime` makes it, whole, where the KV pool exists.
    """

    rank: Rank
    num_blocks: int  # kernel blocks of the KV pool
    table: PageTable
    ops: Ops
    host_pool: HostPool
    swap: SwapManager
    host_copies: HostCopies
    observer: PromptObserver
    step_selection: StepSelection | None
    compactor: PromptCompactor
    retriever: Retriever | Finding
    rows: RowBuffers
    counters: Counters
    row_counter: RowCounter
    answers: Answers
    request_ids: RequestIdsReader
    probe: AttentionProbe | None = None  # of a calibration under way
    poison_byte: int = NAN_BYTE  # of freed blocks, for debugging
    _requests: dict[str, CompactRequest] = field(default_factory=dict)
    _finished: dict[str, FinishedPrefill] = field(default_factory=dict)  # to be compacted
    _warned_of: set[str] = field(default_factory=set)
    _step: StepState | None = None

    def __post_init__(self) -> None:
        self._leads, self._finds = self.rank.leads, self.rank.finds
        on_cpu = self.ops.memory.pool.device.type == "cpu"
        self._device_counters = drift_counters("cpu", pin_memory=not on_cpu)

    def request(self, request_id: str) -> CompactRequest | None:
        """The state of a compacted request; None for others."""
        return self._requests.get(request_id)

    # --- before the forward pass ---

    def begin_step(
        self,
        gone: Iterable[str],
        starts: Iterable[PrefillStart] = (),
        orders: Iterable[CompactionOrder] = (),
        poison: list[int] | None = None,
    ) -> None:
        """Forget requests that finished or were preempted, compact the prompts that the step before
        completed, and take the step's orders.

        `poison` (debugging) names blocks that were freed: nothing may read them any more.
        """
        for request_id in gone:
            self.forget(request_id)
        if self._finished:
            self.compact_finished()
        if poison:
            pool = self.ops.memory.pool.view(torch.uint8).view(self.num_blocks, -1)
            pool[poison] = self.poison_byte
        for start in starts:
            if self.retriever.is_watching:
                self.host_copies.start(start.request_id, start.num_tokens // PAGE_SIZE)
            self.observer.start(start.request_id, start.num_tokens)
        finished = {order.request_id: FinishedPrefill(order) for order in orders}
        for prefill in finished.values():
            self.observer.start(prefill.order.request_id, prefill.order.num_tokens)
        self._step = StepState(finished, [], [])

    def begin_batch(self, batch: Batch) -> list[KeptQueries]:
        """Note how each row is to be served.

        Returns:
            Queries of prefill rows that are to be kept. Decode rows store theirs by themselves.
        """
        self.observer.begin_batch()
        ids = []
        if self._step is not None:  # else vLLM measures, captures or warms up: rows of no request
            self._step.decoded, self._step.copies = [], []
            ids = self.request_ids(batch.query_lens.size, batch.req_idx)
        query_lens, seq_lens = batch.query_lens.tolist(), batch.seq_lens.tolist()
        last_token = -1
        from_prefill: list[KeptQueries] = []
        table_slots: dict[int, int] = {}
        from_decode: list[KeptQueries] = []
        for row, request_id in enumerate(ids):
            last_token += query_lens[row]
            request = self._requests.get(request_id)
            if request is not None:
                assert row < batch.num_decodes, "a compacted request prefills"
                table_slots[row] = request.table_slot
                self._begin_compact_row(request, seq_lens[row])
                continue
            kept = self._begin_row(
                batch, row, request_id, query_lens[row], seq_lens[row], last_token
            )
            if kept is not None and row < batch.num_decodes:
                from_decode.append(kept)
            elif kept is not None:
                from_prefill.append(kept)
        due_rows = [] if self._step is None else self.retriever.begin_batch(self._step.decoded)
        self.rows.fill(table_slots, from_decode, due_rows, self.table.dense_slot)
        return from_prefill

    def _begin_compact_row(self, request: CompactRequest, num_tokens: int) -> None:
        """Count the row. Nothing of its prompt is observed or copied any more."""
        assert self._step is not None
        self._step.decoded.append(request)
        self.row_counter.count_compact(num_tokens, request)

    def _begin_row(
        self,
        batch: Batch,
        row: int,
        request_id: str,
        num_new: int,
        num_tokens: int,
        last_token: int,
    ) -> KeptQueries | None:
        """Count the row of a request that is not compacted; return which of its queries are kept.

        Args:
            num_new: queries of the row.
            num_tokens: tokens of the request, the new ones included.
            last_token: the row's last token in the batch.
        """
        assert self._step is not None
        is_decode = row < batch.num_decodes
        if is_decode:
            self._step.decoded.append(None)
        kept = self.observer.begin_row(
            request_id,
            num_new,
            num_tokens,
            last_token,
            is_decode,
            batch.block_table[row],
        )
        finished = self._step.finished.get(request_id)
        if finished is not None:
            self._finish_prefill(finished, kept, num_tokens, batch.block_table[row])
        elif is_decode and not batch.is_prefilling[row]:
            self.row_counter.count_dense(num_tokens, self.answers.reason(request_id))
        copy = self.host_copies.of_prefill(request_id)
        if copy is not None:
            end = min(num_tokens // PAGE_SIZE, copy.host_blocks.size)
            blocks = batch.block_table[row, copy.num_copied : end].clone()
            self._step.copies.append((copy, blocks))
        return kept

    def _finish_prefill(
        self,
        finished: FinishedPrefill,
        kept: KeptQueries | None,
        num_tokens: int,
        blocks: torch.Tensor,
    ) -> None:
        """Note what the compaction at the beginning of the next step will need, or refuse it."""
        assert self._step is not None
        order = finished.order
        assert num_tokens >= order.num_tokens
        if kept is None:
            del self._step.finished[order.request_id]
            self._refuse(order, CAPTURE_LIMIT)
            return
        finished.query_place = kept.index + kept.count - 1
        finished.masses = self.observer.masses(order.request_id)
        finished.references = self.observer.references(order.request_id)
        finished.dense_blocks = blocks[: -(-order.num_tokens // PAGE_SIZE)].clone()

    # --- the forward pass, layer by layer ---

    def write_kv(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """See `Ops.write_kv`."""
        self.ops.write_kv(layer, key, value, kv_cache, slot_mapping)

    def decode(
        self, layer: int, query: torch.Tensor, rows: DecodeRows, output: torch.Tensor
    ) -> None:
        """Attention of the decode rows in one layer.

        It is what a full CUDA graph captures: everything it reads keeps its address.

        Args:
            query: [num_tokens, num_q_heads, head_dim]; the decode rows' tokens come first.
            output: [num_tokens, num_q_heads, head_dim], written in place.
        """
        if layer == 0:
            self.ops.split_decode(rows)
        num_queries = rows.query_place.shape[0]
        query, output = query[:num_queries], output[:num_queries]
        if self.step_selection is not None:
            self.step_selection.choose(query, rows, layer)
        if self._finds[layer]:
            protected = self.rank.plan.config.protected
            self.ops.find_pages(first_queries(query, rows), rows, layer, protected)
        self.ops.decode(query, rows, layer, output, self._leads[layer])

    def prefill(
        self,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: PrefillBatch,
        output: torch.Tensor,
        kept: list[KeptQueries],
    ) -> None:
        """Attention of the prefill rows in one layer, and what selection needs of their queries.

        Args:
            query: [num_tokens, num_q_heads, head_dim] of the whole batch.
            kv_cache: [num_blocks, H, page_size, 2 * head_dim] in the pool's dtype, already holding
                the new tokens.
            output: [num_tokens, num_q_heads, head_dim], written in place.
        """
        self.ops.prefill(layer, query, kv_cache, batch, output)
        self.observer.observe(layer, query, kept)
        if self.probe is not None:
            self._serve_probe(self.probe, layer, query, kv_cache, batch)

    def _serve_probe(
        self,
        probe: AttentionProbe,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: PrefillBatch,
    ) -> None:
        scales = self.ops.memory.layer_scales(layer)
        for row, num_tokens in enumerate(batch.num_tokens):
            blocks = batch.block_table[row, : -(-num_tokens // PAGE_SIZE)]
            keys, _ = gather_dense(kv_cache, blocks, num_tokens, scales)
            first, end = (batch.first_token + s for s in batch.starts[row : row + 2])
            probe.observe(
                self.rank.layer_ids[layer],
                query[first:end],
                num_tokens - (end - first),
                keys.transpose(0, 1),
            )

    # --- after the forward pass ---

    def after_forward(self) -> None:
        """Check drift, note what finished its prefill, and send pages to the host."""
        step, self._step = self._step, None
        if step is None:
            return
        self.retriever.check()
        for copy, blocks in step.copies:
            self.host_copies.send(copy, blocks)
        self.observer.finish_step()
        self._finished |= step.finished
        if step.decoded:
            self._device_counters.copy_(self.ops.memory.counters, non_blocking=True)

    def take_answers(self) -> tuple[list[int], list[int]]:
        """Tickets whose dense blocks are no longer needed, and tickets refused.

        Where drafts are verified, vLLM asks for them before it ends the forward pass.
        """
        self._complete_offloads()
        return self.answers.take()

    def _complete_offloads(self) -> None:
        """Note the requests whose pages have all arrived on the host."""
        if completed := set(self.swap.take_completed()):
            for request in self._requests.values():
                if request.offload_mark in completed:
                    request.offload_mark = None
                    self.answers.done(request.order.ticket)

    def snapshot(self) -> dict:
        """Counters and held pages, for the stats; the device's are those of a recent step."""
        counts = self._device_counters.tolist()
        self.counters.drift_checks = counts[DriftCounter.CHECKS]
        self.counters.drift_triggers = counts[DriftCounter.TRIGGERS]
        self.counters.pages_fetched = counts[DriftCounter.PAGES_FETCHED]
        self.counters.fetches_late += self.swap.take_late()
        held = {r.order.ticket: self._page_counts(r) for r in self._requests.values()}
        return worker_snapshot(self.counters, held, self.rank.assignment.num_heads)

    def reset_counters(self) -> None:
        """Forget what was counted so far (warm-up)."""
        self.swap.take_late()
        self.counters.reset()
        self.ops.memory.counters.zero_()
        self._device_counters.zero_()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is accounted for exactly once."""
        requests = self._requests.values()
        check_table(
            self.table,
            {
                r.table_slot: r.order.block_ids
                if r.dense_blocks is None
                else r.dense_blocks.tolist()
                for r in requests
            },
        )
        self.host_copies.check_integrity(r.host for r in requests if r.host is not None)

    # --- compaction ---

    @torch.inference_mode()  # as the forward pass, whose tensors it reads and writes
    def compact_finished(self) -> None:
        """Compact the prompts whose prefill is complete."""
        finished, self._finished = self._finished, {}
        for request_id, prefill in finished.items():
            self.compact(prefill)
            self.observer.forget(request_id)

    def compact(self, finished: FinishedPrefill) -> None:
        """Compact a prompt whose prefill is complete, or refuse it. Its satellites' pages go to the
        host; where the host pool is full, the request does without retrieval."""
        order, blocks = finished.order, finished.dense_blocks
        assert blocks is not None
        num_pages = order.num_tokens // PAGE_SIZE
        num_stripes = self.compactor.num_blocks(order)
        if not self.table.has_room(num_stripes):
            self._refuse(order, TABLE_FULL)
            return
        if self.table.closes_gaps(num_stripes):
            self.swap.settle_all()  # the moves of a retrieval may still be listed from its rows
        is_watching = self.retriever.is_watching
        host = self.host_copies.take(order.request_id, num_pages, is_watching)
        if is_watching and host is None:
            self.counters.requests_without_retrieval += 1
            free_blocks = self.host_pool.num_free
            text = stays_without_retrieval(order.request_id, num_pages, free_blocks)
            self._warn_once("no retrieval", text)
        if missing := self.observer.num_references_without_room(order.request_id):
            self.counters.requests_short_of_reference_queries += 1
            text = stays_short_of_reference_queries(order.request_id, missing)
            self._warn_once("reference queries", text)
        request = self.compactor.compact(finished, host)
        if host is None:
            self.answers.done(order.ticket)
        else:
            self.host_copies.send(host, blocks[host.num_copied : num_pages])
            host_blocks = upload(host.host_blocks.astype(np.int32), blocks.device)
            self.table.set_host_blocks(request.table_slot, host_blocks)
            request.offload_mark = self.swap.mark()
        self._requests[order.request_id] = request
        self.counters.requests_compacted += 1

    def _refuse(self, order: CompactionOrder, reason: str) -> None:
        self.answers.refused(order.ticket, order.request_id, reason)
        self.observer.forget(order.request_id)
        self.host_copies.forget(order.request_id)
        text = stays_dense(
            order.request_id,
            reason,
            num_query_windows=self.rank.geometry.num_query_windows,
            window=self.rank.geometry.window,
        )
        self._warn_once(reason, text)

    def _warn_once(self, of: str, text: str) -> None:
        """Metrics count what happens again."""
        if of not in self._warned_of:
            self._warned_of.add(of)
            logger.warning("%s", text)

    def forget(self, request_id: str) -> None:
        """The request has left, or starts again: its pages are given away."""
        self._finished.pop(request_id, None)
        self.observer.forget(request_id)
        self.answers.forget(request_id)
        self.host_copies.forget(request_id)
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.retriever.forget(request)
            self.table.release(request.table_slot)
            if request.host is not None:
                self.host_copies.release(request.host)

    def _page_counts(self, request: CompactRequest) -> PageCounts:
        if request.dense_blocks is not None:
            return PageCounts(0, 0, 0)  # the scheduler counts its blocks as dense
        spare = self.table.num_spares(request.table_slot)
        owned = len(request.order.block_ids) * self.rank.assignment.num_heads
        host = 0 if request.host is None else request.host.host_blocks.size
        return PageCounts(owned - spare, host * self.host_pool.num_satellites, spare)
