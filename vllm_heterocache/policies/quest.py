"""Quest: the whole prompt stays, and each step reads the pages that its query may attend to."""

from __future__ import annotations

from typing import ClassVar

from vllm_heterocache.policies.policy import StepChoice
from vllm_heterocache.policies.step_policy import StepPolicyBehindFullLayers
from vllm_heterocache.refusal import options


@options
class Quest(StepPolicyBehindFullLayers):
    """Pages by an upper bound on their logits (Tang et al., arXiv 2406.10774, section 3.3).

    The score of a page is `sum_d max(q_d * least_d, q_d * largest_d)` over the channels of the
    smallest box around its keys: no key of the page has a larger product with the query. Each
    head reads its budget's pages of the highest score, chosen anew at each step.

    Memory: it frees none, and takes 1/16 of the KV pool for the boxes. Bytes read at a step, as a
    share of dense: `gpu_budget`, and 1/16 of the K and V of the compressed heads' prompts for
    the boxes (a box is two vectors, a page 32).

    As in the authors' code, pages are 16 tokens and the first two layers are read whole. Here
    these layers count towards `gpu_budget`; the query heads of a KV head share one list, by their
    largest score; sinks and recent pages are always read, and so is all that was generated, where
    the paper chooses among generated pages as well.
    """

    name: ClassVar[str] = "quest"
    step_selection: ClassVar[StepChoice | None] = StepChoice.SUMMARIES
