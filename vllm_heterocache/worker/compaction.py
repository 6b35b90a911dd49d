"""Worker side: which pages of a prompt stay, and where, when its prefill is complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment
from vllm_heterocache.heads.budget import compact_blocks, page_budgets, spare_pages
from vllm_heterocache.heads.evicted_means import mean_pages
from vllm_heterocache.heads.matched_tokens import matched_pages, most_pages
from vllm_heterocache.policies.policy import Policy
from vllm_heterocache.worker.observe.moved_queries import MoveQueries
from vllm_heterocache.worker.observe.observed_prompt import Observation
from vllm_heterocache.worker.ops.interface import Geometry, Ops
from vllm_heterocache.worker.requests import CompactRequest, FinishedPrefill, HostCopy, References
from vllm_heterocache.worker.stand_ins.centroids import CentroidsFiller
from vllm_heterocache.worker.stand_ins.matched_tokens import MatchedTokensFiller
from vllm_heterocache.worker.step_selection import StepSelection
from vllm_heterocache.worker.tables.page_table import PageTable
from vllm_heterocache.worker.tables.upload import upload

if TYPE_CHECKING:
    import torch

    from vllm_heterocache.messages import CompactionOrder


@dataclass(frozen=True)
class PromptCompactor:
    """Puts a prompt's pages in order as the policy says. All of it is enqueued; nothing waits."""

    config: HeteroCacheConfig
    policy: Policy
    assignment: HeadAssignment
    geometry: Geometry
    layer_ids: Sequence[int]  # of this worker's layers in the model
    model_layers: int
    table: PageTable
    ops: Ops
    step_selection: StepSelection | None
    matched_tokens: MatchedTokensFiller | None
    centroids: CentroidsFiller | None
    move_queries: MoveQueries | None  # behind the prompt; None where that is not known

    def compact(self, finished: FinishedPrefill, host: HostCopy | None) -> CompactRequest:
        """Keep a prompt's best pages in the order's blocks, or name them where they are.

        The table has room for it (`PageTable.has_room`).
        """
        order, blocks = finished.order, finished.dense_blocks
        assert blocks is not None
        num_pages = order.num_tokens // PAGE_SIZE
        num_blocks = self.num_blocks(order)
        ranking = self.policy.rank(self._observation(finished, num_blocks))
        budgets = self._budgets(num_blocks, num_pages, ranking.weights)
        if self.policy.frees_prompt:
            stand_ins = self._stand_in_pages(budgets, num_pages)
            slot = self.table.allocate(order.block_ids, budgets, num_pages, stand_ins)
        else:
            slot = self.table.borrow(num_blocks, budgets, num_pages)
        request = CompactRequest(order, slot, host)
        self._fill(request, finished, blocks[:num_pages], ranking.scores)
        self._prepare_steps(request, budgets, blocks[:num_pages])
        return request

    def _observation(self, finished: FinishedPrefill, num_blocks: int) -> Observation:
        num_scoring = self.policy.scoring_queries(self.config)
        return Observation(
            self.ops, self.geometry, finished, num_blocks, self.move_queries, num_scoring
        )

    def num_blocks(self, order: CompactionOrder) -> int:
        """Kernel blocks whose pages the prompt's heads share: those of the order, or N_c where the
        prompt stays where it is."""
        return len(order.block_ids) or compact_blocks(order.num_tokens, self.config.gpu_budget)

    def _budgets(self, num_blocks: int, num_pages: int, weights: np.ndarray | None) -> np.ndarray:
        """[L, H] pages of each head; `weights` are the prompt's own, if it has any."""
        total = num_blocks * self.assignment.num_heads
        assignment = (
            self.assignment if weights is None else replace(self.assignment, weights=weights)
        )
        return page_budgets(
            assignment,
            num_pages,
            total - spare_pages(self.assignment, num_pages, total),
            min(self.config.min_pages, num_pages),
        )

    def _stand_in_pages(self, budgets: np.ndarray, num_pages: int) -> np.ndarray | None:
        config, min_pages = self.config, self.config.min_pages
        if self.matched_tokens is not None:
            share = config.share_of_matched
            most = most_pages(self.geometry.group, config.gpu_budget)
            return matched_pages(budgets, num_pages, min_pages - 1, share, most)
        if self.centroids is not None:
            listed = max(min_pages - 1, 1)
            return np.where(budgets < num_pages, np.maximum(budgets - listed, 0), 0)
        if not config.keeps_means:
            return None
        return mean_pages(budgets, num_pages, min_pages, self.layer_ids, self.model_layers)

    def _fill(
        self,
        request: CompactRequest,
        finished: FinishedPrefill,
        blocks: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
        """Select pages by their scores, and copy them into the request's own blocks if it has
        any."""
        slot, listed_pages = request.table_slot, self.table.listed_pages(request.table_slot)
        source = self.ops.select(
            scores,
            slot,
            blocks,
            self.config.protected,
            listed_pages,
        )
        if self.table.finders is not None:
            self.ops.quantize_keys(slot, blocks)
        if self.policy.frees_prompt:
            self.ops.copy_pages(source, listed_pages)
        else:
            request.dense_blocks = blocks
            listed_pages.copy_(source)
        if self.matched_tokens is not None:
            self.matched_tokens.fill(slot, blocks, self._references(finished))
        elif self.centroids is not None:
            self.centroids.fill(slot, blocks, self.config.recent_pages)
        elif self.config.keeps_means:
            self.ops.fill_means(slot, blocks)

    def _prepare_steps(
        self, request: CompactRequest, budgets: np.ndarray, dense_blocks: torch.Tensor
    ) -> None:
        """Note what choosing at each step needs, where the policy does so."""
        if self.step_selection is None:
            return
        if not self.policy.frees_prompt:
            self.step_selection.prepare(dense_blocks)
            return
        blocks = np.asarray(request.order.block_ids, np.int32)
        self.step_selection.prepare(upload(blocks, dense_blocks.device))
        num_pages = dense_blocks.shape[0]
        read = self.policy.pages_read(budgets, num_pages, self.config)
        self.table.set_idle(request.table_slot, budgets - read)

    def _references(self, finished: FinishedPrefill) -> References:
        """Where all queries but the last came from the prefix cache, the last one is all there
        is."""
        if finished.references is not None:
            return finished.references
        place = finished.query_place
        assert place is not None
        return References(self.ops.memory.last_queries[place : place + 1], behind=1)
