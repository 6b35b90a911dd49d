"""Compile, before serving, every kernel that runs beside the CUDA graphs."""

from __future__ import annotations

import torch

from vllm_heterocache.config import PAGE_SIZE
from vllm_heterocache.heads.budget import compact_blocks
from vllm_heterocache.messages import CompactionOrder
from vllm_heterocache.worker.requests import Capture
from vllm_heterocache.worker.runtime import HeteroCacheRuntime

REQUEST = "heterocache-warm-up"
FIRST_SIZE = 256 * PAGE_SIZE  # the kernels are compiled for 256, 1024, 4096, ... pages


def warm_up(runtime: HeteroCacheRuntime, max_model_len: int) -> None:
    """Take a made-up prompt of each size class through compaction, a drift check and retrieval.

    Writes to KV blocks that hold nothing yet, and leaves the runtime as it was.
    """
    num_tokens = FIRST_SIZE
    while num_tokens < max_model_len:
        _rehearse(runtime, num_tokens)
        num_tokens *= 4
    _rehearse(runtime, max_model_len)
    runtime.reset_counters()


def _rehearse(runtime: HeteroCacheRuntime, num_tokens: int) -> None:
    num_blocks = compact_blocks(num_tokens, runtime.config.gpu_budget)
    smallest = runtime.config.compact_min_tokens
    if smallest is None or num_tokens < smallest or num_blocks > runtime.num_blocks:
        return
    device = runtime.ops.memory.pool.device
    order = CompactionOrder(-1, REQUEST, num_tokens, list(range(num_blocks)))
    dense = torch.zeros(-(-num_tokens // PAGE_SIZE), dtype=torch.int32, device=device)
    runtime.observer.start(REQUEST, num_tokens)
    masses = runtime.observer.masses(REQUEST)
    runtime.compact(Capture(order, runtime.geometry.window - 1, dense, masses))
    torch.accelerator.synchronize()
    runtime.take_answers()
    if request := runtime.request(REQUEST):
        for _ in range(runtime.config.drift_interval):  # a turn may be empty
            runtime.retriever.begin_step(1)
            runtime.retriever.check([request])
            torch.accelerator.synchronize()
        runtime.retriever.begin_step(0)
    runtime.forget(REQUEST)
