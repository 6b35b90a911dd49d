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

# Within these budgets pages are scored by so many queries, else by the last one alone: fewer pages
# are best spent on what is asked first, and more of them hold both anyway (docs/quality.md, "Who
# chooses the pages").
SCORING_QUERIES = 8
LEAST_BUDGET, LARGEST_BUDGET = 0.05, 0.1


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

    def scoring_queries(self, config: HeteroCacheConfig) -> int:
        """Other queries than the last one are those that matched tokens are fitted to. The drift
        of a pivot is measured from what the last one attends to."""
        if not config.share_of_matched or not config.share_of_finders:
            return 1
        is_small = LEAST_BUDGET <= config.gpu_budget <= LARGEST_BUDGET
        return SCORING_QUERIES if is_small else 1

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        return prompt.query_scores()
