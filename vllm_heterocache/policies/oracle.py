"""Oracle: the best that choosing whole pages at each step can do; for evaluation only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_heterocache.head_profile import HeadAssignment
from vllm_heterocache.policies.policy import ObservedPrompt, Policy, Shard, anchors

if TYPE_CHECKING:
    from vllm_heterocache.config import HeteroCacheConfig


@dataclass(frozen=True)
class Oracle(Policy):
    """Pages by the exact attention of the step's own query; a yardstick, not a method.

    The score of a page is `max_g sum_{t in page} softmax(q_g . K)_t` over the full pages of the
    prompt, the largest over the query heads of the group. Every head has the same budget, all
    that was generated is read, and so are sinks and recent pages.

    It frees no memory, reads all keys of the prompt to choose, and waits for the device in every
    layer: on CUDA it needs --enforce-eager.
    """

    name: ClassVar[str] = "oracle"
    frees_prompt: ClassVar[bool] = False
    step_selection: ClassVar[str | None] = "exact"
    evaluation_only: ClassVar[bool] = True

    def assign(self, config: HeteroCacheConfig, shard: Shard) -> HeadAssignment:
        return anchors(shard.shape)

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        """Any: the first decode step chooses before it reads."""
        return torch.zeros(*prompt.shape, prompt.num_pages, device=prompt.device)
