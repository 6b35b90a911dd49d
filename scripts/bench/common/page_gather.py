"""The part of bench_kernels.py that times `page_gather`, beside one large copy."""

from __future__ import annotations

import functools

import torch
from decode_cells import PAGE
from kernel_timing import DEVICE, append, provenance, quantiles

from vllm_heterocache.kernels.page_gather import page_gather


def report_gather(out_dir: str | None, commit: str) -> None:
    """GB/s of page bytes: pinned host to GPU, and within the GPU (read and written)."""
    print(f"{'page KiB':>9}{'pinned GB/s':>13}{'one copy':>10}{'GPU r+w GB/s':>14}")
    moved = 512 << 20
    for page_kib in (1, 2, 4, 8, 16):
        width = page_kib * 1024 // (PAGE * 2)
        num_pages = 8 * moved // (page_kib << 10)
        host = torch.empty(num_pages, PAGE, width, dtype=torch.bfloat16, pin_memory=True)
        pool = torch.empty(num_pages // 2, PAGE, width, dtype=torch.bfloat16, device=DEVICE)
        pool.normal_()
        host[: pool.shape[0]].copy_(pool)
        num_copies = moved // (page_kib << 10)
        target = torch.empty(num_copies, PAGE, width, dtype=torch.bfloat16, device=DEVICE)
        source_ids = torch.randint(0, pool.shape[0], (num_copies,), device=DEVICE)
        target_ids = torch.randperm(num_copies, device=DEVICE)
        rates = []
        for source in (host, pool):
            target.fill_(torch.nan)
            page_gather(source, source_ids, target, target_ids)
            assert torch.equal(target[target_ids], pool[source_ids]), "page_gather is wrong"
            call = functools.partial(page_gather, source, source_ids, target, target_ids)
            rates.append([moved / ms / 1e6 for ms in quantiles(call)])
        flat = host.view(-1)[: target.numel()]
        copy_call = functools.partial(target.view(-1).copy_, flat, non_blocking=True)
        copy = [moved / ms / 1e6 for ms in quantiles(copy_call)]
        print(f"{page_kib:9}{rates[0][0]:13.1f}{copy[0]:10.1f}{2 * rates[1][0]:14.0f}")
        row = {
            "benchmark": "page_gather",
            "cell": f"{page_kib} KiB pages",
            **provenance(commit),
            "config": {"page_bytes": page_kib << 10, "moved_bytes": moved},
            "pinned_gb_per_s": rates[0],
            "one_copy_gb_per_s": copy,
            "gpu_read_and_written_gb_per_s": [2 * rate for rate in rates[1]],
            "values": "at the median, 90th and 10th percentile of the time",
        }
        append(out_dir, [row])
        del host, pool, target
