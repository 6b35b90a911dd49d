"""What policies have in common that look at the last queries of a prompt."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import torch
from annotated_types import Predicate
from pydantic import Field

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.policies.policy import ObservedPrompt, Policy
from vllm_heterocache.refusal import Why, options

# Above every score, and so that two of them can be compared.
ALWAYS = torch.finfo(torch.float32).max


PoolPages = Annotated[
    int,
    Field(ge=1),
    Predicate(lambda pages: pages % 2 == 1),
    Why(
        "it counts a page and as many on either side, so it is odd",
        "choose an odd number above 0 or remove it",
    ),
]


@options
class WindowPolicy(Policy):
    """All heads compressed, pages scored by the attention of the last `window` queries."""

    window: Annotated[int, Field(ge=1)] = 32
    """Last queries of the prompt that are observed; the pages they lie in are always kept."""
    pool_pages: PoolPages = 1
    """A page takes the best score among so many neighbours, itself included; 1 for its own."""
    group: Literal["mean", "max"] = "mean"
    """What the query heads of a KV head say of a page: their "mean" or their "max"."""

    @property
    def observed_queries(self) -> int:
        return self.window

    @abstractmethod
    def query_head_scores(self, mass: torch.Tensor) -> torch.Tensor:
        """[H, G, W, P] masses of one layer -> [H, G, P] scores, not negative."""

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        masses = (prompt.window_mass(layer) for layer in range(prompt.shape[0]))
        return self.with_window(prompt, torch.stack([self.layer_scores(mass) for mass in masses]))

    def with_window(self, prompt: ObservedPrompt, scores: torch.Tensor) -> torch.Tensor:
        """[L, H, P] scores, changed in place so that the window's own pages are kept."""
        scores[..., num_pages_before_window(prompt) :] = ALWAYS
        return scores

    def layer_scores(self, mass: torch.Tensor) -> torch.Tensor:
        """[H, G, W, P] masses of one layer -> [H, P], whatever its pages are."""
        scores = self.query_head_scores(mass)
        scores = scores.mean(dim=1) if self.group == "mean" else scores.amax(dim=1)
        width = min(self.pool_pages, 2 * scores.shape[-1] + 1)  # no page has more neighbours
        return torch.nn.functional.max_pool1d(scores, width, stride=1, padding=width // 2)


def num_pages_before_window(prompt: ObservedPrompt) -> int:
    """Full pages in front of those that may hold a token of the window."""
    return max(0, prompt.num_pages - -(-prompt.window // PAGE_SIZE))
