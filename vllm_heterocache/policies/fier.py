"""FIER: the whole prompt stays, and each step reads where keys of one bit promise attention."""

from __future__ import annotations

from typing import ClassVar

from vllm_heterocache.policies.policy import StepChoice
from vllm_heterocache.policies.step_policy import StepPolicyBehindFullLayers
from vllm_heterocache.refusal import options


@options
class FIER(StepPolicyBehindFullLayers):
    """Pages of the tokens with the largest logits on one-bit keys (Wang et al., arXiv 2508.08256,
    section 3).

    Keys are rounded to one bit a channel, to nearest, in groups of tokens with a scale and a zero
    point for each channel: `k~ = bit * s + z`. Each step takes `q k~` of every token, and reads the
    tokens where it is largest with their exact keys and values.

    Memory: it frees none, and takes 3/32 of a KV pool of 16 bits for the keys of one bit: two
    vectors a page for scale and zero point, and as much as one for the bits. Bytes read at a step,
    as a share of dense: `gpu_budget`, and 3/32 of the K and V of the compressed heads' prompts for
    these keys.

    **Pages in place of tokens.** Decode attention reads pages here. So the score of a page is the
    largest logit of its tokens, over the query heads of the group, and the whole page is read: the
    same bytes name 16 times fewer places than in the paper. Where the tokens that matter lie apart,
    as the paper finds, pages read less of them. A group for rounding is a page, where the paper has
    32 tokens, so that prompts can share pages; keys are a little more exact for it, and scales take
    twice the memory.

    As in the paper, the first two layers are read whole; here they count towards `gpu_budget`.
    Sinks and recent pages are always read, and so is all that was generated.
    """

    name: ClassVar[str] = "fier"
    step_selection: ClassVar[StepChoice | None] = StepChoice.ONE_BIT
