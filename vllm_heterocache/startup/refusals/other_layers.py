"""What does not go together with layers that vLLM serves beside those served here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat.connectors import NIXL, OFFLOADING, options_of
from vllm_heterocache.compat.drafters import drafts_with_layers
from vllm_heterocache.compat.layer_kinds import mixes_recurrent_layers, mixes_sliding_layers
from vllm_heterocache.compat.platforms import STOCK_BACKENDS
from vllm_heterocache.startup.refusals.common import sentence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_heterocache.refusal import Sentence


def other_layers(config: Any) -> Iterator[Sentence]:
    """What does not go together with layers that vLLM serves beside those served here."""
    model = config.model_config
    if mixes_recurrent_layers(model):
        name = f"the model {model.model!r}, some layers of which are recurrent"
        yield from _recurrent_layers(config, name)
    elif mixes_sliding_layers(model):
        name = f"the model {model.model!r}, some layers of which slide over a window"
        yield from _sliding_layers(config, name)
    else:
        return
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1:
        yield sentence(
            f"pipeline_parallel_size={stages} with {name}",
            "ranks would have unlike shares of both kinds of layers, and blocks of the KV pool are "
            "alike on all ranks",
            "use --tensor-parallel-size instead",
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield sentence(
            f"disable_hybrid_kv_cache_manager=True with {name}",
            "these layers need KV-cache groups of their own",
            "remove --disable-hybrid-kv-cache-manager",
        )
    if options_of(config, OFFLOADING) is not None:
        yield sentence(
            f"KV offloading with {name}",
            "copying blocks of several kinds of layers to the host was not tested",
            "remove --kv-offloading-size",
        )
    if options_of(config, NIXL) is not None:
        yield sentence(
            f"kv_connector={NIXL!r} with {name}",
            "sending blocks of several kinds of layers was not tested",
            "remove --kv-transfer-config",
        )


def _recurrent_layers(config: Any, name: str) -> Iterator[Sentence]:
    cache = config.cache_config
    if drafts_with_layers(config) and config.speculative_config.method != "mtp":
        yield sentence(
            f"speculative_config (method {config.speculative_config.method!r}) with {name}",
            "blocks of three kinds of layers in one KV pool were tested with MTP layers alone",
            "draft with method 'mtp' or 'ngram' or remove --speculative-config",
        )
    if cache.prefix_match_unit is not None:
        yield sentence(
            f"prefix_match_unit={cache.prefix_match_unit} with {name}",
            "prefix-cache hits that end within a block were not tested",
            "remove --prefix-match-unit",
        )


def _sliding_layers(config: Any, name: str) -> Iterator[Sentence]:
    if drafts_with_layers(config):
        yield sentence(
            f"speculative_config (method {config.speculative_config.method!r}) with {name}",
            "blocks of three kinds of layers in one KV pool were not tested",
            "draft with method 'ngram' or remove --speculative-config",
        )
    backend = config.attention_config.backend_per_kind.get("sliding_window")
    if backend is not None and backend.name not in STOCK_BACKENDS.values():
        yield sentence(
            f"attention_config.backend_per_kind={{'sliding_window': {backend.name!r}}}",
            "the KV of these layers lies in the packed blocks of those served by HeteroCache",
            "remove sliding_window from backend_per_kind",
        )
