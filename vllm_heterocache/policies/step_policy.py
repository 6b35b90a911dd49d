"""What policies have in common that choose at each step."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_heterocache.policies.policy import ObservedPrompt, Policy


class StepPolicy(Policy):
    """A policy that keeps the whole prompt where it is, and chooses at each step what is read."""

    frees_prompt: ClassVar[bool] = False

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        """Any: the first decode step chooses before it reads."""
        return torch.zeros(*prompt.shape, prompt.num_pages, device=prompt.device)
