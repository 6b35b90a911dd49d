"""Options of the engine that do not go together with compacted prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat.backend_name import BACKEND_NAME
from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.startup.refusals.common import is_ours, sentence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_heterocache.refusal import Sentence


def block_size(config: Any) -> Iterator[Sentence]:
    cache = config.cache_config
    if cache.user_specified_block_size and cache.block_size != PAGE_SIZE:
        yield sentence(
            f"block_size={cache.block_size}",
            f"a block is one page of {PAGE_SIZE} tokens for every head",
            f"remove --block-size or set it to {PAGE_SIZE}",
        )


def context_parallel(config: Any) -> Iterator[Sentence]:
    parallel = config.parallel_config
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, option)
        if size > 1:
            yield sentence(
                f"{option}={size}",
                "a page must lie whole on one rank",
                f"remove --{option.replace('_', '-')}",
            )


def micro_batches(config: Any) -> Iterator[Sentence]:
    if config.parallel_config.use_ubatching:
        yield sentence(
            "dual-batch overlap (enable_dbo or ubatch_size)",
            "page tables are written once per step for the whole batch",
            "remove --enable-dbo and --ubatch-size",
        )


def executor(config: Any) -> Iterator[Sentence]:
    parallel = config.parallel_config
    executor = parallel.distributed_executor_backend
    if parallel.world_size > 1 and executor == "external_launcher":
        yield sentence(
            f"distributed_executor_backend={executor!r} with {parallel.world_size} ranks",
            "each rank has a scheduler of its own, which hears of its own compactions alone",
            "use --distributed-executor-backend mp or ray",
        )


def worker(config: Any) -> Iterator[Sentence]:
    worker = config.parallel_config.worker_cls
    stock = isinstance(worker, str) and (worker == "auto" or worker.startswith("vllm.v1.worker."))
    if not stock and not is_ours(worker):
        yield sentence(
            f"worker_cls={worker!r}",
            "HeteroCache installs its own worker",
            "remove --worker-cls",
        )


def other_attention(config: Any) -> Iterator[Sentence]:
    attention = config.attention_config
    if attention.hisparse_config is not None:
        yield sentence(
            "attention_config.hisparse_config",
            "it installs KV-cache groups and host memory of its own",
            "remove it from --attention-config",
        )
    backend = attention.backend_per_kind.get("full_attention")
    if backend is not None and backend.name != BACKEND_NAME:
        yield sentence(
            f"attention_config.backend_per_kind={{'full_attention': {backend.name!r}}}",
            "the layers that it sends to another backend are those to compress",
            "remove full_attention from backend_per_kind",
        )


def aux_output(config: Any) -> Iterator[Sentence]:
    if config.aux_output_config.enabled:
        yield sentence(
            "aux_output_config (enable_return_routed_experts)",
            "its prefix-cache hits end elsewhere than a compacted prompt's",
            "remove --enable-return-routed-experts",
        )


def fast_prefill(config: Any) -> Iterator[Sentence]:
    if config.cache_config.kv_sharing_fast_prefill:
        yield sentence(
            "kv_sharing_fast_prefill=True",
            "the last prompt queries of every layer are needed to select pages",
            "remove --kv-sharing-fast-prefill",
        )


def sleep_mode(config: Any) -> Iterator[Sentence]:
    if config.model_config.enable_sleep_mode:
        yield sentence(
            "enable_sleep_mode=True",
            "page tables and host pool stay while the KV cache goes",
            "remove --enable-sleep-mode",
        )
