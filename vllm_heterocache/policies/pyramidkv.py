"""PyramidKV: SnapKV's choice with budgets that shrink from layer to layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from vllm_heterocache.policies.policy import Shard, anchors
from vllm_heterocache.policies.snapkv import SnapKV
from vllm_heterocache.refusal import options

if TYPE_CHECKING:
    from vllm_heterocache.config import HeteroCacheConfig
    from vllm_heterocache.heads.assignment import HeadAssignment
    from vllm_heterocache.heads.profile import HeadProfile


@options
class PyramidKV(SnapKV):
    """Budgets on a falling line over the layers, pages chosen as by SnapKV (Cai et al., arXiv
    2406.02069, section 4.2; beta 20; window 8 in their LongBench runs, 32 here as for the others).

    With b the mean share of pages kept, the last layer gets b / beta and the first 2 b - b / beta;
    where that is more than the whole prompt, the first layer gets all and the last 2 b - 1 (as the
    authors' code does). In the paper the window comes on top of these budgets; here it is part of
    them, and `min_pages` is the floor of every layer, taken from the others in proportion. With
    pipeline parallelism each rank keeps the same number of pages, so the line holds within ranks
    but not between them.
    """

    name: ClassVar[str] = "pyramidkv"

    beta: Annotated[float, Field(ge=1, le=10**6)] = 20.0
    """How many times less than the average the last layer gets."""

    def assign(
        self, config: HeteroCacheConfig, shard: Shard, profile: HeadProfile | None = None
    ) -> HeadAssignment:
        shares = self.layer_shares(config.gpu_budget, shard.num_layers)[list(shard.layers)]
        return anchors(shard.shape, shares[:, None])

    def layer_shares(self, budget: float, num_layers: int) -> np.ndarray:
        """[num_layers] share of its pages that each layer of the model keeps, before rounding."""
        last = budget / self.beta
        first = 2 * budget - last
        if first > 1:
            first, last = 1.0, 2 * budget - 1
        return np.linspace(first, last, num_layers)
