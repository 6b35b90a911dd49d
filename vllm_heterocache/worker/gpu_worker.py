"""The worker of vLLM's CUDA platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_heterocache import compat
from vllm_heterocache.compat import GPUWorker
from vllm_heterocache.compat.engine import count_as_weights
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace
from vllm_heterocache.kv_cache_dtype import FP8_ELEMENTS
from vllm_heterocache.worker.device_memory import bytes_beside_pool
from vllm_heterocache.worker.host.cuda_swap import CudaSwap
from vllm_heterocache.worker.host.swap import SwapManager, SynchronousSwap
from vllm_heterocache.worker.ops.triton_ops import TritonOps
from vllm_heterocache.worker.warm_up import warm_up
from vllm_heterocache.worker.worker import HeteroCacheWorkerMixin

if TYPE_CHECKING:
    from vllm_heterocache.compat import SchedulerOutput
    from vllm_heterocache.kernels.tables import HeadMaps
    from vllm_heterocache.worker.host.host_pool import HostPool
    from vllm_heterocache.worker.ops.interface import Geometry, Memory, Ops


class HeteroCacheGPUWorker(HeteroCacheWorkerMixin, GPUWorker):
    """Triton kernels, and transfers on streams of their own."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        g, assignment = self.heterocache_rank.geometry, self.heterocache_rank.assignment
        before = torch.cuda.memory_allocated(self.device)
        self._decode_workspace = DecodeWorkspace.allocate(
            g.max_rows,
            g.num_layers,
            g.num_kv_heads,
            g.group,
            g.head_dim,
            self.device,
            max_queries=g.max_queries,
            is_fp8=self._layers[0].kv_cache_dtype in FP8_ELEMENTS,
            late_heads=assignment.finders.tolist(),
        )
        count_as_weights(self.model_runner, torch.cuda.memory_allocated(self.device) - before)

    def determine_available_memory(self) -> int:
        """What vLLM found, less what the page tables need beside that many blocks."""
        is_given = bool(self.cache_config.kv_cache_memory_bytes)  # vLLM may set it below
        available = super().determine_available_memory()
        if is_given:
            return available  # the user said what the KV cache takes; tables come on top
        rank, table_bytes = self.heterocache_rank, self.table_bytes_per_block()
        block_bytes = self.kernel_block_bytes()
        available -= bytes_beside_pool(rank.plan, rank.geometry, self.model_config.max_model_len)
        return int(available * block_bytes / (block_bytes + table_bytes))

    def compile_or_warm_up_model(self) -> Any:
        warm_up(self._runtime, self.model_config.max_model_len)
        return super().compile_or_warm_up_model()

    @compat.with_gpu_sync_check  # type: ignore[untyped-decorator]
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        return super().execute_model(scheduler_output)

    def make_ops(self, geometry: Geometry, memory: Memory) -> Ops:
        return TritonOps(geometry, memory, self._decode_workspace)

    def make_swap(self, pool: torch.Tensor, host: HostPool, maps: HeadMaps) -> SwapManager:
        if not host.num_blocks:
            return SynchronousSwap(pool, host, maps)  # nothing ever moves
        return CudaSwap(pool, host, maps)

    def finish_device_work(self) -> None:
        torch.cuda.synchronize(self.device)
