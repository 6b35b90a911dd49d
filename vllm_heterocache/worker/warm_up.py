"""Compile, before serving, every kernel that runs beside the CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.kernels.values import PAGE_BLOCKS
from vllm_heterocache.messages import CompactionOrder
from vllm_heterocache.worker.requests import FinishedPrefill
from vllm_heterocache.worker.retrieval import VISIBLE_AFTER

if TYPE_CHECKING:
    from vllm_heterocache.worker.runtime import HeteroCacheRuntime

REQUEST = "heterocache-warm-up"


def warm_up(runtime: HeteroCacheRuntime, max_model_len: int) -> None:
    """Take a made-up prompt of each size class through compaction, a drift check and retrieval.

    Writes to KV blocks that hold nothing yet, and leaves the runtime as it was.
    """
    for num_pages in PAGE_BLOCKS:
        if num_pages * PAGE_SIZE < max_model_len:
            _rehearse(runtime, num_pages * PAGE_SIZE)
    _rehearse(runtime, max_model_len)
    runtime.reset_counters()


def _rehearse(runtime: HeteroCacheRuntime, num_tokens: int) -> None:
    plan = runtime.rank.plan
    num_blocks = compact_blocks(num_tokens, plan.config.gpu_budget)
    if num_tokens < plan.compact_min_tokens or num_blocks > runtime.num_blocks:
        return
    device = runtime.ops.memory.pool.device
    order = CompactionOrder(-1, REQUEST, num_tokens, list(range(num_blocks)))
    dense = torch.zeros(-(-num_tokens // PAGE_SIZE), dtype=torch.int32, device=device)
    runtime.observer.start(REQUEST, num_tokens)
    masses = runtime.observer.masses(REQUEST)
    runtime.compact(FinishedPrefill(order, runtime.rank.geometry.window - 1, dense, masses))
    torch.accelerator.synchronize()
    runtime.take_answers()
    if request := runtime.request(REQUEST):
        request.num_decodes = runtime.retriever.first_check(request) - 1
        for _ in range(1 + VISIBLE_AFTER):
            runtime.retriever.begin_batch([request])
            runtime.retriever.check()
        torch.accelerator.synchronize()
    runtime.forget(REQUEST)
