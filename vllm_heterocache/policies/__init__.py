"""Selection policies by name. A module is imported when its policy is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vllm_heterocache.refusal import did_you_mean, refuse

if TYPE_CHECKING:
    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.policies.policy import Policy

POLICIES = {
    "heterocache": "heterocache:HeteroCache",
    "full": "full:Full",
    "streaming": "streaming:Streaming",
    "snapkv": "snapkv:SnapKV",
    "pyramidkv": "pyramidkv:PyramidKV",
    "cake": "cake:Cake",
    "chunkkv": "chunkkv:ChunkKV",
    "h2o": "h2o:H2O",
    "centroidkv": "centroidkv:CentroidKV",
    "rocketkv": "rocketkv:RocketKV",
    "quest": "quest:Quest",
    "fier": "fier:FIER",
    "oracle": "oracle:Oracle",
}
RECIPES = ("retrieval", "paper")
"""Recipes of policy heterocache. The command line offers them and does without config.py, which
needs pydantic."""


def policy_class(name: str) -> type[Policy]:
    """The class of a policy.

    Raises:
        ValueError: there is no policy of this name; the message has the nearest one.
    """
    if name not in POLICIES:
        reason = f"there is no such policy{did_you_mean(name, POLICIES)}"
        refuse("policy", name, reason, f"choose one of {', '.join(POLICIES)}")
    module, class_name = POLICIES[name].split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), class_name)


def make_policy(config: HeteroCacheConfig) -> Policy:
    """The policy that `config` names, with its own options.

    Raises:
        ValueError: there is no such policy; `policy_options` has a key that the policy lacks, or
            a value it refuses; or the policy refuses another option.
    """
    policy = policy_class(config.policy)(**config.policy_options)
    if not policy.needs_profile:
        _refuse_roles(config)
    for option in ("evicted_means", "matched_share"):
        value = getattr(config, option)
        if value and not policy.frees_prompt:
            reason = f"policy {config.policy!r} leaves prompts whole, so that nothing is evicted"
            refuse(option, value, reason, "remove it or choose another policy")
        if value and policy.merged_chunk:
            reason = f"policy {config.policy!r} merges all that it evicts by itself"
            refuse(option, value, reason, "remove it or choose another policy")
        if value and policy.step_selection:
            reason = f"policy {config.policy!r} reads a part of the pages that it keeps"
            refuse(option, value, reason, "remove it or choose another policy")
    if config.evicted_means and config.matched_share:
        reason = "matched tokens take the place of means"
        refuse("evicted_means", True, reason, "remove it, or set matched_share to 0")
    policy.check(config)
    return policy


def _refuse_roles(config: HeteroCacheConfig) -> None:
    """Options of roles would change nothing where heads have none."""
    reason = f"policy {config.policy!r} gives heads no roles"
    fix = "remove it or choose another policy"
    for option in ("full_share", "finder_share"):
        if getattr(config, option):
            refuse(option, getattr(config, option), reason, fix)
    if config.recipe != type(config).recipe:
        refuse("recipe", config.recipe, reason, fix)
