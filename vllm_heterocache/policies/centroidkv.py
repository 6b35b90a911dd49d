"""CentroidKV: similar tokens of a chunk are merged, and nothing is chosen."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from vllm_heterocache.policies.policy import ObservedPrompt, Policy
from vllm_heterocache.refusal import options


@options
class CentroidKV(Policy):
    """Centroids of the prompt's tokens by chunked soft matching (Hu et al., arXiv 2506.11418,
    "Chelsea" in its first version).

    The prompt is divided into chunks. The tokens of a chunk are divided in turn into A and B, and
    each of A is matched to the one of B whose key has the largest cosine with its own. The pairs of
    the largest cosines are merged: the K and the V of a cluster become their means
    (`kernels.soft_matching`).

    Sinks and recent pages stay as they are. All other pages of a head's budget hold centroids, with
    the same number for all heads, and the prompt's tokens go. Decode attention adds the logarithm
    of a cluster's tokens to the logit of its centroid, so that it weighs about what they did.

    Memory: it frees 1 - `gpu_budget`, and takes 64 bytes a page in the tables for the logarithms.
    Bytes read at a step: `gpu_budget`.

    Differences, as far as the paper is known here: one matching halves a chunk at most, so where
    the budget asks for less the centroids are matched again, weighted by their tokens; the
    logarithm is ours; and what is generated is not merged. Keys are compared as they lie in the
    cache, behind RoPE.
    """

    name: ClassVar[str] = "centroidkv"

    chunk_tokens: Annotated[int, Field(ge=2)] = 256
    """Tokens of a chunk. The time of a round grows with it."""

    @property
    def merged_chunk(self) -> int:
        return self.chunk_tokens

    def scores(self, prompt: ObservedPrompt) -> torch.Tensor:
        """Any: a head lists protected pages alone."""
        return torch.zeros(*prompt.shape, prompt.num_pages, device=prompt.device)
