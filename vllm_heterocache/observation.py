"""What a policy may look at when a prompt's prefill is complete."""

from __future__ import annotations

import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.ops import Geometry, Ops
from vllm_heterocache.request_state import Capture


class Observation:
    """See `policies.policy.ObservedPrompt`."""

    def __init__(self, ops: Ops, geometry: Geometry, capture: Capture) -> None:
        assert capture.dense_blocks is not None
        self._ops, self._query, self._blocks = ops, capture.query, capture.dense_blocks
        self._num_tokens = capture.order.num_tokens
        self.shape = geometry.num_layers, geometry.num_kv_heads
        self.num_pages = self._num_tokens // PAGE_SIZE
        self.device = self._blocks.device

    def last_query_scores(self) -> torch.Tensor:
        return self._ops.score_prompt(self._query, self._blocks, self._num_tokens)
