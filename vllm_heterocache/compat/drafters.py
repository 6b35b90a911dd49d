"""Which of vLLM's drafters have attention layers of their own."""

from __future__ import annotations

from typing import Any

# The methods among these that are tested with compacted prompts.
LAYERED_METHODS = ("draft_model", "eagle", "eagle3", "mtp")


def drafts_with_layers(vllm_config: Any) -> bool:
    """Whether the engine drafts with attention layers beside those of the model."""
    speculation = vllm_config.speculative_config
    return speculation is not None and speculation.method in LAYERED_METHODS


def drafter_heads(vllm_config: Any) -> tuple[int, int, int]:
    """Of a drafter with layers of its own: layers, KV heads of one on a rank, and size of a head.

    The drafter's config tells them before the drafter is loaded.
    """
    speculation = vllm_config.speculative_config
    model = speculation.draft_model_config
    num_kv_heads = model.get_num_kv_heads(speculation.draft_parallel_config)
    return model.get_total_num_hidden_layers(), num_kv_heads, model.get_head_size()


def is_first_group_drafted_from(vllm_config: Any) -> bool:
    """Whether the drafter reads the block table of vLLM's first KV-cache group, whichever it is:
    the V1 model runner hands that one to a draft model."""
    speculation = vllm_config.speculative_config
    return speculation is not None and speculation.method == "draft_model"


def is_of_draft_model(vllm_config: Any) -> bool:
    """Whether this is the config that the V2 model runner makes for a draft model."""
    speculation = vllm_config.speculative_config
    if speculation is None or speculation.method != "draft_model":
        return False
    return vllm_config.model_config is speculation.draft_model_config


def name_drafter_backend(vllm_config: Any) -> None:
    """Serve a draft model by the drafter's backend: the V2 model runner hands on the model's,
    unlike the V1 runner, and unlike both runners for EAGLE."""
    from vllm.config.utils import replace

    backend = vllm_config.speculative_config.attention_backend
    attention_config = replace(vllm_config.attention_config, backend=backend)
    vllm_config.attention_config = attention_config
