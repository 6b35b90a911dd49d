"""SnapKV: what the last queries of a prompt attend to is what its answer will need."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_heterocache.policies.window import WindowPolicy
from vllm_heterocache.refusal import options

if TYPE_CHECKING:
    import torch


@options
class SnapKV(WindowPolicy):
    """Pages of the highest mean attention over the observation window (Li et al., arXiv
    2404.14469, section 4 and listing 1: window 32, max-pooling with kernel 7 in their LongBench
    configurations).

    Here scores are of pages: the mass of their 16 tokens, which already joins neighbours, so that
    pooling (`pool_pages`, over whole pages) is off by default. The paper keeps KV per query head;
    here the heads of a group share their pages, by the mean of their scores or the maximum
    (`group`). Every head has the same budget, sinks and recent pages come out of it.
    """

    name: ClassVar[str] = "snapkv"

    def query_head_scores(self, mass: torch.Tensor) -> torch.Tensor:
        return mass.mean(dim=2)
