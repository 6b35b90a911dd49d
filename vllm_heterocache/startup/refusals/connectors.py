"""Connectors of KV that do not go together with compacted prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat.connectors import (
    NIXL,
    OFFLOADING,
    asked_connectors,
    is_vllms,
    options_of,
)
from vllm_heterocache.compat.drafters import drafts_with_layers
from vllm_heterocache.refusal import Refusal
from vllm_heterocache.startup.refusals.common import is_ours, sentence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_heterocache.refusal import Sentence


def kv_connectors(config: Any) -> Iterator[Sentence]:
    asked = asked_connectors(config)
    for one in asked:
        name = one.get("kv_connector")
        is_known = is_vllms(one, OFFLOADING) or is_vllms(one, NIXL)
        if not is_known and not is_ours(one.get("kv_connector_module_path")):
            yield sentence(
                f"kv_connector={name!r}",
                "it was not tested which KV of a compacted prompt it would copy",
                f"use {NIXL} or {OFFLOADING}, or remove --kv-transfer-config",
            )
    names = [one.get("kv_connector") for one in asked]
    if len(set(names)) < len(names):
        yield sentence(
            f"kv_connector_extra_config with the connectors {names}",
            "two of a kind share names of their counters",
            "name each connector once",
        )
    if (options := options_of(config, OFFLOADING)) is not None:
        yield from _offloading(config, options)
    if (options := options_of(config, NIXL)) is not None:
        yield from _prefill_elsewhere(config, options)


def _offloading(config: Any, options: dict[str, Any]) -> Iterator[Sentence]:
    """What does not go together with vLLM's offloading of KV blocks to the host."""
    backend = config.cache_config.kv_offloading_backend
    if config.cache_config.kv_offloading_size is not None and backend != "native":
        yield sentence(
            f"kv_offloading_backend={backend!r}",
            "it was not tested which KV of a compacted prompt it would copy",
            "use --kv-offloading-backend native",
        )
    if drafts_with_layers(config):
        yield sentence(
            f"KV offloading with a drafter (method {config.speculative_config.method!r})",
            "copying a drafter's blocks was not tested",
            "remove --kv-offloading-size or draft with method 'ngram'",
        )
    if not options.get("offload_prompt_only", True):
        yield sentence(
            "offload_prompt_only=False in kv_connector_extra_config",
            "generated tokens were computed from a part of the KV",
            "remove it",
        )


def _prefill_elsewhere(config: Any, options: dict[str, Any]) -> Iterator[Sentence]:
    """What does not go together with prompts that another engine prefills."""
    if options.get("bidirectional_kv_xfer", False):
        yield sentence(
            "bidirectional_kv_xfer=True in kv_connector_extra_config",
            "a compacted prompt would be sent back",
            "remove it",
        )
    if drafts_with_layers(config):
        yield sentence(
            f"{NIXL} with a drafter (method {config.speculative_config.method!r})",
            "sending a drafter's blocks was not tested",
            "remove --kv-transfer-config or draft with method 'ngram'",
        )
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1:
        yield sentence(
            f"pipeline_parallel_size={stages} with {NIXL}",
            "sending the blocks of several stages was not tested",
            "use --tensor-parallel-size instead",
        )


def check_connectors(vllm_config: Any, platform: str) -> None:
    """Raise Refusal where a connector of vLLM's has no copies for this platform, "cpu" or
    "cuda"."""
    for one in asked_connectors(vllm_config):
        device = one.get("kv_buffer_device") or platform
        if is_vllms(one, NIXL) and device != platform:
            raise Refusal(
                *sentence(
                    f"kv_buffer_device={device!r} with {NIXL} on the {platform} platform",
                    "blocks are sent from where they lie and received there",
                    f"use kv_buffer_device {platform!r} in --kv-transfer-config",
                )
            )
    options = options_of(vllm_config, OFFLOADING)
    # a specification of one's own may have them
    if platform == "cpu" and options is not None and "spec_name" not in options:
        raise Refusal(
            *sentence(
                "kv_offloading_size on the CPU platform",
                "vLLM copies KV blocks to the host from a GPU alone",
                "remove --kv-offloading-size",
            )
        )
