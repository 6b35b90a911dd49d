#!/usr/bin/env python3
"""Transfers between GPU and host, in the page geometry of the Llama-3.1-8B shape.

gather: pages at random from pinned memory into GPU pages, as retrieval fetches them, by page size;
offload: satellites' pages of dense blocks to the host pool through the engine's swap manager;
flip: the table update that makes fetched pages visible. Each stands beside one large copy of the
same bytes. A result that is wrong is not printed.

    python scripts/bench_swap.py
"""

from __future__ import annotations

import argparse
import datetime
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_common as common
import bench_engine
import numpy as np
import synthetic_profiles
import torch

from vllm_heterocache.budget import compact_blocks, page_budgets, spare_pages
from vllm_heterocache.cpu_pool import CpuPool
from vllm_heterocache.head_assignment import HeadAssignment
from vllm_heterocache.kernels.flip_pages_ref import flip_pages_ref
from vllm_heterocache.kernels.page_gather_ref import page_gather_ref
from vllm_heterocache.kernels.tables import HeadMaps, Moves, PageTables
from vllm_heterocache.retrieval import MAX_MOVES, head_maps
from vllm_heterocache.swap import SwapManager, SynchronousSwap

PAGE = 16


class Bench:
    """Device, timing and kernels: Triton's on a GPU, the references on a CPU."""

    def __init__(self) -> None:
        self.is_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.is_gpu else "cpu")
        if self.is_gpu:
            from vllm_heterocache.cuda_swap import FETCH_PROGRAMS
            from vllm_heterocache.kernels.flip_pages import flip_pages
            from vllm_heterocache.kernels.page_gather import page_gather

            self.gather = functools.partial(page_gather, num_programs=FETCH_PROGRAMS)
            self.flip = flip_pages
        else:
            self.gather = lambda *args, num_copies: page_gather_ref(*args)
            self.flip = flip_pages_ref

    def seconds(self, call: Callable[[], Any]) -> list[float]:
        """Median, 90th and 10th percentile; on a GPU with a cold L2 and without launch time."""
        if self.is_gpu:
            import triton

            times = triton.testing.do_bench(call, warmup=20, rep=150, quantiles=[0.5, 0.9, 0.1])
            return [ms / 1e3 for ms in times]
        times = []
        for _ in range(5):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return [statistics.median(times), max(times), min(times)]

    def pages(self, count: int, width: int, pinned: bool = False) -> torch.Tensor:
        """[count, PAGE, width] bf16, on the device or pinned on the host."""
        kind: dict[str, Any] = {"pin_memory": self.is_gpu} if pinned else {"device": self.device}
        return torch.empty(count, PAGE, width, dtype=torch.bfloat16, **kind)

    def swap(self, pool: torch.Tensor, host: CpuPool, maps: HeadMaps) -> SwapManager:
        """The engine's swap manager on this device."""
        if self.is_gpu:
            from vllm_heterocache.cuda_swap import CudaSwap

            return CudaSwap(pool, host, maps)
        return SynchronousSwap(pool, host, maps)


def rates(num_bytes: int, seconds: list[float]) -> list[float]:
    return [num_bytes / s / 1e9 for s in seconds]


def expect(is_right: bool, what: str) -> None:
    if not is_right:
        raise SystemExit(f"{what} is wrong; nothing is reported")


def gather_row(bench: Bench, page_bytes: int, moved: int) -> dict[str, Any]:
    """GB/s of page bytes from a pinned pool four times as large as what is moved."""
    width, count = page_bytes // (PAGE * 2), moved // page_bytes
    host = bench.pages(4 * count, width, pinned=True)
    host.copy_(torch.randn(host.shape, dtype=host.dtype, device=bench.device))
    target = bench.pages(count, width).fill_(torch.nan)
    source_ids = torch.randperm(4 * count)[:count].to(bench.device)
    target_ids = torch.randperm(count).to(bench.device)
    total = torch.tensor([count], dtype=torch.int32, device=bench.device)
    call = functools.partial(bench.gather, host, source_ids, target, target_ids, num_copies=total)
    call()
    got = target[target_ids].cpu().view(torch.int16)
    expect(torch.equal(got, host.view(torch.int16)[source_ids.cpu()]), "page_gather")
    large = functools.partial(target.copy_, host[:count], non_blocking=True)
    return {
        "cell": f"gather {page_bytes} B",
        "config": {"page_bytes": page_bytes, "moved_bytes": moved},
        "gb_per_s": rates(moved, bench.seconds(call)),
        "one_copy_gb_per_s": rates(moved, bench.seconds(large)),
    }


def offload_row(bench: Bench, assignment: HeadAssignment, num_blocks: int) -> dict[str, Any]:
    """GB/s of page bytes from scattered dense blocks, until the manager reports them done."""
    maps = head_maps(assignment, bench.device)
    num_heads, num_satellites = assignment.num_heads, len(maps.satellite_heads)
    pool = bench.pages(2 * num_blocks * num_heads, 256).normal_()
    host = CpuPool(num_blocks, num_satellites, PAGE, 128, torch.bfloat16)
    swap = bench.swap(pool, host, maps)
    blocks = torch.randperm(2 * num_blocks)[:num_blocks].int().to(bench.device)
    host_blocks = host.allocate(num_blocks)
    assert host_blocks is not None
    moved = num_blocks * num_satellites * pool[0].nbytes

    def offload() -> float:
        started = time.perf_counter()
        swap.offload(blocks, host_blocks)
        mark = swap.mark()
        while mark not in swap.take_completed():
            time.sleep(1e-4)
        return time.perf_counter() - started

    times = [offload() for _ in range(6)][1:]
    pages = (blocks.long()[:, None] * num_heads + maps.satellite_heads.long()).flatten()
    expect(torch.equal(host.pages, pool[pages].cpu()), "offload")
    large = bench.pages(moved // pool[0].nbytes, 256, pinned=True)
    source = bench.pages(large.shape[0], 256)
    copy = functools.partial(large.copy_, source, non_blocking=True)
    return {
        "cell": f"offload {num_blocks} blocks",
        "config": {"page_bytes": pool[0].nbytes, "moved_bytes": moved},
        "gb_per_s": rates(moved, [statistics.median(times), max(times), min(times)]),
        "one_copy_gb_per_s": rates(moved, bench.seconds(copy)),
    }


def flip_row(
    bench: Bench, assignment: HeadAssignment, num_pages: int, share: float
) -> dict[str, Any]:
    """Microseconds to flip pages into `share` of the spare pages of one prompt."""
    maps = head_maps(assignment, bench.device)
    tables, moves = one_request(assignment, maps, num_pages, share, bench.device)
    slots = torch.zeros(1, dtype=torch.int32, device=bench.device)
    exact = PageTables(*(t.clone() if torch.is_tensor(t) else t for t in tables))
    flip_pages_ref(exact, moves, slots)
    bench.flip(tables, moves, slots)
    for name in ("entries", "positions", "is_resident"):
        expect(torch.equal(getattr(tables, name), getattr(exact, name)), f"flip_pages, {name}")
    seconds = bench.seconds(functools.partial(bench.flip, tables, moves, slots))
    return {
        "cell": f"flip {int(moves.total)} of {num_pages * PAGE} tokens",
        "config": {"max_moves": moves.page.numel(), "moves": int(moves.total)},
        "us": [s * 1e6 for s in seconds],
    }


def one_request(
    assignment: HeadAssignment, maps: HeadMaps, num_pages: int, share: float, device: torch.device
) -> tuple[PageTables, Moves]:
    """Tables of one slot whose heads hold the first pages of the prompt, and moves of later ones
    into `share` of the spare pages."""
    num_rows = compact_blocks(num_pages, 0.25, page_size=1)
    size, num_satellites = num_rows * assignment.num_heads, len(maps.satellite_heads)
    spares = spare_pages(assignment, num_pages, size)
    count = page_budgets(assignment, num_pages, size - spares, 5)
    ends = count.ravel().astype(np.int64).cumsum()
    start = (ends - count.ravel()).reshape(count.shape)
    positions = np.full(size, -1, np.int32)
    positions[: ends[-1]] = np.concatenate([np.arange(n) for n in count.ravel()])
    heads = maps.satellite_heads.cpu().numpy()
    width = -(-num_satellites * num_pages // num_rows)
    resident = np.zeros(num_rows * width, np.int8)
    moves_each = min(spares, MAX_MOVES) // num_satellites
    listed, pages, owners = [], [], []
    for satellite, head in enumerate(heads):
        held = int(count.ravel()[head])
        resident[satellite * num_pages :][:held] = 1
        taken = min(int(moves_each * share), held, num_pages - held)
        listed += list(start.ravel()[head] + np.arange(taken))
        pages += list(held + np.arange(taken))
        owners += [satellite] * taken
    zero = np.zeros(len(pages), np.int32)
    columns = [
        zero,
        owners,
        listed,
        ends[-1] + np.arange(len(pages)),
        pages,
        zero,
        zero,
        [len(pages)],
    ]
    moves = Moves.allocate(MAX_MOVES, device)
    for field, column in zip(moves, columns, strict=True):
        field[: len(column)] = torch.from_numpy(np.array(column, np.int32)).to(device)
    none = torch.zeros(0, device=device)
    arrays = {
        "entries": np.random.default_rng(0).permutation(size).astype(np.int32),
        "positions": positions,
        "start": np.stack([start, np.zeros_like(start)]),
        "count": np.stack([count, np.zeros_like(count)]),
        "prompt_pages": np.array([num_pages, 0], np.int32),
        "first_row": np.zeros(2, np.int64),
        "is_resident": resident,
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    empty = dict.fromkeys(("mean_pages", "page_lse", "scores", "is_reference", "host_blocks"), none)
    return PageTables(**tensors, **empty, pivot_width=0, satellite_width=width, host_width=0), moves


def measure(bench: Bench, is_tiny: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    moved = 1 << 20 if is_tiny else 256 << 20
    rows = [gather_row(bench, kib << 10, moved) for kib in (1, 2, 4, 8, 16)]
    assignment = synthetic_profiles.assignment_of(synthetic_profiles.LLAMA, "retrieval")
    rows.append(offload_row(bench, assignment, 4 if is_tiny else 1024))
    for share in (0.1, 1.0):
        rows.append(flip_row(bench, assignment, 256 if is_tiny else 8192, share))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=common.default_out(), help="folder for rows")
    parser.add_argument("--run", default="", help="name of the run, kept in the rows")
    parser.add_argument("--commit", default=common.commit())
    parser.add_argument("--tiny", action="store_true", help="little data, on a CPU too")
    args = parser.parse_args(argv)
    bench = Bench()
    if not bench.is_gpu and not args.tiny:
        raise SystemExit("no GPU here; --tiny tries the script on a CPU")
    result = {
        "device": bench_engine.device_name(),
        "versions": common.versions(),
        "commit": args.commit,
        "started": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "engine_name": None,
    }
    base = common.provenance("swap", SimpleNamespace(run=args.run, tiny=False), result)
    rows = [base | row for row in measure(bench, args.tiny)]
    lines = [[r["cell"], *(r.get(k, [None])[0] for k in KEYS)] for r in rows]
    common.print_table(["cell", "GB/s", "one copy GB/s", "us"], lines)
    common.append_rows(args, "swap.jsonl", rows)


KEYS = ("gb_per_s", "one_copy_gb_per_s", "us")

if __name__ == "__main__":
    sys.exit(main())
