"""Worker side: what a prompt's evicted tokens leave behind, fitted and written to its pages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.matched_tokens import (
    REFERENCE_POSITIONS,
    means_among,
    most_pages,
)
from vllm_heterocache.kernels.kv_scales import logit_scales
from vllm_heterocache.kernels.matched_tokens import (
    HEADS_AT_A_TIME,
    Candidates,
    MatchKernels,
    find_candidates,
    fit_bytes,
    match_candidates,
)
from vllm_heterocache.kernels.run_means import RunMeans, beside_means, run_means
from vllm_heterocache.worker.observe.moved_queries import MoveQueries, distances_behind
from vllm_heterocache.worker.observe.page_mass import by_kv_head, rows_of_sinks
from vllm_heterocache.worker.stand_ins.pages import storable, write_stand_ins
from vllm_heterocache.worker.tables.upload import upload

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_heterocache.worker.ops.interface import Geometry, Memory
    from vllm_heterocache.worker.requests import References
    from vllm_heterocache.worker.tables.page_table import PageTable

# Memory that is aimed at for the fits at a time. Their candidates take less than a quarter of it,
# so that the K and V which are read before have the rest.
MOST_BYTES = 1 << 30
MOST_READ_BYTES = MOST_BYTES * 3 // 4


def fitting_bytes(geometry: Geometry, gpu_budget: float, num_tokens: int) -> int:
    """Memory that fitting the matched tokens of a prompt takes at most at a time."""
    g = geometry
    queries = 4 * REFERENCE_POSITIONS * math.prod(g.query_shape)
    most_matched = most_pages(g.group, gpu_budget) * PAGE_SIZE
    of_fit = head_fit_bytes(g, REFERENCE_POSITIONS, most_matched)
    of_read = max(MOST_READ_BYTES, read_bytes(g, num_tokens)) + MOST_BYTES - MOST_READ_BYTES
    return queries + max(MOST_BYTES, of_fit, of_read) + HEADS_AT_A_TIME * of_fit


def read_bytes(geometry: Geometry, num_tokens: int) -> int:
    """Memory for the K and V of a head, as they are and as much again for their attention."""
    return 4 * num_tokens * geometry.head_dim * geometry.dtype.itemsize


def head_fit_bytes(geometry: Geometry, num_positions: int, num_matched: int) -> int:
    """Memory for the candidates of a head, and for their fit to the queries of some tokens."""
    return fit_bytes(num_positions * geometry.group, geometry.head_dim, num_matched)


class _Prompt(NamedTuple):
    """What the fits of all heads of a prompt are made from."""

    table_slot: int
    dense_blocks: torch.Tensor  # [P] int32
    is_evicted: torch.Tensor  # [L * H, P] bool
    queries: torch.Tensor  # [L * H, N, D] fp32, times what logits are scaled by
    sinks: torch.Tensor | None  # [L * H, N] fp32

    @property
    def device(self) -> torch.device:
        return self.dense_blocks.device


class MatchedTokensFiller:
    """Fills the stand-in pages of a compacted prompt: with means first, then with matched tokens.

    All of it is enqueued; nothing waits for the device, whose tables alone know which pages were
    evicted.
    """

    def __init__(
        self,
        geometry: Geometry,
        memory: Memory,
        table: PageTable,
        has_means: np.ndarray,
        move_queries: MoveQueries | None,
        kernels: MatchKernels,
    ) -> None:
        """
        Args:
            has_means: [L] bool, layers with means among the matched tokens.
            move_queries: moves queries behind the prompt; None: they stay as they are.
            kernels: of the platform.
        """
        self._geometry, self._memory, self._table = geometry, memory, table
        self._has_means, self._move_queries, self._kernels = has_means, move_queries, kernels

    def fill(self, table_slot: int, dense_blocks: torch.Tensor, references: References) -> None:
        """Fit and write what stands for the evicted tokens of all heads.

        Many heads at a time, because a fit is many small operations; those with about as many
        matched tokens together, because all have the room of the largest.

        Args:
            table_slot: of the request, whose lists are chosen.
            dense_blocks: [P] int32, blocks of the prompt's full pages.
            references: queries of the prompt.
        """
        pages = self._table.extents[table_slot].stand_in_pages
        num_means = means_among(pages, self._has_means).flatten()
        num_matched = pages.flatten() * PAGE_SIZE - num_means
        queries, is_evicted = self._queries(references), self._evicted_pages(table_slot)
        sinks = self._sinks(queries.shape[1])
        prompt = _Prompt(table_slot, dense_blocks, is_evicted, queries, sinks)
        order = np.argsort(-num_matched, kind="stable")[: np.count_nonzero(num_matched)]
        while order.size:
            most = int(num_matched[order[0]])
            of_head = head_fit_bytes(self._geometry, references.queries.shape[0], most)
            some, order = np.split(order, [max(1, MOST_BYTES // of_head)])
            self._fill_heads(prompt, some, num_means[some], num_matched[some])

    def _fill_heads(
        self, prompt: _Prompt, some: np.ndarray, num_means: np.ndarray, num_matched: np.ndarray
    ) -> None:
        """Nothing of these heads takes memory once the next ones are filled.

        Args:
            some: [B], layer * H + KV head.
            num_means, num_matched: [B], tokens of each of these heads.
        """
        most, soft_cap, device = int(num_matched.max()), self._geometry.soft_cap, prompt.device
        heads, *counts = (upload(one, device) for one in (some, num_means, num_matched))
        queries = prompt.queries[heads]
        at_a_time, most_means = self._heads_to_read(prompt), int(num_means.max())
        means, found = _joined(
            self._read(prompt, part, count, most_means, most)
            for part, count in zip(heads.split(at_a_time), counts[0].split(at_a_time), strict=True)
        )
        found = beside_means(found, queries, means, soft_cap)
        matched = match_candidates(
            found, queries, most, counts[1], kernels=self._kernels, soft_cap=soft_cap
        )
        nothing, memory, slot = torch.zeros_like(counts[0]), self._memory, prompt.table_slot
        write_stand_ins(memory, slot, heads, nothing, counts[0], int(num_means.sum()), means)
        write_stand_ins(memory, slot, heads, counts[0], counts[1], int(num_matched.sum()), matched)

    def _queries(self, references: References) -> torch.Tensor:
        """[L * H, N, D] fp32, of all query heads of a group, times what logits are scaled by."""
        g, distances = self._geometry, distances_behind(references)
        of_layers = []
        for layer in range(g.num_layers):
            queries = references.queries[:, layer]
            if self._move_queries is not None:
                queries = self._move_queries(layer, queries, distances)
            scale = logit_scales(g.scale, self._memory.kv_scales, layer)
            of_layers.append(by_kv_head(queries.float(), g.num_kv_heads) * scale)
        return torch.cat(of_layers)

    def _sinks(self, num_queries: int) -> torch.Tensor | None:
        """[L * H, N] fp32, of the query heads that `_queries` [L * H, N, D] belong to."""
        g, sinks = self._geometry, self._memory.sink_logits
        if sinks is None:
            return None
        return torch.cat([rows_of_sinks(layer, g.num_kv_heads, num_queries) for layer in sinks])

    def _evicted_pages(self, table_slot: int) -> torch.Tensor:
        """[L * H, P] bool, True where the head does not list the page."""
        table, extent = self._table, self._table.extents[table_slot]
        heads, num_pages = extent.budgets.size, extent.num_pages
        first, device = table.base(table_slot), self._memory.pool.device
        positions = table.tensors.positions[first : first + extent.num_listed].long()
        budgets = table.tensors.count[table_slot] + table.tensors.stand_in_pages[table_slot]
        head = torch.repeat_interleave(budgets.flatten().long(), output_size=extent.num_listed)
        # stand-in pages have position -1, and go to one place more
        place = torch.where(positions >= 0, head * num_pages + positions, heads * num_pages)
        is_evicted = torch.ones(heads * num_pages + 1, dtype=torch.bool, device=device)
        is_evicted.index_fill_(0, place, False)  # an assignment would wait for the device
        return is_evicted[:-1].view(heads, num_pages)

    def _heads_to_read(self, prompt: _Prompt) -> int:
        """Heads whose K and V are read at a time."""
        num_tokens = prompt.dense_blocks.shape[0] * PAGE_SIZE
        return max(1, MOST_READ_BYTES // read_bytes(self._geometry, num_tokens))

    def _read(
        self,
        prompt: _Prompt,
        heads: torch.Tensor,
        num_means: torch.Tensor,
        most_means: int,
        most_matched: int,
    ) -> tuple[RunMeans, Candidates]:
        """Means of some heads, and candidates as for the largest number of matched tokens. Their K
        and V are let go.

        Args:
            heads: [B] int64, layer * H + KV head.
            num_means: [B] int64, at most `most_means`.
            most_matched: that number.
        """
        g, pool, is_evicted = self._geometry, self._memory.pool, prompt.is_evicted[heads]
        first_page = prompt.dense_blocks.long() * (g.num_layers * g.num_kv_heads)
        kv = storable(pool)[first_page + heads[:, None]].view(pool.dtype)  # [B, P, page, 2 * D]
        means = run_means(kv, is_evicted, num_means, most_means)
        keys, values = kv.flatten(1, 2).split(g.head_dim, dim=-1)
        found = find_candidates(
            keys,
            values,
            is_evicted.repeat_interleave(PAGE_SIZE, dim=1),
            prompt.queries[heads],
            most_matched,
            self._kernels,
            None if prompt.sinks is None else prompt.sinks[heads],
            g.soft_cap,
        )
        return means, found


def _joined(parts: Iterable[tuple[RunMeans, Candidates]]) -> tuple[RunMeans, Candidates]:
    """Of all heads of the parts."""
    means, found = zip(*parts, strict=True)
    return RunMeans(*map(torch.cat, zip(*means, strict=True))), Candidates(
        *map(torch.cat, zip(*found, strict=True))
    )
