#!/usr/bin/env python3
"""Transfers between GPU and host, in the page geometry of the Llama-3.1-8B shape.

offload: satellites' pages of dense blocks to the host pool through the engine's swap manager,
beside one large copy of the same bytes; flip: the table update that makes fetched pages visible.
The fetch itself is `page_gather` of kernel_times.py. A result that is wrong is not printed.

    python scripts/bench/swap.py
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from typing import Any

import numpy as np
import torch

from common import profiles
from common.rows import append_rows, made_by, print_table, row_parser
from common.tables import clone_tables, tables_for
from common.timing import DEVICE, expect, rates, seconds, summary, time_once
from vllm_heterocache.heads.assignment import HeadAssignment
from vllm_heterocache.heads.budget import compact_blocks, page_budgets, spare_pages
from vllm_heterocache.kernels.flip_pages import flip_pages
from vllm_heterocache.kernels.flip_pages_ref import flip_pages_ref
from vllm_heterocache.kernels.tables import HeadMaps, Moves, PageTables
from vllm_heterocache.worker.host.cuda_swap import CudaSwap
from vllm_heterocache.worker.host.host_pool import HostPool
from vllm_heterocache.worker.host.swap import SynchronousSwap
from vllm_heterocache.worker.retrieval import MAX_MOVES
from vllm_heterocache.worker.tables.head_maps import head_maps

PAGE = 16
IS_GPU = DEVICE.type == "cuda"


def pages(count: int, width: int, pinned: bool = False) -> torch.Tensor:
    """[count, PAGE, width] bf16, on the device or pinned on the host."""
    kind: dict[str, Any] = {"pin_memory": IS_GPU} if pinned else {"device": DEVICE}
    return torch.empty(count, PAGE, width, dtype=torch.bfloat16, **kind)


def offload_row(assignment: HeadAssignment, num_blocks: int) -> dict[str, Any]:
    """GB/s of page bytes from scattered dense blocks, until the manager reports them done."""
    maps = head_maps(assignment, DEVICE)
    num_heads, num_satellites = assignment.num_heads, len(maps.satellite_heads)
    pool = pages(2 * num_blocks * num_heads, 256).normal_()
    host = HostPool(num_blocks, num_satellites, PAGE, 128, torch.bfloat16)
    swap = (CudaSwap if IS_GPU else SynchronousSwap)(pool, host, maps)
    blocks = torch.randperm(2 * num_blocks)[:num_blocks].int().to(DEVICE)
    host_blocks = host.allocate(num_blocks)
    assert host_blocks is not None
    moved = num_blocks * num_satellites * pool[0].nbytes

    def offload() -> None:
        swap.offload(blocks, host_blocks)
        mark = swap.mark()
        while mark not in swap.take_completed():
            time.sleep(1e-4)

    times = [time_once(offload) for _ in range(6)][1:]
    sources = (blocks.long()[:, None] * num_heads + maps.satellite_heads.long()).flatten()
    expect(torch.equal(host.pages, pool[sources].cpu()), "offload")
    large = pages(moved // pool[0].nbytes, 256, pinned=True)
    source = pages(large.shape[0], 256)
    copy = functools.partial(large.copy_, source, non_blocking=True)
    return {
        "cell": f"offload {num_blocks} blocks",
        "config": {"page_bytes": pool[0].nbytes, "moved_bytes": moved},
        "gb_per_s": rates(moved, summary(times)),
        "one_copy_gb_per_s": rates(moved, seconds(copy)),
    }


def flip_row(assignment: HeadAssignment, num_pages: int, share: float) -> dict[str, Any]:
    """Microseconds to flip pages into `share` of the spare pages of one prompt."""
    flip = flip_pages if IS_GPU else flip_pages_ref
    tables, moves = one_request(assignment, head_maps(assignment, DEVICE), num_pages, share)
    slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    exact = clone_tables(tables)
    flip_pages_ref(exact, moves, slots)
    flip(tables, moves, slots)
    for name in ("entries", "positions", "is_resident"):
        expect(torch.equal(getattr(tables, name), getattr(exact, name)), f"flip_pages, {name}")
    times = seconds(functools.partial(flip, tables, moves, slots))
    return {
        "cell": f"flip {int(moves.total)} of {num_pages * PAGE} tokens",
        "config": {"max_moves": moves.page.numel(), "moves": int(moves.total)},
        "us": [s * 1e6 for s in times],
    }


def one_request(
    assignment: HeadAssignment, maps: HeadMaps, num_pages: int, share: float
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
    moves = Moves.allocate(MAX_MOVES, DEVICE)
    for field, column in zip(moves, columns, strict=True):
        field[: len(column)] = torch.from_numpy(np.array(column, np.int32)).to(DEVICE)
    arrays = {
        "entries": np.random.default_rng(0).permutation(size).astype(np.int32),
        "positions": positions,
        "start": np.stack([start, np.zeros_like(start)]),
        "count": np.stack([count, np.zeros_like(count)]),
        "prompt_pages": np.array([num_pages, 0], np.int32),
        "first_stripe": np.zeros(2, np.int64),
        "is_resident": resident,
    }
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return tables_for((2, *start.shape), DEVICE, widths=(0, width, 0), **given), moves


def measure(is_tiny: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    assignment = profiles.assignment_of(profiles.LLAMA, "retrieval")
    rows = [offload_row(assignment, 4 if is_tiny else 1024)]
    for share in (0.1, 1.0):
        rows.append(flip_row(assignment, 256 if is_tiny else 8192, share))
    return rows


def main(argv: list[str] | None = None) -> None:
    args: argparse.Namespace = row_parser(__doc__).parse_args(argv)
    if not IS_GPU and not args.tiny:
        raise SystemExit("no GPU here; --tiny tries the script on a CPU")
    made = made_by(args) | {"model": profiles.LLAMA.name}
    rows = [{"benchmark": "swap"} | made | row for row in measure(args.tiny)]
    keys = ("gb_per_s", "one_copy_gb_per_s", "us")
    lines = [[row["cell"], *(row.get(key, [None])[0] for key in keys)] for row in rows]
    print_table(["cell", "GB/s", "one copy GB/s", "us"], lines)
    append_rows(args.out, "swap.jsonl", rows)


if __name__ == "__main__":
    sys.exit(main())
