"""Which of vLLM's drafters have attention layers of their own."""

from __future__ import annotations

from typing import Any

# The methods among these that are tested with compacted prompts; MTP is not yet.
LAYERED_METHODS = ("draft_model", "eagle", "eagle3")


def drafts_with_layers(vllm_config: Any) -> bool:
    """Whether the engine drafts with attention layers beside those of the model."""
    speculation = vllm_config.speculative_config
    return speculation is not None and speculation.method in LAYERED_METHODS


def is_first_group_drafted_from(vllm_config: Any) -> bool:
    """Whether the drafter reads the block table of vLLM's first KV-cache group, whichever it is:
    the V1 model runner hands that one to a draft model."""
    speculation = vllm_config.speculative_config
    return speculation is not None and speculation.method == "draft_model"
