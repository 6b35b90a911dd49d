"""Which vLLM configurations HeteroCache refuses, and what to do about each.

Works on the attributes of vLLM's `VllmConfig` and imports nothing of vLLM, so that every refusal
can be tested without an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat.backend_name import BACKEND_NAME
from vllm_heterocache.compat.connectors import (
    NIXL,
    OFFLOADING,
    asked_connectors,
    is_vllms,
    options_of,
)
from vllm_heterocache.compat.drafters import LAYERED_METHODS, drafts_with_layers
from vllm_heterocache.compat.layer_kinds import (
    FULL_ATTENTION_KINDS,
    KINDS_WITHOUT_CACHE,
    RECURRENT_KINDS,
    SLIDING_KIND,
    layer_kinds,
    mixes_recurrent_layers,
    mixes_sliding_layers,
)
from vllm_heterocache.config import PAGE_SIZE, HeteroCacheConfig
from vllm_heterocache.kernels.tuning import MAX_QUERIES, MAX_VECTORS, PAGED_DECODE
from vllm_heterocache.kernels.values import MAX_CHECKED_PAGES
from vllm_heterocache.kv_cache_dtype import FP8_ELEMENTS, declares_fp8, kv_cache_dtype
from vllm_heterocache.refusal import refuse

if TYPE_CHECKING:
    from vllm_heterocache.policies.policy import Policy

PACKAGE = "vllm_heterocache"
GIB = 1 << 30
CACHE_DTYPES = ("float16", "bfloat16")  # those that --kv-cache-dtype can name
DRAFTING_METHODS = ("ngram", "ngram_gpu", *LAYERED_METHODS)
# of layers that vLLM serves: takes the layout of the pool, as the model's prefill shows
OTHER_BACKEND = "FLASH_ATTN"
OTHER_BACKENDS = (OTHER_BACKEND, "CPU_ATTN")  # one of each platform
CUDA_DTYPES = ("bfloat16", "float16")


def check_vllm_config(vllm_config: Any) -> None:
    """Raise ValueError, in one sentence, for the first thing HeteroCache cannot serve.

    Idempotent and free of side effects: a config that the plugin has already rewritten passes.
    """
    for problem in unsupported(vllm_config):
        raise ValueError(problem)


def unsupported(vllm_config: Any) -> Iterator[str]:
    """Every reason to refuse this config, each as a sentence that names the option and the fix."""
    checks = _ENGINE_CHECKS
    if vllm_config.model_config is not None:
        checks += _MODEL_CHECKS
    for check in checks:
        yield from check(vllm_config)


def check_kernels(vllm_config: Any, platform: str) -> None:
    """Raise ValueError for a model whose heads or dtype the platform's kernels do not take.

    `platform` is "cpu" or "cuda"; the references that the CPU runs take anything.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if platform == "cpu" or model is None:
        return
    head_size, dtype = model.get_head_size(), _model_dtype(vllm_config)
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    sizes = ", ".join(map(str, PAGED_DECODE))
    if head_size not in PAGED_DECODE or group > MAX_VECTORS:
        raise ValueError(
            _sentence(
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
        raise ValueError(
            _sentence(
                f"speculative_config (num_speculative_tokens {num_drafts})",
                f"{group} query heads a KV head with {1 + num_drafts} tokens each are more than "
                f"the {MAX_VECTORS} rows of the decode kernel's tile",
                f"use num_speculative_tokens of {most} or less"
                if most
                else "remove --speculative-config",
            )
        )
    if dtype not in CUDA_DTYPES:
        raise ValueError(
            _sentence(
                f"dtype={dtype!r}",
                "FlashAttention, which prefills, takes 16-bit floats",
                f"use --dtype {' or '.join(CUDA_DTYPES)}",
            )
        )


def check_fp8_prefill(
    vllm_config: Any, platform: str, prefills: Callable[[str, int], bool]
) -> None:
    """Raise ValueError for an fp8 KV cache that FlashAttention cannot prefill on this GPU.

    Args:
        platform: "cpu" or "cuda"; the references that the CPU runs take every fp8 dtype.
        prefills: whether FlashAttention takes a KV cache of this dtype, with heads of this size.
    """
    model = vllm_config.model_config
    if platform == "cpu" or model is None:
        return
    dtype, head_size = kv_cache_dtype(vllm_config), model.get_head_size()
    if dtype not in FP8_ELEMENTS:
        return
    if prefills(dtype, head_size):
        _check_fp8_output(vllm_config, dtype)
        return
    other = "fp8" if prefills("fp8", head_size) else _model_dtype(vllm_config)
    origin = ", which the checkpoint declares" if declares_fp8(vllm_config) else ""
    raise ValueError(
        _sentence(
            f"kv_cache_dtype={dtype!r}{origin}",
            "FlashAttention, which prefills, does not take it on this GPU",
            f"use --kv-cache-dtype {other}",
        )
    )


def _check_fp8_output(vllm_config: Any, cache_dtype: str) -> None:
    model_dtype = _model_dtype(vllm_config)
    if model_dtype != "bfloat16":
        raise ValueError(
            _sentence(
                f"kv_cache_dtype={cache_dtype!r} with dtype={model_dtype!r}",
                "FlashAttention, which prefills, answers in bfloat16 where the KV cache is fp8",
                f"use --dtype bfloat16 or --kv-cache-dtype {model_dtype}",
            )
        )


def check_policy(vllm_config: Any, policy: Policy, platform: str) -> None:
    """Raise ValueError for a policy that looks at more queries than a prompt has, or that waits for
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
    choice = policy.step_selection
    if choice is None or choice.is_graphed or platform == "cpu":
        return
    if vllm_config.model_config is not None and not vllm_config.model_config.enforce_eager:
        raise ValueError(
            _sentence(
                f"policy {policy.name!r} with CUDA graphs",
                "it is for evaluation and waits for the device in every layer",
                "add --enforce-eager",
            )
        )


def check_length(
    vllm_config: Any, config: HeteroCacheConfig, policy: Policy, platform: str
) -> None:
    """Raise ValueError where prompts may be longer than the CUDA kernels of a drift check take.

    `platform` is "cpu" or "cuda".
    """
    model, longest = vllm_config.model_config, MAX_CHECKED_PAGES * PAGE_SIZE
    if platform == "cpu" or model is None or not (policy.needs_profile and config.watches_drift):
        return
    if model.max_model_len > longest:
        raise ValueError(
            _sentence(
                f"max_model_len={model.max_model_len}",
                f"a drift check ranks prompts of up to {longest} tokens",
                f"use --max-model-len {longest} or set the heterocache option drift_threshold to 0",
            )
        )


def check_connectors(vllm_config: Any, platform: str) -> None:
    """Raise ValueError where a connector of vLLM's has no copies for this platform, "cpu" or
    "cuda"."""
    for one in asked_connectors(vllm_config):
        device = one.get("kv_buffer_device") or platform
        if is_vllms(one, NIXL) and device != platform:
            raise ValueError(
                _sentence(
                    f"kv_buffer_device={device!r} with {NIXL} on the {platform} platform",
                    "blocks are sent from where they lie and received there",
                    f"use kv_buffer_device {platform!r} in --kv-transfer-config",
                )
            )
    options = options_of(vllm_config, OFFLOADING)
    # a specification of one's own may have them
    if platform == "cpu" and options is not None and "spec_name" not in options:
        raise ValueError(
            _sentence(
                "kv_offloading_size on the CPU platform",
                "vLLM copies KV blocks to the host from a GPU alone",
                "remove --kv-offloading-size",
            )
        )


def check_host_pool(pool_bytes: int, needed_bytes: int, max_model_len: int) -> None:
    """Raise ValueError when one worker's host pool cannot hold the pages of one longest request.

    `pool_bytes` is the pool's size, as asked for or as sized automatically; `needed_bytes` is what
    the satellites of one request of `max_model_len` tokens offload.
    """
    if pool_bytes >= needed_bytes:
        return
    raise ValueError(
        f"heterocache option cpu_pool_gib gives a host pool of {pool_bytes / GIB:.2f} GiB per "
        f"worker, which is too small: one request of max_model_len={max_model_len} offloads "
        f"{needed_bytes / GIB:.2f} GiB; set cpu_pool_gib to at least "
        f"{_round_up_gib(needed_bytes):.2f} or lower --max-model-len."
    )


def check_host_memory(pool_gib: float | None, free_bytes: int) -> None:
    """Raise ValueError for a host pool that this host has no memory for.

    Args:
        pool_gib: the option `cpu_pool_gib`; automatic sizing (None) stays within what is free.
        free_bytes: memory free on the host for each worker.
    """
    if pool_gib is None or pool_gib * GIB <= free_bytes:
        return
    refuse(
        "cpu_pool_gib",
        pool_gib,
        f"the host has {free_bytes / GIB:.2f} GiB of memory free for each worker",
        "choose less, or remove it for automatic sizing",
    )


def _round_up_gib(num_bytes: int) -> float:
    """Hundredths of a GiB, rounded up, so that the printed number is enough."""
    return -(-num_bytes * 100 // GIB) / 100


def _sentence(option: str, reason: str, fix: str) -> str:
    return f"--attention-backend heterocache does not support {option}: {reason}; {fix}."


def _speculation(config: Any) -> Iterator[str]:
    spec = config.speculative_config
    if spec is None:
        return
    if spec.method not in DRAFTING_METHODS:
        yield _sentence(
            f"speculative_config (method {spec.method!r})",
            "drafting with it was not tested with compacted prompts",
            f"use one of the methods {', '.join(DRAFTING_METHODS)} or remove --speculative-config",
        )
    if spec.num_speculative_tokens >= MAX_QUERIES:
        yield _sentence(
            f"speculative_config (num_speculative_tokens {spec.num_speculative_tokens})",
            f"a decode row has at most {MAX_QUERIES} tokens",
            f"use num_speculative_tokens of {MAX_QUERIES - 1} or less",
        )


def _drafter(config: Any) -> Iterator[str]:
    """What does not go together with a drafter that has attention layers of its own."""
    if not drafts_with_layers(config):
        return
    spec, method = config.speculative_config, config.speculative_config.method
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1:
        yield _sentence(
            f"pipeline_parallel_size={stages} with a drafter (method {method!r})",
            "its layers lie on one rank, and blocks of the KV pool are alike on all ranks",
            "use --tensor-parallel-size instead or draft with method 'ngram'",
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield _sentence(
            f"disable_hybrid_kv_cache_manager=True with a drafter (method {method!r})",
            "its layers need a KV-cache group of their own",
            "remove --disable-hybrid-kv-cache-manager",
        )
    if spec.attention_backend is not None and spec.attention_backend.name != OTHER_BACKEND:
        yield _sentence(
            f"speculative_config (attention_backend {spec.attention_backend.name!r})",
            "the drafter's KV lies in the packed blocks of the model's",
            "remove attention_backend from --speculative-config",
        )
    cache_dtype = spec.kv_cache_dtype
    if cache_dtype is not None and cache_dtype != config.cache_config.cache_dtype:
        yield _sentence(
            f"speculative_config (kv_cache_dtype {cache_dtype!r})",
            "drafter and model take turns in the blocks of one KV pool",
            "remove kv_cache_dtype from --speculative-config",
        )


def _kv_cache_dtype(config: Any) -> Iterator[str]:
    dtype, model_dtype = kv_cache_dtype(config), _model_dtype(config)
    if dtype in ("auto", model_dtype, *FP8_ELEMENTS):
        return
    named = model_dtype in CACHE_DTYPES
    yield _sentence(
        f"kv_cache_dtype={dtype!r}",
        f"pages hold keys and values in fp8 or in the model's own precision, dtype={model_dtype!r}",
        f"use --kv-cache-dtype {model_dtype}" if named else "remove --kv-cache-dtype",
    )


def _layers_of_other_dtypes(config: Any) -> Iterator[str]:
    layers = config.cache_config.kv_cache_dtype_skip_layers
    if layers and kv_cache_dtype(config) in FP8_ELEMENTS:
        yield _sentence(
            f"kv_cache_dtype_skip_layers={layers}",
            "a block holds a page of every layer, all in one dtype",
            "remove --kv-cache-dtype-skip-layers",
        )


def _model_dtype(config: Any) -> str:
    return str(config.model_config.dtype).removeprefix("torch.")


def _block_size(config: Any) -> Iterator[str]:
    cache = config.cache_config
    if cache.user_specified_block_size and cache.block_size != PAGE_SIZE:
        yield _sentence(
            f"block_size={cache.block_size}",
            f"a block is one page of {PAGE_SIZE} tokens for every head",
            f"remove --block-size or set it to {PAGE_SIZE}",
        )


def _context_parallel(config: Any) -> Iterator[str]:
    parallel = config.parallel_config
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, option)
        if size > 1:
            yield _sentence(
                f"{option}={size}",
                "a page must lie whole on one rank",
                f"remove --{option.replace('_', '-')}",
            )


def _micro_batches(config: Any) -> Iterator[str]:
    if config.parallel_config.use_ubatching:
        yield _sentence(
            "dual-batch overlap (enable_dbo or ubatch_size)",
            "page tables are written once per step for the whole batch",
            "remove --enable-dbo and --ubatch-size",
        )


def _executor(config: Any) -> Iterator[str]:
    parallel = config.parallel_config
    executor = parallel.distributed_executor_backend
    if parallel.world_size > 1 and executor == "external_launcher":
        yield _sentence(
            f"distributed_executor_backend={executor!r} with {parallel.world_size} ranks",
            "each rank has a scheduler of its own, which hears of its own compactions alone",
            "use --distributed-executor-backend mp or ray",
        )


def _connectors(config: Any) -> Iterator[str]:
    asked = asked_connectors(config)
    for one in asked:
        name = one.get("kv_connector")
        is_known = is_vllms(one, OFFLOADING) or is_vllms(one, NIXL)
        if not is_known and not _is_ours(one.get("kv_connector_module_path")):
            yield _sentence(
                f"kv_connector={name!r}",
                "it was not tested which KV of a compacted prompt it would copy",
                f"use {NIXL} or {OFFLOADING}, or remove --kv-transfer-config",
            )
    names = [one.get("kv_connector") for one in asked]
    if len(set(names)) < len(names):
        yield _sentence(
            f"kv_connector_extra_config with the connectors {names}",
            "two of a kind share names of their counters",
            "name each connector once",
        )
    if (options := options_of(config, OFFLOADING)) is not None:
        yield from _offloading(config, options)
    if (options := options_of(config, NIXL)) is not None:
        yield from _prefill_elsewhere(config, options)


def _offloading(config: Any, options: dict[str, Any]) -> Iterator[str]:
    """What does not go together with vLLM's offloading of KV blocks to the host."""
    backend = config.cache_config.kv_offloading_backend
    if config.cache_config.kv_offloading_size is not None and backend != "native":
        yield _sentence(
            f"kv_offloading_backend={backend!r}",
            "it was not tested which KV of a compacted prompt it would copy",
            "use --kv-offloading-backend native",
        )
    if drafts_with_layers(config):
        yield _sentence(
            f"KV offloading with a drafter (method {config.speculative_config.method!r})",
            "copying a drafter's blocks was not tested",
            "remove --kv-offloading-size or draft with method 'ngram'",
        )
    if not options.get("offload_prompt_only", True):
        yield _sentence(
            "offload_prompt_only=False in kv_connector_extra_config",
            "generated tokens were computed from a part of the KV",
            "remove it",
        )


def _prefill_elsewhere(config: Any, options: dict[str, Any]) -> Iterator[str]:
    """What does not go together with prompts that another engine prefills."""
    if options.get("bidirectional_kv_xfer", False):
        yield _sentence(
            "bidirectional_kv_xfer=True in kv_connector_extra_config",
            "a compacted prompt would be sent back",
            "remove it",
        )
    if drafts_with_layers(config):
        yield _sentence(
            f"{NIXL} with a drafter (method {config.speculative_config.method!r})",
            "sending a drafter's blocks was not tested",
            "remove --kv-transfer-config or draft with method 'ngram'",
        )
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1:
        yield _sentence(
            f"pipeline_parallel_size={stages} with {NIXL}",
            "sending the blocks of several stages was not tested",
            "use --tensor-parallel-size instead",
        )


def _worker(config: Any) -> Iterator[str]:
    worker = config.parallel_config.worker_cls
    stock = isinstance(worker, str) and (worker == "auto" or worker.startswith("vllm.v1.worker."))
    if not stock and not _is_ours(worker):
        yield _sentence(
            f"worker_cls={worker!r}",
            "HeteroCache installs its own worker",
            "remove --worker-cls",
        )


def _is_ours(dotted_name: object) -> bool:
    return isinstance(dotted_name, str) and dotted_name.split(".")[0] == PACKAGE


def _other_attention(config: Any) -> Iterator[str]:
    attention = config.attention_config
    if attention.hisparse_config is not None:
        yield _sentence(
            "attention_config.hisparse_config",
            "it installs KV-cache groups and host memory of its own",
            "remove it from --attention-config",
        )
    backend = attention.backend_per_kind.get("full_attention")
    if backend is not None and backend.name != BACKEND_NAME:
        yield _sentence(
            f"attention_config.backend_per_kind={{'full_attention': {backend.name!r}}}",
            "the layers that it sends to another backend are those to compress",
            "remove full_attention from backend_per_kind",
        )


def _aux_output(config: Any) -> Iterator[str]:
    if config.aux_output_config.enabled:
        yield _sentence(
            "aux_output_config (enable_return_routed_experts)",
            "its prefix-cache hits end elsewhere than a compacted prompt's",
            "remove --enable-return-routed-experts",
        )


def _sleep_mode(config: Any) -> Iterator[str]:
    if config.model_config.enable_sleep_mode:
        yield _sentence(
            "enable_sleep_mode=True",
            "page tables and host pool stay while the KV cache goes",
            "remove --enable-sleep-mode",
        )


def _fast_prefill(config: Any) -> Iterator[str]:
    if config.cache_config.kv_sharing_fast_prefill:
        yield _sentence(
            "kv_sharing_fast_prefill=True",
            "the last prompt queries of every layer are needed to select pages",
            "remove --kv-sharing-fast-prefill",
        )


def _shared_kv(config: Any) -> Iterator[str]:
    shared = getattr(config.model_config.hf_text_config, "num_kv_shared_layers", 0)
    if shared:
        yield _sentence(
            f"the model {config.model_config.model!r}",
            f"{shared} of its layers share the KV cache of other layers (num_kv_shared_layers)",
            "serve it with another attention backend",
        )


def _model_kind(config: Any) -> Iterator[str]:
    model = config.model_config
    kinds = {
        "it uses multi-head latent attention (MLA), which has no per-head KV to select": (
            model.use_mla
        ),
        "its logits have a bias by distance (ALiBi)": model.uses_alibi,
        "it is an encoder-decoder model": model.is_encoder_decoder,
        "it has no attention layers": model.is_attention_free,
        "it is a discrete diffusion model, which attends in both directions": (
            model.is_diffusion or config.diffusion_config is not None
        ),
        "it attends in both directions within images (prefix language model)": (
            model.is_mm_prefix_lm
        ),
    }
    if model.runner_type != "generate":
        kinds[f"it runs as an encoder or pooling model (runner {model.runner_type!r})"] = True
    yield from _refused_models(model, kinds)


def _refused_models(model: Any, kinds: dict[str, bool]) -> Iterator[str]:
    """Sentences for the reasons that apply."""
    for reason, applies in kinds.items():
        if applies:
            yield _sentence(
                f"the model {model.model!r}", reason, "serve it with another attention backend"
            )


def _attention_kind(config: Any) -> Iterator[str]:
    """Models in which layers neither have full causal attention nor slide or are recurrent beside
    such layers."""
    model = config.model_config
    text = model.hf_text_config
    window, kinds = model.get_sliding_window(), layer_kinds(model)
    is_recurrent = mixes_recurrent_layers(model)
    served = (*RECURRENT_KINDS, *KINDS_WITHOUT_CACHE) if is_recurrent else (SLIDING_KIND,)
    others = kinds.difference(FULL_ATTENTION_KINDS, served)
    if kinds == {SLIDING_KIND}:
        yield _sentence(
            f"the model {model.model!r}",
            f"every layer slides over a window of {window} tokens, so there is no long KV cache "
            "to compress",
            "serve it with another attention backend or add --disable-sliding-window with "
            f"--max-model-len {window} or less",
        )
    elif others or model.is_hybrid > is_recurrent or model.rswa_window is not None:
        names = ", ".join(sorted(others)) or "recurrent or windowed layers"
        yield _sentence(
            f"the model {model.model!r}",
            f"it mixes full attention with {names}",
            "serve it with another attention backend",
        )
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk:
        yield _sentence(
            f"the model {model.model!r}",
            f"it attends in chunks of {chunk} tokens",
            "serve it with another attention backend",
        )


def _head_shape(config: Any) -> Iterator[str]:
    """Models whose pages are not K and V of the size that the config calls its heads'."""
    model, text = config.model_config, config.model_config.hf_text_config
    if model.use_mla:
        return
    size, of_values, of_full = (
        getattr(text, name, None) for name in ("head_dim", "v_head_dim", "global_head_dim")
    )
    kinds = {
        f"its keys have {size} elements and its values {of_values}": (
            None not in (size, of_values) and size != of_values
        ),
        f"heads of its layers with full attention have {of_full} elements and others {size}": (
            None not in (size, of_full) and size != of_full
        ),
        "keys of its layers with full attention are their values (attention_k_eq_v)": getattr(
            text, "attention_k_eq_v", False
        ),
    }
    yield from _refused_models(model, kinds)


def _other_layers(config: Any) -> Iterator[str]:
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
        yield _sentence(
            f"pipeline_parallel_size={stages} with {name}",
            "ranks would have unlike shares of both kinds of layers, and blocks of the KV pool are "
            "alike on all ranks",
            "use --tensor-parallel-size instead",
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield _sentence(
            f"disable_hybrid_kv_cache_manager=True with {name}",
            "these layers need KV-cache groups of their own",
            "remove --disable-hybrid-kv-cache-manager",
        )
    if options_of(config, OFFLOADING) is not None:
        yield _sentence(
            f"KV offloading with {name}",
            "copying blocks of several kinds of layers to the host was not tested",
            "remove --kv-offloading-size",
        )
    if options_of(config, NIXL) is not None:
        yield _sentence(
            f"kv_connector={NIXL!r} with {name}",
            "sending blocks of several kinds of layers was not tested",
            "remove --kv-transfer-config",
        )


def _recurrent_layers(config: Any, name: str) -> Iterator[str]:
    cache, dtype = config.cache_config, kv_cache_dtype(config)
    if config.speculative_config is not None:
        yield _sentence(
            f"speculative_config (method {config.speculative_config.method!r}) with {name}",
            "states of drafts that are not accepted were not tested",
            "remove --speculative-config",
        )
    if cache.prefix_match_unit is not None:
        yield _sentence(
            f"prefix_match_unit={cache.prefix_match_unit} with {name}",
            "prefix-cache hits that end within a block were not tested",
            "remove --prefix-match-unit",
        )
    if dtype in FP8_ELEMENTS:
        yield _sentence(
            f"kv_cache_dtype={dtype!r} with {name}",
            "pages of fp8 beside states were not tested",
            f"use --kv-cache-dtype {_model_dtype(config)}",
        )


def _sliding_layers(config: Any, name: str) -> Iterator[str]:
    if drafts_with_layers(config):
        yield _sentence(
            f"speculative_config (method {config.speculative_config.method!r}) with {name}",
            "blocks of three kinds of layers in one KV pool were not tested",
            "draft with method 'ngram' or remove --speculative-config",
        )
    backend = config.attention_config.backend_per_kind.get("sliding_window")
    if backend is not None and backend.name not in OTHER_BACKENDS:
        yield _sentence(
            f"attention_config.backend_per_kind={{'sliding_window': {backend.name!r}}}",
            "the KV of these layers lies in the packed blocks of those served by HeteroCache",
            "remove sliding_window from backend_per_kind",
        )


Check = Callable[[Any], Iterator[str]]

_ENGINE_CHECKS: tuple[Check, ...] = (
    _speculation,
    _drafter,
    _block_size,
    _context_parallel,
    _micro_batches,
    _executor,
    _connectors,
    _worker,
    _other_attention,
    _aux_output,
    _fast_prefill,
)
_MODEL_CHECKS: tuple[Check, ...] = (
    _kv_cache_dtype,
    _layers_of_other_dtypes,
    _sleep_mode,
    _shared_kv,
    _model_kind,
    _attention_kind,
    _head_shape,
    _other_layers,
)
