"""What policies have in common that choose at each step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.policies.policy import ObservedPrompt, Policy, Shard, anchors
from vllm_heterocache.refusal import options, refuse

if TYPE_CHECKING:
    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.heads.profile import HeadProfile


class StepPolicy(Policy):
    """A policy that keeps the whole prompt where it is, and chooses at each step what is read."""

    frees_prompt: ClassVar[bool] = False

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        """Any: the first decode step chooses before it reads."""
        return torch.zeros(*prompt.shape, prompt.num_pages, device=prompt.device)


@options
class StepPolicyBehindFullLayers(StepPolicy):
    """One that reads the first layers of a model whole."""

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
                f"policy {self.name!r} reads {is_full.sum()} of {len(is_full)} layers whole, which "
                f"is {is_full.mean():.3f} of the KV",
                "raise gpu_budget, or lower full_layers in policy_options",
            )
        assignment = anchors(shard.shape)
        assignment.roles[is_full] = HeadRole.VOLATILE
        return replace(assignment, weights=np.where(assignment.full, 0, assignment.weights))
