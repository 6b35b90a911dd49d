"""Every head keeps and reads everything: the yardstick inside this backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_heterocache.heads.recipes import all_full
from vllm_heterocache.policies.policy import ObservedPrompt, Policy, Shard
from vllm_heterocache.refusal import options, refuse

if TYPE_CHECKING:
    import torch

    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.heads.assignment import HeadAssignment
    from vllm_heterocache.heads.profile import HeadProfile


@options
class Full(Policy):
    """Full attention from page lists. It frees no memory and needs `gpu_budget` 1."""

    name: ClassVar[str] = "full"

    def check(self, config: HeteroCacheConfig) -> None:
        if not config.keeps_everything:
            refuse(
                "gpu_budget",
                config.gpu_budget,
                "policy 'full' keeps everything",
                "set gpu_budget to 1",
            )

    def assign(
        self, config: HeteroCacheConfig, shard: Shard, profile: HeadProfile | None = None
    ) -> HeadAssignment:
        return all_full(*shard.shape)

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        return prompt.query_scores()
