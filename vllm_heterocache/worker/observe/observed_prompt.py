"""What a policy may look at when a prompt's prefill is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.kernels.kv_scales import logit_scales
from vllm_heterocache.kernels.tables import layer_page_ids
from vllm_heterocache.worker.observe.page_mass import by_kv_head, page_masses
from vllm_heterocache.worker.observe.scoring_queries import queries_at_a_time, scoring_queries

if TYPE_CHECKING:
    from vllm_heterocache.worker.observe.moved_queries import MoveQueries
    from vllm_heterocache.worker.ops.interface import Geometry, Ops
    from vllm_heterocache.worker.requests import FinishedPrefill


class Observation:
    """See `policies.policy.ObservedPrompt`."""

    def __init__(
        self,
        ops: Ops,
        geometry: Geometry,
        finished: FinishedPrefill,
        kept_pages: int,
        move_queries: MoveQueries | None,
        num_scoring: int,
    ) -> None:
        """
        Args:
            num_scoring: `Policy.scoring_queries`.
        """
        assert finished.dense_blocks is not None and finished.query_place is not None
        self._ops, self._geometry = ops, geometry
        self._move_queries, self._num_scoring = move_queries, num_scoring
        self._last, self._blocks = finished.query_place, finished.dense_blocks
        self._references = finished.references
        self._masses = finished.masses
        self._num_tokens = finished.order.num_tokens
        self.shape = geometry.num_layers, geometry.num_kv_heads
        self.num_pages = self._num_tokens // PAGE_SIZE
        self.kept_pages = kept_pages
        self.window = min(geometry.window, self._num_tokens)
        self.device = self._blocks.device

    def query_scores(self) -> torch.Tensor:
        last_query = self._ops.memory.last_queries[self._last]
        queries = scoring_queries(
            last_query, self._references, self._move_queries, self._num_scoring
        )
        at_a_time = queries_at_a_time(self._num_scoring, self._geometry.group)
        first, *others = queries.split(at_a_time)
        prompt = self._blocks, self._num_tokens
        most = self._ops.score_prompt(first, *prompt)
        for some in others:  # no scores stay but the largest, as compaction_bytes counts
            torch.maximum(most, self._ops.score_prompt(some, *prompt), out=most)
        return most

    def window_mass(self, layer: int) -> torch.Tensor:
        g, window = self._geometry, self.window
        first = self._last + 1 - window
        queries = self._ops.memory.last_queries[first : self._last + 1, layer]  # [W, Hq, D]
        positions = torch.arange(self._num_tokens - window, self._num_tokens, device=self.device)
        masses = page_masses(
            by_kv_head(queries, g.num_kv_heads),
            positions.repeat(g.group),
            self._ops.memory.pool,
            layer_page_ids(self._blocks, layer, g.num_layers, g.num_kv_heads),
            logit_scales(g.scale, self._ops.memory.kv_scales, layer),
            self._ops.memory.layer_sinks(layer),
            g.soft_cap,
        )
        return masses.view(g.num_kv_heads, g.group, window, -1)[..., : self.num_pages]

    def accumulated_mass(self) -> torch.Tensor:
        assert self._masses is not None, "the policy does not observe all queries"
        return self._masses
