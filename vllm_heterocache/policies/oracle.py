"""Oracle: the best that choosing whole pages at each step can do; for evaluation only."""

from __future__ import annotations

from typing import ClassVar

from vllm_heterocache.policies.policy import StepChoice
from vllm_heterocache.policies.step_policy import StepPolicy
from vllm_heterocache.refusal import options


@options
class Oracle(StepPolicy):
    """Pages by the exact attention of the step's own query; a yardstick, not a method.

    The score of a page is `max_g sum_{t in page} softmax(q_g . K)_t` over the full pages of the
    prompt, the largest over the query heads of the group. Every head has the same budget, all
    that was generated is read, and so are sinks and recent pages.

    It frees no memory, reads all keys of the prompt to choose, and waits for the device in every
    layer: on CUDA it needs --enforce-eager.
    """

    name: ClassVar[str] = "oracle"
    step_selection: ClassVar[StepChoice | None] = StepChoice.EXACT
