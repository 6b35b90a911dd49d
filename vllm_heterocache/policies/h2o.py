"""H2O: heavy hitters of the whole prompt, and the most recent tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from vllm_heterocache.policies.policy import ALL_QUERIES, ObservedPrompt, Policy
from vllm_heterocache.policies.window import ALWAYS
from vllm_heterocache.refusal import options

if TYPE_CHECKING:
    import torch


@options
class H2O(Policy):
    """Pages of the highest attention summed over all prompt queries, and the last ones (Zhang et
    al., arXiv 2306.14048, algorithm 1: half of the budget for heavy hitters, half for recent
    tokens).

    Only the prompt part: what is generated stays, where the paper goes on evicting. The paper's
    greedy eviction while the prompt is read becomes one choice at its end, by the same sums, as in
    its own code for long prompts. Scores are of pages, summed over the query heads of a group.

    The attention matrix is computed a second time, block by block in plain torch (each chunk's
    queries over all keys so far, O(T^2) in fp32 for a prompt of T tokens): made for comparisons,
    not for serving. No prefix-cache hits are taken, as cached tokens have no queries.
    """

    name: ClassVar[str] = "h2o"

    recent_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of a head's budget that goes to the last pages."""

    @property
    def observed_queries(self) -> int:
        return ALL_QUERIES

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        scores = prompt.accumulated_mass().clone()
        scores[..., prompt.num_pages - round(self.recent_share * prompt.kept_pages) :] = ALWAYS
        return scores
