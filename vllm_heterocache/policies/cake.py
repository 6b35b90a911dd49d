"""CAKE: budgets by how much each layer's attention spreads and shifts."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field

from vllm_heterocache.policies.policy import ObservedPrompt, Ranking
from vllm_heterocache.policies.window import WindowPolicy, num_pages_before_window
from vllm_heterocache.refusal import options

# Every layer weighs at least this much of the one that weighs most; budgets have a floor anyway.
LEAST_WEIGHT = 1e-6


@options
class Cake(WindowPolicy):
    """Layer preferences H^(1/tau1) * V^(1/tau2), pages of the highest mean + gamma * variance
    (Qin et al., arXiv 2503.12491, sections 4.1 and 4.3; window 32, gamma 200; the taus are tuned
    per model and cache size, e.g. 1.6 and 0.4 for Llama-3.1-8B, and 1 where nothing is known).

    H is the entropy of the window's attention, V its variance from query to query, both summed
    over the layer's heads and over the pages before the window. Here the distribution is over
    pages instead of tokens: H lacks the spread within a page, and a page's variance is that of the
    sum of its tokens. The authors smooth scores over 5 tokens; a page already does. A layer's
    heads share its budget equally. The weights belong to the prompt and are read on the host, so
    each compaction waits for the device once. Ranks weigh their own layers by their own heads.
    """

    name: ClassVar[str] = "cake"

    gamma: Annotated[float, Field(ge=0, le=10**9)] = 200.0
    """Weight of the variance in a page's score."""
    tau1: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    """Temper of the entropy (spatial dispersion)."""
    tau2: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    """Temper of the variance (temporal shift)."""

    def query_head_scores(self, mass: torch.Tensor) -> torch.Tensor:
        return mass.mean(dim=2) + self.gamma * _variance(mass)

    def rank(self, prompt: ObservedPrompt) -> Ranking:
        scores, preferences = [], []
        for layer in range(prompt.shape[0]):
            mass = prompt.window_mass(layer)
            scores.append(self.layer_scores(mass))
            preferences.append(self._preference(mass[..., : num_pages_before_window(prompt)]))
        weights = _weights(torch.stack(preferences).double().cpu().numpy())
        return Ranking(
            self.with_window(prompt, torch.stack(scores)),
            np.broadcast_to(weights[:, None], prompt.shape),
        )

    def _preference(self, mass: torch.Tensor) -> torch.Tensor:
        entropy = torch.special.entr(mass).sum()
        return entropy ** (1 / self.tau1) * _variance(mass).sum() ** (1 / self.tau2)


def _weights(preference: np.ndarray) -> np.ndarray:
    """[L], > 0, the largest 1."""
    most = preference.max(initial=0.0)
    if not np.isfinite(most) or most <= 0:  # one query, or none that differs from the others
        return np.ones_like(preference)
    return np.maximum(preference / most, LEAST_WEIGHT)


def _variance(mass: torch.Tensor) -> torch.Tensor:
    """[H, G, W, P] -> [H, G, P], over the window; 0 for a window of one query."""
    return mass.var(dim=2, correction=min(1, mass.shape[2] - 1))
