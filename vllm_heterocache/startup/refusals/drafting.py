"""Drafters that do not go together with compacted prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat.drafters import LAYERED_METHODS, drafts_with_layers
from vllm_heterocache.compat.platforms import STOCK_BACKENDS
from vllm_heterocache.kernels.tuning import MAX_QUERIES
from vllm_heterocache.startup.refusals.common import sentence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_heterocache.refusal import Sentence

DRAFTING_METHODS = ("ngram", "ngram_gpu", *LAYERED_METHODS)


def speculation(config: Any) -> Iterator[Sentence]:
    spec = config.speculative_config
    if spec is None:
        return
    if spec.method not in DRAFTING_METHODS:
        yield sentence(
            f"speculative_config (method {spec.method!r})",
            "drafting with it was not tested with compacted prompts",
            f"use one of the methods {', '.join(DRAFTING_METHODS)} or remove --speculative-config",
        )
    if spec.num_speculative_tokens >= MAX_QUERIES:
        yield sentence(
            f"speculative_config (num_speculative_tokens {spec.num_speculative_tokens})",
            f"a decode row has at most {MAX_QUERIES} tokens",
            f"use num_speculative_tokens of {MAX_QUERIES - 1} or less",
        )


def drafter(config: Any) -> Iterator[Sentence]:
    """What does not go together with a drafter that has attention layers of its own."""
    if not drafts_with_layers(config):
        return
    spec, method = config.speculative_config, config.speculative_config.method
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1:
        yield sentence(
            f"pipeline_parallel_size={stages} with a drafter (method {method!r})",
            "its layers lie on one rank, and blocks of the KV pool are alike on all ranks",
            "use --tensor-parallel-size instead or draft with method 'ngram'",
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield sentence(
            f"disable_hybrid_kv_cache_manager=True with a drafter (method {method!r})",
            "its layers need a KV-cache group of their own",
            "remove --disable-hybrid-kv-cache-manager",
        )
    if spec.attention_backend is not None and spec.attention_backend.name != STOCK_BACKENDS["cuda"]:
        yield sentence(
            f"speculative_config (attention_backend {spec.attention_backend.name!r})",
            "the drafter's KV lies in the packed blocks of the model's",
            "remove attention_backend from --speculative-config",
        )
    cache_dtype = spec.kv_cache_dtype
    if cache_dtype is not None and cache_dtype != config.cache_config.cache_dtype:
        yield sentence(
            f"speculative_config (kv_cache_dtype {cache_dtype!r})",
            "drafter and model take turns in the blocks of one KV pool",
            "remove kv_cache_dtype from --speculative-config",
        )
