"""The only package that imports vLLM (but its logger) or reaches into its objects.

`from vllm_heterocache.compat import NAME` imports one of the names of names.py on demand, so that
importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vllm_heterocache.compat.names import INTERNALS, RENAMED

if TYPE_CHECKING:  # the same names, so that type checkers and editors find vLLM's own
    from vllm import LLM as LLM
    from vllm import SamplingParams as SamplingParams
    from vllm._custom_ops import scaled_fp8_quant as scaled_fp8_quant
    from vllm.config import AttentionConfig as AttentionConfig
    from vllm.config import KVTransferConfig as KVTransferConfig
    from vllm.config import VllmConfig as VllmConfig
    from vllm.config.cache import CacheDType as CacheDType
    from vllm.distributed.kv_transfer import get_kv_transfer_group as get_kv_transfer_group
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1 as KVConnectorBase_V1,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorMetadata as KVConnectorMetadata,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole as KVConnectorRole
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorWorkerMetadata as KVConnectorWorkerMetadata,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA as SupportsHMA
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics as KVConnectorPromMetrics,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorStats as KVConnectorStats,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
        MultiConnector as MultiConnector,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
        MultiKVConnectorStats as MultiKVConnectorStats,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector as NixlConnector
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
        OffloadingConnector as OffloadingConnector,
    )
    from vllm.engine.arg_utils import EngineArgs as EngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand as ServeSubcommand
    from vllm.model_executor.layers.attention import Attention as Attention
    from vllm.model_executor.layers.mamba.abstract import MambaBase as MambaBase
    from vllm.model_executor.layers.rotary_embedding.base import (
        RotaryEmbeddingBase as RotaryEmbeddingBase,
    )
    from vllm.model_executor.models.utils import extract_layer_index as extract_layer_index
    from vllm.platforms import current_platform as current_platform
    from vllm.plugins import load_general_plugins as load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser as FlexibleArgumentParser
    from vllm.utils.gpu_sync_debug import with_gpu_sync_check as with_gpu_sync_check
    from vllm.v1.attention.backend import AttentionBackend as AttentionBackend
    from vllm.v1.attention.backend import AttentionCGSupport as AttentionCGSupport
    from vllm.v1.attention.backend import AttentionImpl as AttentionImpl
    from vllm.v1.attention.backend import AttentionLayer as AttentionLayer
    from vllm.v1.attention.backend import AttentionMetadata as AttentionMetadata
    from vllm.v1.attention.backend import AttentionMetadataBuilder as AttentionMetadataBuilder
    from vllm.v1.attention.backend import AttentionType as AttentionType
    from vllm.v1.attention.backend import CommonAttentionMetadata as CommonAttentionMetadata
    from vllm.v1.attention.backend import MultipleOf as MultipleOf
    from vllm.v1.attention.backend import max_decode_query_len as max_decode_query_len
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend as CPUAttentionBackend
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_supports_sinks as flash_attn_supports_sinks,
    )
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func as flash_attn_varlen_func
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version as get_flash_attn_version
    from vllm.v1.attention.backends.fa_utils import (
        reshape_and_cache_flash as reshape_and_cache_flash,
    )
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as AttentionBackendEnum
    from vllm.v1.core.kv_cache_utils import KVCacheBlock as KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput as SchedulerOutput
    from vllm.v1.core.single_type_kv_cache_manager import (
        FullAttentionManager as FullAttentionManager,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec as FullAttentionSpec
    from vllm.v1.kv_cache_interface import KVCacheConfig as KVCacheConfig
    from vllm.v1.kv_cache_interface import MambaSpec as MambaSpec
    from vllm.v1.kv_cache_interface import SlidingWindowSpec as SlidingWindowSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout as KVCacheLayout
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry as KVCacheSpecRegistry
    from vllm.v1.request import Request as Request
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor as AdapterLogitsProcessor
    from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor as pin_tensor
    from vllm.v1.worker.cpu_worker import CPUWorker as CPUWorker
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase as WorkerBase

    GPUWorker = Worker
    V2LogitsProcessor = LogitsProcessor


def __getattr__(name: str) -> Any:
    if name not in INTERNALS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(INTERNALS[name]), RENAMED.get(name, name))
