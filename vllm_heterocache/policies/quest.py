"""Quest: the whole prompt stays, and each step reads the pages that its query may attend to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.policies.policy import Shard, StepChoice, anchors
from vllm_heterocache.policies.step_policy import StepPolicy
from vllm_heterocache.refusal import options, refuse

if TYPE_CHECKING:
    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.heads.profile import HeadProfile


@options
class Quest(StepPolicy):
    """Pages by an upper bound on their logits (Tang et al., arXiv 2406.10774, section 3.3).

    The score of a page is `sum_d max(q_d * least_d, q_d * largest_d)` over the channels of the
    smallest box around its keys: no key of the page has a larger product with the query. Each
    head reads its budget's pages of the highest score, chosen anew at each step.

    Memory: it frees none, and takes 1/16 of the KV pool for the boxes. Bytes read at a step, as a
    share of dense: `gpu_budget`, and 1/16 of the K and V of the compressed heads' prompts for
    the boxes (a box is two vectors, a page 32).

    As in the authors' code, pages are 16 tokens and the first two layers are read whole. Here
    these layers count towards `gpu_budget`; the query heads of a KV head share one list, by their
    largest score; sinks and recent pages are always read, and so is all that was generated, where
    the paper chooses among generated pages as well.
    """

    name: ClassVar[str] = "quest"
    step_selection: ClassVar[StepChoice | None] = StepChoice.SUMMARIES

    full_layers: Annotated[int, Field(ge=0)] = 2
    """First layers of the model whose heads read everything."""

    def assign(
        self, config: HeteroCacheConfig, shard: Shard, profile: HeadProfile | None = None
    ) -> HeadAssignment:
        """Raises ValueError where the first layers alone take the whole budget of a rank."""
        is_full = np.asarray(shard.layers) < self.full_layers
        if is_full.mean() >= config.gpu_budget:
            refuse(
                "gpu_budget",
                config.gpu_budget,
                f"policy 'quest' reads {is_full.sum()} of {len(is_full)} layers whole, which is "
                f"{is_full.mean():.3f} of the KV",
                "raise gpu_budget, or lower full_layers in policy_options",
            )
        assignment = anchors(shard.shape)
        assignment.roles[is_full] = HeadRole.VOLATILE
        return replace(assignment, weights=np.where(assignment.full, 0, assignment.weights))
