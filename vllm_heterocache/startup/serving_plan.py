"""What start-up decides, once and in the front end; other processes read the plan as it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_heterocache.config import SECTION, HeteroCacheConfig
from vllm_heterocache.heads.assignment import HeadAssignment
from vllm_heterocache.heads.budget import shortest_compacted, smallest_prompt
from vllm_heterocache.heads.matched_tokens import REFERENCE_POSITIONS
from vllm_heterocache.policies import policy_class
from vllm_heterocache.policies.full import Full
from vllm_heterocache.policies.policy import ALL_QUERIES, Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

PLAN_SECTION = "heterocache_plan"  # of `additional_config`, beside the user's own section


@dataclass(frozen=True)
class ServingPlan:
    """Options, policy, roles of all heads, and the lengths and shares that follow from them."""

    config: HeteroCacheConfig
    policy: Policy
    """The policy in force: with a budget of 1 there is nothing to choose."""
    assignments: tuple[HeadAssignment, ...]
    """Roles on every rank, [pp_size * tp_size], tensor-parallel ranks next to one another."""
    compact_min_tokens: int
    """Shortest prompt, in tokens, that is compacted where a block is a page: every compressed head
    gets `min_pages`. Larger blocks may raise it (`HeteroSpec.shortest_compacted`)."""
    recomputed_tokens: int
    """Last tokens of a prompt that must be computed though a prefix of the prompt is cached:
    those whose queries the policy observes, and those that matched tokens are fitted to."""
    workers_per_host: int = 1
    """Workers that share one host's memory, those of data-parallel replicas included."""

    @classmethod
    def make(
        cls,
        config: HeteroCacheConfig,
        policy: Policy,
        assignments: Sequence[HeadAssignment],
        max_model_len: int,
        workers_per_host: int = 1,
        is_recurrent: bool = False,
    ) -> ServingPlan:
        """The plan with the lengths that follow.

        Args:
            is_recurrent: whether other layers of the model are recurrent, whose prefix cache has
                entries for the ends of blocks and of prompts alone.

        Raises:
            ValueError: no prompt is long enough for the budgets; the message names gpu_budget.
        """
        return cls(
            config,
            policy,
            tuple(assignments),
            compact_min_tokens(config, assignments),
            recomputed_tokens(config, policy, max_model_len, is_recurrent),
            workers_per_host,
        )

    def shortest_compacted(self, block_size: int) -> int:
        """Tokens of the shortest prompt that is decoded from page lists, with blocks of so many."""
        if not self.policy.frees_prompt:
            return self.compact_min_tokens
        return shortest_compacted(self.compact_min_tokens, self.config.gpu_budget, block_size)

    def assignment(self, pp_rank: int, tp_rank: int, tp_size: int) -> HeadAssignment:
        """Roles of the heads of one rank."""
        return self.assignments[pp_rank * tp_size + tp_rank]

    def to_additional_config(self) -> dict[str, Any]:
        """The plan as JSON-able sections of vLLM's `additional_config`."""
        plan = {
            "policy": {"name": self.policy.name, "options": dataclasses.asdict(self.policy)},
            # weights with all their digits: budgets must not depend on the process
            "assignments": [
                {**one.to_json(), "weights": one.weights.tolist()} for one in self.assignments
            ],
            "compact_min_tokens": self.compact_min_tokens,
            "recomputed_tokens": self.recomputed_tokens,
            "workers_per_host": self.workers_per_host,
        }
        return {SECTION: dataclasses.asdict(self.config), PLAN_SECTION: plan}

    @classmethod
    def from_additional_config(cls, additional_config: dict[str, Any]) -> ServingPlan:
        """The plan that `to_additional_config` wrote.

        Raises:
            KeyError: no plan was made: `configure` has not run.
        """
        plan = additional_config[PLAN_SECTION]
        return cls(
            HeteroCacheConfig(**additional_config[SECTION]),
            policy_class(plan["policy"]["name"])(**plan["policy"]["options"]),
            tuple(HeadAssignment.from_json(one) for one in plan["assignments"]),
            plan["compact_min_tokens"],
            plan["recomputed_tokens"],
            plan["workers_per_host"],
        )


def serving_policy(config: HeteroCacheConfig, asked: Policy) -> Policy:
    """The policy that is in force where the options name `asked`: with a budget of 1 there is
    nothing to choose."""
    return Full() if config.keeps_everything else asked


def compact_min_tokens(config: HeteroCacheConfig, assignments: Sequence[HeadAssignment]) -> int:
    """Shortest prompt that is compacted: as asked for, and long enough for the budgets.

    Raises ValueError, naming gpu_budget, where no prompt is.
    """
    feasible = smallest_prompt(assignments, config.gpu_budget, config.min_pages)
    return max(config.min_prompt_tokens, feasible)


def recomputed_tokens(
    config: HeteroCacheConfig, policy: Policy, max_model_len: int, is_recurrent: bool = False
) -> int:
    """See `ServingPlan.recomputed_tokens`.

    Matched tokens do without where the model `is_recurrent`: a hit that ends before the prompt
    does would be none there.
    """
    observed = policy.observed_queries
    if observed == ALL_QUERIES:
        return max_model_len
    has_references = config.share_of_matched > 0 and not is_recurrent
    return max(observed, REFERENCE_POSITIONS) if has_references else observed
