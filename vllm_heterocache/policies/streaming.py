"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_heterocache.policies.policy import ObservedPrompt, Policy
from vllm_heterocache.refusal import options


@options
class Streaming(Policy):
    """The first `sink_pages` pages and the last ones (Xiao et al., arXiv 2309.17453, section 3.2).

    The paper keeps 4 sink tokens; here it is whole pages, and what is generated stays.
    """

    name: ClassVar[str] = "streaming"

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        latest = torch.arange(prompt.num_pages, dtype=torch.float32, device=prompt.device)
        return latest.expand(*prompt.shape, -1).contiguous()
