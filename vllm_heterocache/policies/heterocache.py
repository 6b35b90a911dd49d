"""HeteroCache: heads with roles, and retrieval from host memory when a pivot drifts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_heterocache.heads.recipes import configured_heads
from vllm_heterocache.policies.policy import ObservedPrompt, Policy, Shard
from vllm_heterocache.refusal import options, refuse

if TYPE_CHECKING:
    import torch

    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.heads.assignment import HeadAssignment
    from vllm_heterocache.heads.profile import HeadProfile


@options
class HeteroCache(Policy):
    """Pivots and volatile heads whole, the others on a budget (arXiv 2601.13684).

    Its options are those of the plugin: `recipe`, `full_share`, the thresholds and so on.
    """

    name: ClassVar[str] = "heterocache"
    needs_profile: ClassVar[bool] = True

    def check(self, config: HeteroCacheConfig) -> None:
        """Raises ValueError for finders that could never fetch, or in a recipe that has none."""
        if not config.finder_share:
            return
        if not config.watches_drift:
            why, fix = "finders fetch pages, and drift_threshold 0 fetches none", "remove either"
        elif config.recipe != "retrieval":
            why, fix = f"recipe {config.recipe!r} has no finders", 'remove it, or use "retrieval"'
        else:
            return
        refuse("finder_share", config.finder_share, why, fix)

    def assign(
        self, config: HeteroCacheConfig, shard: Shard, profile: HeadProfile | None = None
    ) -> HeadAssignment:
        """Clusters are made within a rank, from the profile's similarities, so that a pivot and
        its satellites always share a GPU."""
        assert profile is not None
        layers = range(shard.layers[0], shard.layers[-1] + 1)
        return configured_heads(profile.select(layers, shard.kv_heads), config)

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        return prompt.last_query_scores()
