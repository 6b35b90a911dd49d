"""The worker of vLLM's CPU platform."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.compat import CPUWorker
from vllm_heterocache.worker.host.swap import SwapManager, SynchronousSwap
from vllm_heterocache.worker.ops.torch_ops import TorchOps
from vllm_heterocache.worker.worker import HeteroCacheWorkerMixin

if TYPE_CHECKING:
    import torch

    from vllm_heterocache.kernels.tables import HeadMaps
    from vllm_heterocache.worker.host.host_pool import HostPool
    from vllm_heterocache.worker.ops.interface import Geometry, Memory, Ops


class HeteroCacheCPUWorker(HeteroCacheWorkerMixin, CPUWorker):
    """Plain torch, and copies that are done when they return."""

    def make_ops(self, geometry: Geometry, memory: Memory) -> Ops:
        return TorchOps(geometry, memory)

    def make_swap(self, pool: torch.Tensor, host: HostPool, maps: HeadMaps) -> SwapManager:
        return SynchronousSwap(pool, host, maps)

    def finish_device_work(self) -> None:
        """Nothing to do: what was begun is done."""
