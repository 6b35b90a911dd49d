"""From options and profile to the roles of one rank's heads."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_heterocache.config import HeteroCacheConfig
from vllm_heterocache.head_profile import HeadAssignment, HeadProfile
from vllm_heterocache.roles import all_full, assign_heads


def rank_assignment(
    config: HeteroCacheConfig, layers: Sequence[int], kv_heads: Sequence[int]
) -> HeadAssignment:
    """Roles of the heads of one tensor- and pipeline-parallel rank.

    Clusters are made within a rank, from the profile's similarities, so that a pivot and its
    satellites always share a GPU.

    Args:
        config: `profile_data` is set unless `gpu_budget` is 1.
        layers, kv_heads: global indices of the rank's layers and KV heads.

    Raises:
        ValueError: the budget is under the floor of the recipe, or the profile lacks what the
            recipe needs.
    """
    if config.keeps_everything:
        return all_full(len(layers), len(kv_heads))
    assert config.profile_data is not None
    profile = HeadProfile.from_json(config.profile_data)
    return assign_heads(
        profile.select(range(layers[0], layers[-1] + 1), kv_heads),
        recipe=config.recipe,
        gpu_budget=config.gpu_budget,
        full_share=config.full_share,
        stability_threshold=config.stability_threshold,
        similarity_threshold=config.similarity_threshold,
    )
