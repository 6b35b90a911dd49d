"""The interface between a selection policy and the backend (docs/policies.md).

Letters: L layers and H KV heads of this rank, G query heads a KV head, P full pages of a prompt,
W observed queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole

if TYPE_CHECKING:
    import torch

    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.heads.profile import HeadProfile

ALL_QUERIES = -1  # of `Policy.observed_queries`


class StepChoice(StrEnum):
    """How pages are chosen at each step."""

    SUMMARIES = "summaries"  # by bounds from the pages' summaries
    HYBRID = "hybrid"  # by attention on summaries, in the channels where the query is largest
    ONE_BIT = "one_bit"  # by logits of keys of one bit a channel
    EXACT = "exact"  # by exact attention

    @property
    def is_graphed(self) -> bool:
        """Whether a CUDA graph can hold the choice. The exact one waits for the device."""
        return self != StepChoice.EXACT

    @property
    def needs_summaries(self) -> bool:
        return self != StepChoice.EXACT


@dataclass(frozen=True)
class Shard:
    """The heads of one tensor- and pipeline-parallel rank."""

    layers: Sequence[int]  # indices among the layers that are served, consecutive
    kv_heads: Sequence[int]  # global indices
    num_layers: int  # of the whole model, as far as they are served

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.layers), len(self.kv_heads)


class ObservedPrompt(Protocol):
    """What the backend knows of a prompt whose prefill is complete."""

    shape: tuple[int, int]  # L, H
    num_pages: int  # P
    kept_pages: int  # pages that a head keeps, on average
    window: int  # W, last queries observed; fewer than asked for where the prompt has fewer
    device: torch.device

    def query_scores(self) -> torch.Tensor:
        """[L, H, P] fp32: attention mass of the last prompt query on each page, the largest over
        the query heads of the group (kernels/README.md), and over the other `scoring_queries`."""

    def window_mass(self, layer: int) -> torch.Tensor:
        """[H, G, W, P] fp32: attention mass of each of the last W queries on each page. A query's
        softmax runs over all tokens up to its own. Needs `observed_queries` > 0. It is computed at
        every call, at the cost of W queries' logits."""

    def accumulated_mass(self) -> torch.Tensor:
        """[L, H, P] fp32: attention mass of all prompt queries, summed over queries and over the
        group. Needs `observed_queries` ALL_QUERIES, which costs every prefill chunk a second, plain
        computation of its logits, and every prompt its prefix-cache hits."""


class Ranking(NamedTuple):
    """What a policy says of a prompt."""

    scores: torch.Tensor
    """[L, H, P] fp32, not negative: a head keeps its pages of the highest score."""
    weights: np.ndarray | None = None
    """[L, H] weights of this prompt's budgets; None: those of `Policy.assign`."""


@dataclass(frozen=True)
class Policy(ABC):
    """Which pages of a prompt each KV head keeps, or reads. Subclasses are `options`
    (refusal.py), whose fields are those of `policy_options`: frozen dataclasses."""

    name: ClassVar[str]
    needs_profile: ClassVar[bool] = False
    frees_prompt: ClassVar[bool] = True
    """Whether the prompt's dense blocks go back to vLLM. False: the budget limits reading alone."""
    step_selection: ClassVar[StepChoice | None] = None
    """How a head finds the pages to read. None: the head reads the pages that it kept. Else each
    step chooses among these, or, with `frees_prompt` False, among all pages of the prompt."""

    @property
    def is_graphed(self) -> bool:
        """Whether CUDA graphs can hold the decode steps."""
        return self.step_selection is None or self.step_selection.is_graphed

    @property
    def observed_queries(self) -> int:
        """Last prompt queries that selection looks at; ALL_QUERIES for all."""
        return 1

    def scoring_queries(self, config: HeteroCacheConfig) -> int:
        """Queries by whose attention `ObservedPrompt.query_scores` scores pages, a power of two; 1:
        the last one alone."""
        return 1

    @property
    def merged_chunk(self) -> int | None:
        """Tokens of the chunks in which all tokens behind the protected pages are merged to
        centroids, which take the heads' budgets; None: heads keep the pages of the best scores."""
        return None

    def biased_share(self, config: HeteroCacheConfig) -> float:
        """Most of a request's pages whose tokens have biases of their own, [0, 1]."""
        return config.share_of_matched if self.merged_chunk is None else 1.0

    @property
    def step_channel_share(self) -> float:
        """HYBRID: share of a head's channels that choosing looks at, (0, 1]."""
        return 1.0

    def check(self, config: HeteroCacheConfig) -> None:  # noqa: B027 (most have nothing to check)
        """Raise ValueError where an option of the plugin cannot work with the policy."""

    def assign(
        self, config: HeteroCacheConfig, shard: Shard, profile: HeadProfile | None = None
    ) -> HeadAssignment:
        """Roles of a rank's heads, and the weights by which compressed ones share the budget; by
        default all heads are compressed, to the same budget. Not asked where `gpu_budget` is 1:
        then all heads are whole.

        Args:
            profile: of the whole model; None unless the policy `needs_profile`.

        Raises:
            ValueError: the budget is under the floor of the policy, or the profile lacks what the
                policy needs.
        """
        return anchors(shard.shape)

    def pages_read(
        self, budgets: np.ndarray, num_pages: int, config: HeteroCacheConfig
    ) -> np.ndarray:
        """[L, H] int: pages that a step reads of those that a head keeps; by default all.

        Args:
            budgets: [L, H] int, pages that each head keeps.
            num_pages: P.
        """
        return budgets

    @abstractmethod
    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        """`Ranking.scores`."""

    def rank(self, prompt: ObservedPrompt) -> Ranking:
        """The scores and, where budgets depend on the prompt, their weights. These are on the
        host, so a policy that has them waits for the device once a prompt."""
        return Ranking(self.scores(prompt))


def anchors(shape: tuple[int, int], weights: np.ndarray | None = None) -> HeadAssignment:
    """All heads compressed, none retrieved for.

    Args:
        weights: [L, H] shares of the budget, > 0; None: equal ones.
    """
    if weights is None:
        weights = np.ones(shape)
    return HeadAssignment(
        np.full(shape, HeadRole.ANCHOR, np.int8),
        np.full(shape, -1, np.int32),
        np.broadcast_to(weights, shape).astype(np.float32),
    )
