"""`page_gather` at several page sizes, beside one large copy of as many bytes.

A kernel that gathers all pages has a program a page; the engine's fetch has few programs, which
read from device memory how many pages there are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from common.cells import PAGE
from common.timing import DEVICE, expect, rates, seconds
from vllm_heterocache.kernels.page_gather import page_gather
from vllm_heterocache.worker.host.cuda_swap import FETCH_PROGRAMS

PAGE_KIB = (1, 2, 4, 8, 16)
MOVED, TINY_MOVED = 512 << 20, 64 << 10
POOL = 4  # pages of the pools, for each that is moved


def gather_row(page_bytes: int, moved: int) -> dict[str, Any]:
    """GB/s of page bytes: pinned host to GPU, and within the GPU (read and written)."""
    width, count = page_bytes // (PAGE * 2), moved // page_bytes
    pool = torch.empty(POOL * count, PAGE, width, dtype=torch.bfloat16, device=DEVICE).normal_()
    host = torch.empty(pool.shape, dtype=pool.dtype, pin_memory=DEVICE.type == "cuda")
    host.copy_(pool)
    target = torch.empty(count, PAGE, width, dtype=torch.bfloat16, device=DEVICE)
    source_ids = torch.randint(0, pool.shape[0], (count,), device=DEVICE)
    target_ids = torch.randperm(count, device=DEVICE)
    total = torch.tensor([count], dtype=torch.int32, device=DEVICE)

    def timed(source: torch.Tensor, *how: Any) -> list[float]:
        target.fill_(torch.nan)
        call = functools.partial(page_gather, source, source_ids, target, target_ids, *how)
        call()
        expect(torch.equal(target[target_ids], pool[source_ids]), "page_gather")
        return rates(moved, seconds(call))

    pinned, fetched, within = timed(host), timed(host, total, FETCH_PROGRAMS), timed(pool)
    copy = functools.partial(target.copy_, host[:count], non_blocking=True)
    return {
        "benchmark": "page_gather",
        "cell": f"{page_bytes >> 10} KiB pages",
        "config": {
            "page_bytes": page_bytes,
            "moved_bytes": moved,
            "fetch_programs": FETCH_PROGRAMS,
        },
        "pinned_gb_per_s": pinned,
        "fetch_gb_per_s": fetched,
        "one_copy_gb_per_s": rates(moved, seconds(copy)),
        "gpu_read_and_written_gb_per_s": [2 * rate for rate in within],
        "values": "at the median, 90th and 10th percentile of the time",
    }


def gather_rows(is_tiny: bool = False) -> list[dict[str, Any]]:
    moved = TINY_MOVED if is_tiny else MOVED
    return [gather_row(kib << 10, moved) for kib in PAGE_KIB]
