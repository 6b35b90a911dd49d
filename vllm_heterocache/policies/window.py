"""What policies have in common that look at the last queries of a prompt."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.policies.options import check_choice, check_odd, check_whole
from vllm_heterocache.policies.policy import ObservedPrompt, Policy

if TYPE_CHECKING:
    from vllm_heterocache.config import HeteroCacheConfig

# Above every score, and so that two of them can be compared.
ALWAYS = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class WindowPolicy(Policy):
    """All heads compressed, pages scored by the attention of the last `window` queries."""

    window: int = 32
    """Last queries of the prompt that are observed; the pages they lie in are always kept."""
    pool_pages: int = 1
    """A page takes the best score among so many neighbours, itself included; 1 for its own."""
    group: str = "mean"
    """What the query heads of a KV head say of a page: their "mean" or their "max"."""

    @property
    def observed_queries(self) -> int:
        return self.window

    def check(self, config: HeteroCacheConfig) -> None:
        check_whole(self, "window", 1)
        check_odd(self, "pool_pages")
        check_choice(self, "group", ("mean", "max"))

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
        width = self.pool_pages
        return torch.nn.functional.max_pool1d(scores, width, stride=1, padding=width // 2)


def num_pages_before_window(prompt: ObservedPrompt) -> int:
    """Full pages in front of those that may hold a token of the window."""
    return max(0, prompt.num_pages - -(-prompt.window // PAGE_SIZE))
