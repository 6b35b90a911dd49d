"""The worker of vLLM's CUDA platform."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from vllm_heterocache import compat
from vllm_heterocache.compat import GPUWorker
from vllm_heterocache.compat.engine import count_as_weights
from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.kernels.page_scores import page_scores_workspace
from vllm_heterocache.kernels.paged_decode import DecodeWorkspace
from vllm_heterocache.kv_cache_dtype import FP8_ELEMENTS
from vllm_heterocache.worker.centroids import merging_bytes
from vllm_heterocache.worker.host.cuda_swap import STAGING_BYTES, CudaSwap
from vllm_heterocache.worker.host.swap import SwapManager, SynchronousSwap
from vllm_heterocache.worker.matched_tokens import fitting_bytes
from vllm_heterocache.worker.observe.reference_queries import reference_bytes, reference_positions
from vllm_heterocache.worker.ops.triton_ops import TritonOps
from vllm_heterocache.worker.warm_up import warm_up
from vllm_heterocache.worker.worker import HeteroCacheWorkerMixin

if TYPE_CHECKING:
    from vllm_heterocache.compat import SchedulerOutput
    from vllm_heterocache.kernels.tables import HeadMaps
    from vllm_heterocache.worker.host.host_pool import HostPool
    from vllm_heterocache.worker.ops.interface import Geometry, Memory, Ops

# Beside staging: the moves of retrievals, and what compacting a prompt of usual length takes.
WORKING_BYTES = 96 << 20


def working_bytes(geometry: Geometry, gpu_budget: float, max_model_len: int) -> int:
    """Memory for pages on their way to the host, and for what a step takes for a moment: the
    compaction of the longest prompt, if that is more than WORKING_BYTES."""
    return STAGING_BYTES + max(WORKING_BYTES, compaction_bytes(geometry, gpu_budget, max_model_len))


def compaction_bytes(geometry: Geometry, gpu_budget: float, num_tokens: int) -> int:
    """Memory that compacting a prompt takes at most at a time: its page scores, and beside these
    what scoring takes, or its layers' scores one by one, or the numbers of the listed pages twice.
    """
    g = geometry
    heads = g.num_layers * g.num_kv_heads
    scores = 4 * heads * (num_tokens // PAGE_SIZE)
    scoring = 4 * page_scores_workspace(num_tokens, g.num_kv_heads, g.group)
    listed = 4 * heads * compact_blocks(num_tokens, gpu_budget)
    return scores + max(scores, scoring, 2 * listed)


def observation_bytes(geometry: Geometry, max_model_len: int) -> int:
    """Memory for the last queries, and for the masses of one window while a policy looks at it."""
    g = geometry
    queries = g.num_query_windows * g.window * math.prod(g.query_shape) * 4
    masses = g.num_q_heads * g.window * (max_model_len // PAGE_SIZE) * 4
    return queries + (2 * masses if g.window > 1 else 0)


def matching_bytes(geometry: Geometry, max_model_len: int) -> int:
    """Memory for reference queries, and for what fitting a prompt's matched tokens takes."""
    references = reference_bytes(geometry, reference_positions(geometry))
    return references + fitting_bytes(geometry, max_model_len)


class HeteroCacheGPUWorker(HeteroCacheWorkerMixin, GPUWorker):
    """Triton kernels, and transfers on streams of their own."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        g = self.heterocache_rank.geometry
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
        )
        count_as_weights(self.model_runner, torch.cuda.memory_allocated(self.device) - before)

    def determine_available_memory(self) -> int:
        """What vLLM found, less what the page tables need beside that many blocks."""
        is_given = bool(self.cache_config.kv_cache_memory_bytes)  # vLLM may set it below
        available = super().determine_available_memory()
        if is_given:
            return available  # the user said what the KV cache takes; tables come on top
        g, table_bytes = self.heterocache_rank.geometry, self.table_bytes_per_block()
        block_bytes = self.kernel_block_bytes()
        longest = self.model_config.max_model_len
        available -= working_bytes(g, self.heterocache_rank.plan.config.gpu_budget, longest)
        available -= observation_bytes(g, longest)
        if self.heterocache_rank.plan.config.share_of_matched:
            available -= matching_bytes(g, longest)
        if chunk := self.heterocache_rank.plan.policy.merged_chunk:
            available -= merging_bytes(g, longest, chunk)
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
