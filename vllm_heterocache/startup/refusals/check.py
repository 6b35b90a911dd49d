"""Which vLLM configurations HeteroCache refuses, and what to do about each.

The files beside this one work on the attributes of vLLM's `VllmConfig` and import nothing of vLLM,
so that every refusal can be tested without an engine. A check takes a `VllmConfig`, and yields a
sentence for each reason to refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vllm_heterocache.refusal import Refusal, Sentence
from vllm_heterocache.startup.refusals import (
    connectors,
    drafting,
    engine_options,
    kv_cache_dtypes,
    models,
    other_layers,
)

Check = Callable[[Any], Iterator[Sentence]]

_ENGINE_CHECKS: tuple[Check, ...] = (
    drafting.speculation,
    drafting.drafter,
    engine_options.block_size,
    engine_options.context_parallel,
    engine_options.micro_batches,
    engine_options.executor,
    connectors.kv_connectors,
    engine_options.worker,
    engine_options.other_attention,
    engine_options.aux_output,
    engine_options.fast_prefill,
)
_MODEL_CHECKS: tuple[Check, ...] = (
    kv_cache_dtypes.dtype_of_pages,
    kv_cache_dtypes.layers_of_other_dtypes,
    engine_options.sleep_mode,
    models.shared_kv,
    models.model_kind,
    models.attention_kind,
    models.head_shape,
    other_layers.other_layers,
)


def check_vllm_config(vllm_config: Any) -> None:
    """Raise Refusal for the first thing HeteroCache cannot serve.

    Idempotent and free of side effects: a config that the plugin has already rewritten passes.
    """
    for problem in unsupported(vllm_config):
        raise Refusal(*problem)


def unsupported(vllm_config: Any) -> Iterator[Sentence]:
    """Every reason to refuse this config, each as a sentence that names the option and the fix."""
    checks = _ENGINE_CHECKS
    if vllm_config.model_config is not None:
        checks += _MODEL_CHECKS
    for check in checks:
        yield from check(vllm_config)
