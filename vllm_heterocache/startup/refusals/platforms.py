"""What the kernels of a platform do not take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.kernels.tuning import MAX_VECTORS, PAGED_DECODE
from vllm_heterocache.kernels.values import MAX_CHECKED_PAGES
from vllm_heterocache.kv_cache_dtype import dtype_of_model
from vllm_heterocache.refusal import Refusal, refuse
from vllm_heterocache.startup.refusals.common import sentence

if TYPE_CHECKING:
    from vllm_heterocache.policies.policy import Policy

CUDA_DTYPES = ("bfloat16", "float16")


def check_kernels(vllm_config: Any, platform: str) -> None:
    """Raise Refusal for a model whose heads or dtype the platform's kernels do not take.

    `platform` is "cpu" or "cuda"; the references that the CPU runs take anything.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if platform == "cpu" or model is None:
        return
    head_size, dtype = model.get_head_size(), dtype_of_model(vllm_config)
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    sizes = ", ".join(map(str, PAGED_DECODE))
    if head_size not in PAGED_DECODE or group > MAX_VECTORS:
        raise Refusal(
            *sentence(
                f"the model {model.model!r}",
                f"its heads of {head_size} with {group} query heads each are not among those the "
                f"CUDA kernels take (heads of {sizes}, up to {MAX_VECTORS} query heads each)",
                "serve it with another attention backend",
            )
        )
    speculation = vllm_config.speculative_config
    num_drafts = 0 if speculation is None else speculation.num_speculative_tokens
    if group * (1 + num_drafts) > MAX_VECTORS:
        most = MAX_VECTORS // group - 1
        raise Refusal(
            *sentence(
                f"speculative_config (num_speculative_tokens {num_drafts})",
                f"{group} query heads a KV head with {1 + num_drafts} tokens each are more than "
                f"the {MAX_VECTORS} rows of the decode kernel's tile",
                f"use num_speculative_tokens of {most} or less"
                if most
                else "remove --speculative-config",
            )
        )
    if dtype not in CUDA_DTYPES:
        raise Refusal(
            *sentence(
                f"dtype={dtype!r}",
                "FlashAttention, which prefills, takes 16-bit floats",
                f"use --dtype {' or '.join(CUDA_DTYPES)}",
            )
        )


def check_policy(vllm_config: Any, policy: Policy, platform: str) -> None:
    """Raise Refusal for a policy that looks at more queries than a prompt has, or that waits for
    the device inside a step, where CUDA graphs are to replay that step.

    `platform` is "cpu" or "cuda".
    """
    model, observed = vllm_config.model_config, policy.observed_queries
    is_chosen = observed > type(policy)().observed_queries
    if model is not None and is_chosen and observed > model.max_model_len:
        refuse(
            "policy_options",
            {"window": observed},
            f"no prompt has more queries than max_model_len={model.max_model_len}, and those of a "
            "window take memory",
            "choose a smaller window or remove it",
        )
    if policy.is_graphed or platform == "cpu":
        return
    if vllm_config.model_config is not None and not vllm_config.model_config.enforce_eager:
        raise Refusal(
            *sentence(
                f"policy {policy.name!r} with CUDA graphs",
                "it is for evaluation and waits for the device in every layer",
                "add --enforce-eager",
            )
        )


def check_length(
    vllm_config: Any, config: HeteroCacheConfig, policy: Policy, platform: str
) -> None:
    """Raise Refusal where prompts may be longer than the CUDA kernels of a drift check take.

    `platform` is "cpu" or "cuda".
    """
    model, longest = vllm_config.model_config, MAX_CHECKED_PAGES * PAGE_SIZE
    if platform == "cpu" or model is None or not (policy.needs_profile and config.watches_drift):
        return
    if model.max_model_len > longest:
        raise Refusal(
            *sentence(
                f"max_model_len={model.max_model_len}",
                f"a drift check ranks prompts of up to {longest} tokens",
                f"use --max-model-len {longest} or set the heterocache option drift_threshold to 0",
            )
        )
