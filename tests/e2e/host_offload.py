"""Copies of vLLM's OffloadingConnector without a GPU: late ones, so that whoever reuses a block
before its copy has arrived is found out."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

STEPS = 3  # that a copy takes


class LateWorker(OffloadingWorker):
    """Reads and writes blocks when a copy ends, not when it begins."""

    def __init__(self, blocks: torch.Tensor, num_chunks: int) -> None:
        self.blocks = blocks  # [num_blocks, bytes]
        self.host = torch.zeros(num_chunks, blocks.shape[1], dtype=blocks.dtype)
        self.under_way: dict[int, tuple[int, torch.Tensor, Any, torch.Tensor, Any]] = {}
        self.waited: list[int] = []
        self.step = 0

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._submit(job_id, self.blocks, src_spec, self.host, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._submit(job_id, self.host, src_spec, self.blocks, dst_spec)

    def _submit(self, job_id: int, source: Any, src_spec: Any, target: Any, dst_spec: Any) -> bool:
        ids = src_spec.block_ids.tolist(), dst_spec.block_ids.tolist()
        self.under_way[job_id] = (self.step + STEPS, source, ids[0], target, ids[1])
        return True

    def get_finished(self) -> list[TransferResult]:
        self.step += 1
        due = [job_id for job_id, job in self.under_way.items() if job[0] <= self.step]
        for job_id in due:
            self._copy(job_id)
        done, self.waited = self.waited + due, []
        return [TransferResult(job_id, success=True) for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids & self.under_way.keys():
            self._copy(job_id)
            self.waited.append(job_id)

    def _copy(self, job_id: int) -> None:
        _, source, source_ids, target, target_ids = self.under_way.pop(job_id)
        target[target_ids] = source[source_ids]


class HostOffloadingSpec(CPUOffloadingSpec):
    """vLLM's, with `LateWorker`."""

    def get_worker(self, kv_caches: Any) -> LateWorker:
        if self._worker is None:
            (tensor,) = kv_caches.tensors  # whole packed blocks
            self._worker = LateWorker(tensor.tensor, self.num_chunks)
        return self._worker
