"""RocketKV: a coarse choice when the prompt ends, and a fine one at each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from vllm_heterocache.policies.policy import StepChoice
from vllm_heterocache.policies.snapkv import SnapKV
from vllm_heterocache.policies.window import PoolPages
from vllm_heterocache.refusal import Why, options

if TYPE_CHECKING:
    from vllm_heterocache.config import HeteroCacheConfig

# The paper's rule for the part of the compression (in powers of two) that the first stage does,
# LEAST_SPLIT + SPLIT_SLOPE * log2(ratio), MOST_SPLIT at most.
LEAST_SPLIT, SPLIT_SLOPE, MOST_SPLIT = 0.2, 0.06, 0.8


@options
class RocketKV(SnapKV):
    """Two stages (Behnam et al., arXiv 2502.14051, section 3): pages of the highest
    window attention stay, and each step reads the best of these by its own query.

    **First stage**, at the end of the prefill: the attention of the last 32 queries, summed over
    them and over the group, and max-pooled (kernel 63 tokens). What is not kept is gone.

    **Second stage** ("hybrid sparse attention"), at each step: a page has the least and the largest
    key of each channel. Of these the sign of the group's summed query picks one. Logits are taken
    in the channels of the largest |q| alone, with the scale of SparQ, and the pages of the highest
    softmax, averaged over the group, are read
    (`kernels.hybrid_step_select_ref.approximate_attention`).

    **The split**: a compression by `c` is done by the first stage for `c ** a`, with
    `a = min(0.2 + 0.06 * log2(c), 0.8)`. Half of the second stage's reading is for the choice.
    So a prompt of P pages, of which 1 / c ** a stay, reads P / (2 * c) pages a step. Here
    `gpu_budget` says how many stay, and `read_share` None takes P / (2 * c) from this rule: 1.8 %
    of the prompt at a budget of 20 %, .4 % at 5 %.

    Memory: it frees 1 - `gpu_budget`, and takes 1/16 of the KV pool for the smallest and largest
    keys. Bytes read at a step: those of `read_share`, and 1/32 of what is kept, times
    `channel_share`, for the choice.

    Differences: pages of 16 tokens are kept, described and read, where the paper keeps tokens and
    describes chunks of `ceil(sqrt(c2))` tokens, c2 being what the second stage does: 3 here. The
    choice is coarser for it, and cheaper. The paper's rule for the number of channels,
    `D * chunk / c2`, gives all of them for chunks of 16. Sinks and recent pages are always kept and
    read, and so is all that was generated, where the paper chooses among generated tokens as well.
    Attention sinks and soft caps have no part in the second stage. The variant for conversations,
    which keeps the whole KV, is not here.
    """

    name: ClassVar[str] = "rocketkv"
    step_selection: ClassVar[StepChoice | None] = StepChoice.HYBRID

    pool_pages: PoolPages = 3
    """As in snapkv; 3 pages are nearest to the paper's 63 tokens."""
    read_share: Annotated[
        float | None,
        Field(gt=0, le=1),
        Why(
            "it is the share of a prompt's pages that a step reads",
            "choose a number above 0 and up to 1, such as 0.05, or remove it for the paper's rule",
        ),
    ] = None
    """Share of the prompt's pages that a step reads of each head, at most what is kept; None: by
    the paper's split of `gpu_budget`."""
    channel_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a head's channels that the second stage looks at."""

    @property
    def step_channel_share(self) -> float:
        return self.channel_share

    def pages_read(
        self, budgets: np.ndarray, num_pages: int, config: HeteroCacheConfig
    ) -> np.ndarray:
        """Protected pages and one more at least."""
        share = self.read_share
        if share is None:
            share = paper_read_share(config.gpu_budget)
        wanted = max(math.ceil(share * num_pages - 1e-9), config.min_pages)
        return np.minimum(budgets, wanted)


def paper_read_share(gpu_budget: float) -> float:
    """1 / (2 * c) for the compression c of which the first stage does 1 / `gpu_budget`, (0, 1]; at
    most `gpu_budget`.

    With x = log2(c), log2(1 / gpu_budget) is x * (0.2 + 0.06 * x), or 0.8 * x where that is less.
    """
    first_stage = math.log2(1 / gpu_budget)
    root = math.sqrt(LEAST_SPLIT**2 + 4 * SPLIT_SLOPE * first_stage)
    ratio = max((root - LEAST_SPLIT) / (2 * SPLIT_SLOPE), first_stage / MOST_SPLIT)
    return min(gpu_budget, 0.5 * 2**-ratio)
