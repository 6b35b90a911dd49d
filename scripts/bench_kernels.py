"""Times the Triton kernels on a GPU, each beside its baseline in the same process.

`paged_decode` beside FlashAttention 3, dense and per head; `page_gather` from pinned memory and
within the GPU, beside one large copy. The kernels of policy `quest` have bench_step_kernels.py.

Shape of Llama-3.1-8B: 32 query heads, 8 KV heads of 128, bf16, pages of 16 tokens. Calls are
captured in CUDA graphs and go round the layers of a pool several times the size of the L2 cache.
A cell whose result is wrong is not printed. One JSON line per cell goes to
$OUT/kernels.jsonl.

    python scripts/bench_kernels.py                       # all cells, tuned launch
    python scripts/bench_kernels.py --fused               # and with the merge in the same launch
    python scripts/bench_kernels.py --sweep --cells 1x224K-2full 4x224K-full
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import bench_engine
import torch
import triton

from vllm_heterocache.kernels import tuning
from vllm_heterocache.kernels.page_gather import page_gather
from vllm_heterocache.kernels.paged_decode import (
    DecodeWorkspace,
    paged_decode,
    plan_decode,
)
from vllm_heterocache.kernels.paged_decode_ref import DecodeRows, paged_decode_ref
from vllm_heterocache.kernels.tables import PageTables

PAGE, H, G, D = 16, 8, 4, 128
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TAIL_BLOCKS = 4
MAX_ERROR = 5e-3 if DEVICE.type == "cuda" else 2e-2  # the interpreter rounds bf16 towards zero
COLD_BYTES = 400e6  # what the calls of a graph read together, at least: several times the L2
NUM_LAYERS_MIN = 4
MIXES = {
    "full": [1.0] * 8,
    "2full": [0.1, 1.0, 0.1, 0.1, 0.1, 1.0, 0.1, 0.1],
    "1full": [0.1, 0.1, 0.1, 1.0, 0.1, 0.1, 0.1, 0.1],
}
DENSE = "dense"  # no lists: every page from the block table
CELLS = [
    f"{context}-{mix}"
    for context in ("4x224K", "16x32K", "1x224K", "1x128K", "1x32K", "8x32K", "1x1K", "64x1K")
    for mix in MIXES
] + ["1x1K-dense", "64x1K-dense"]


@dataclass
class Cell:
    """One decode batch: pool, lists and tables of `num_layers` layers."""

    num_rows: int
    num_tokens: int
    num_layers: int
    tail_blocks: int
    query: torch.Tensor
    pages: torch.Tensor
    tables: PageTables
    rows: DecodeRows
    is_pivot: torch.Tensor  # [num_layers, H] bool, the heads with the longest lists
    due_pivot: torch.Tensor  # [num_layers, H] int32, all of these due
    last_queries: torch.Tensor  # nothing is captured
    bytes_per_layer: int

    def lists(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First entry and length of each list, [num_rows, H]."""
        slots = self.rows.row_to_slot.long()
        return self.tables.start[slots, layer], self.tables.count[slots, layer]

    def reference(self, layer: int) -> Results:
        room = Results.allocate(self, torch.float32)
        paged_decode_ref(
            self.query.float(), self.pages, self.tables, self.rows, layer, D**-0.5, room.output,
            self.last_queries, self.due_pivot, room.head_lse,
        )  # fmt: skip
        return Results(room.output, self.tables.page_lse.clone(), room.head_lse)


class Results(NamedTuple):
    output: torch.Tensor
    page_lse: torch.Tensor
    head_lse: torch.Tensor

    @classmethod
    def allocate(cls, cell: Cell, dtype: torch.dtype) -> Results:
        """NaN everywhere; `page_lse` is the cell's."""
        head_lse = torch.full((cell.num_layers, cell.num_rows * H, G), torch.nan, device=DEVICE)
        output = torch.full_like(cell.query, torch.nan, dtype=dtype)
        return cls(output, cell.tables.page_lse.fill_(torch.nan), head_lse)


def random_pages(num_pages: int) -> torch.Tensor:
    pages = torch.empty(num_pages, PAGE, 2 * D, dtype=torch.bfloat16, device=DEVICE)
    for part in pages.split(1 << 18):
        part.normal_()
    return pages


def parse(name: str) -> tuple[int, int, str]:
    context, mix = name.split("-")
    num_rows, tokens = context.split("x")
    return int(num_rows), int(tokens.removesuffix("K")) * 1024, mix


def make_cell(num_rows: int, num_tokens: int, mix: str, seed: int = 0) -> Cell:
    torch.manual_seed(seed)
    tail_blocks = num_tokens // PAGE if mix == DENSE else TAIL_BLOCKS
    prompt_pages = num_tokens // PAGE - tail_blocks
    shares = [0.0] * H if mix == DENSE else MIXES[mix]
    counts = torch.tensor([max(min(1, prompt_pages), round(s * prompt_pages)) for s in shares])
    pages_per_layer = num_rows * (int(counts.sum()) + tail_blocks * H)
    bytes_per_layer = pages_per_layer * PAGE * 2 * D * 2
    num_layers = min(32, max(NUM_LAYERS_MIN, -(-int(COLD_BYTES) // bytes_per_layer)))
    listed = num_rows * num_layers * int(counts.sum())
    per_block = num_layers * H
    num_blocks = -(-listed // per_block) + num_rows * tail_blocks
    pages = random_pages(num_blocks * per_block)
    blocks = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32)
    live, blocks = blocks[: num_rows * tail_blocks], blocks[num_rows * tail_blocks :]
    free = (blocks[:, None] * per_block + torch.arange(per_block, device=DEVICE)).flatten()
    entries = free[torch.randperm(free.numel(), device=DEVICE)].int()
    is_pivot = (counts == counts.max()).expand(num_layers, H)
    tables = make_tables(entries, counts, num_rows, num_layers, prompt_pages, int(is_pivot.sum()))
    due_pivot = is_pivot.int().flatten().cumsum(0).int().view(is_pivot.shape) - 1
    due_pivot = due_pivot.masked_fill(~is_pivot, -1).to(DEVICE)
    table = torch.full((num_rows, num_tokens // PAGE), 1 << 30, dtype=torch.int32, device=DEVICE)
    table[:, prompt_pages:] = live.view(num_rows, tail_blocks)
    seq_lens = torch.full((num_rows,), num_tokens, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(num_rows, device=DEVICE)
    capture = torch.full_like(seq_lens, -1)
    query = torch.randn(num_rows, H * G, D, device=DEVICE, dtype=torch.bfloat16)
    return Cell(
        num_rows, num_tokens, num_layers, tail_blocks, query, pages, tables,
        DecodeRows(slots, table, seq_lens, capture), is_pivot, due_pivot,
        query.new_zeros(1, num_layers, H * G, D), bytes_per_layer,
    )  # fmt: skip


def make_tables(entries, counts, num_rows, num_layers, prompt_pages, num_pivots) -> PageTables:
    """Every row is a slot of its own, all alike; the slot behind them is free."""
    count = counts.int().expand(num_rows, num_layers, H)
    ends = count.flatten().long().cumsum(0).view(count.shape)
    count = torch.cat([count, torch.zeros(1, num_layers, H, dtype=torch.int32)])
    start = torch.cat([ends - count[:-1], torch.zeros(1, num_layers, H, dtype=torch.int64)])
    prompt = torch.full((num_rows + 1,), prompt_pages, dtype=torch.int32)
    prompt[-1] = 0
    first_row = torch.arange(num_rows + 1) * prompt_pages
    places = max(1, num_rows * prompt_pages * num_pivots)
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    return PageTables(
        entries=entries, positions=none, start=start.to(DEVICE),
        count=count.contiguous().to(DEVICE), mean_pages=none, prompt_pages=prompt.to(DEVICE),
        first_row=first_row.to(DEVICE),
        page_lse=torch.full((places, G), torch.nan, device=DEVICE),
        scores=none, is_reference=none, is_resident=none, host_blocks=none,
        pivot_width=num_pivots, satellite_width=0, host_width=0,
    )  # fmt: skip


def time_calls(call, num_layers: int, replays: int = 25) -> tuple[float, float]:
    """Median and spread (90th less 10th percentile) of call(layer), in microseconds."""
    call(0)
    if DEVICE.type == "cpu":  # the interpreter: only to see whether a script runs
        started = time.perf_counter()
        call(0)
        return (time.perf_counter() - started) * 1e6, 0.0
    calls = num_layers * max(1, 8 // num_layers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % num_layers)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for _ in range(3):
        graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 / calls for a, b in itertools.pairwise(events)]
    deciles = statistics.quantiles(times, n=10)
    del graph
    return statistics.median(times), deciles[-1] - deciles[0]


def check(actual: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    error = ((actual.float() - exact).norm() / exact.norm()).item()
    if not error < MAX_ERROR:
        raise SystemExit(f"{what} is wrong: relative error {error}; nothing is reported")


class FlashAttention3:
    """FA3 over paged KV; one sequence per row, one query token each."""

    def __init__(self, query, key, value, table, seq_lens, num_splits: int) -> None:
        """key, value: per layer [num_pages, PAGE, heads, D]; table: per layer [seqs, pages]."""
        from vllm.vllm_flash_attn import flash_attn_interface as fa

        self.fa, self.query, self.key, self.value = fa, query, key, value
        self.table, self.num_splits = table, num_splits
        num_seqs, num_q_heads, _ = query.shape
        self.cu_q = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE)
        self.seq_lens, self.max_len = seq_lens, int(max(s.max() for s in seq_lens))
        self.out = torch.empty_like(query)
        self.metadata = [
            fa.get_scheduler_metadata(
                batch_size=num_seqs, max_seqlen_q=1, max_seqlen_k=self.max_len,
                num_heads_q=num_q_heads, num_heads_kv=key[0].shape[2], headdim=D,
                cache_seqlens=lens, qkv_dtype=query.dtype, cu_seqlens_q=self.cu_q,
                page_size=PAGE, causal=True, num_splits=num_splits,
            )
            for lens in seq_lens
        ]  # fmt: skip

    def __call__(self, layer: int) -> torch.Tensor:
        return self.fa.flash_attn_varlen_func(
            q=self.query, k=self.key[layer], v=self.value[layer], out=self.out,
            cu_seqlens_q=self.cu_q, max_seqlen_q=1, seqused_k=self.seq_lens[layer],
            max_seqlen_k=self.max_len, softmax_scale=D**-0.5, causal=True,
            block_table=self.table[layer], scheduler_metadata=self.metadata[layer],
            num_splits=self.num_splits, fa_version=3,
        )  # fmt: skip


def fa3_dense(num_rows: int, num_tokens: int) -> tuple[float, float, int]:
    """Stock vLLM's call: metadata ahead of time, at most 32 splits, or FA3's own choice.

    Returns:
        us, spread of the faster one, bytes of K and V per layer.
    """
    num_bytes = num_rows * num_tokens * H * 2 * D * 2
    num_layers = min(32, max(4, -(-int(COLD_BYTES) // num_bytes)))
    num_pages = num_rows * num_tokens // PAGE
    shape = (num_pages, PAGE, H, D)
    key = [random_pages(num_pages * H // 2).view(shape) for _ in range(num_layers)]
    value = [random_pages(num_pages * H // 2).view(shape) for _ in range(num_layers)]
    table = torch.randperm(num_pages, device=DEVICE, dtype=torch.int32).view(num_rows, -1)
    seq_lens = torch.full((num_rows,), num_tokens, dtype=torch.int32, device=DEVICE)
    query = torch.randn(num_rows, H * G, D, device=DEVICE, dtype=torch.bfloat16)
    best = None
    for num_splits in (32, 0):
        call = FlashAttention3(
            query, key, value, [table] * num_layers, [seq_lens] * num_layers, num_splits
        )
        row = num_rows - 1
        k, v = (t[0][table[row].long()].flatten(0, 1).float() for t in (key, value))
        logits = torch.einsum("hgd,thd->hgt", query[row].view(H, G, D).float(), k) * D**-0.5
        exact = torch.einsum("hgt,thd->hgd", logits.softmax(-1), v)
        check(call(0)[row].view(H, G, D), exact, "FA3 dense")
        result = time_calls(call, num_layers)
        print(f"  fa3 dense num_splits={num_splits}: {result[0]:.1f} us", flush=True)
        best = min(best or result, result)
    return *best, num_bytes


def fa3_per_head(cell: Cell, exact: torch.Tensor) -> tuple[float, float]:
    """Each KV head its own sequence with its own page table."""
    num_seqs, tail_blocks = cell.num_rows * H, cell.tail_blocks
    key = cell.pages[:, :, :D].unsqueeze(2)
    value = cell.pages[:, :, D:].unsqueeze(2)
    tables, lens = [], []
    for layer in range(cell.num_layers):
        start, count = (t.flatten().tolist() for t in cell.lists(layer))
        table = torch.zeros(num_seqs, max(count) + tail_blocks, dtype=torch.int32, device=DEVICE)
        heads = torch.arange(H, device=DEVICE)
        tail = (cell.rows.block_table[:, None, -tail_blocks:] * cell.num_layers + layer) * H
        tail = (tail + heads[None, :, None]).view(num_seqs, tail_blocks)
        for i, (n, first) in enumerate(zip(count, start, strict=True)):
            table[i, :n] = cell.tables.entries[first : first + n]
            table[i, n : n + tail_blocks] = tail[i]
        tables.append(table)
        lens.append((cell.lists(layer)[1].flatten() + tail_blocks) * PAGE)
    query = cell.query.view(num_seqs, G, D)
    best = None
    for num_splits in (32, 0):
        call = FlashAttention3(
            query, [key] * cell.num_layers, [value] * cell.num_layers, tables, lens, num_splits
        )
        check(call(0).view_as(exact), exact, "FA3 per head")
        result = time_calls(call, cell.num_layers)
        best = min(best or result, result)
    return best


class PagedDecode:
    """Our kernel on a cell."""

    def __init__(
        self,
        cell: Cell,
        launch: tuning.PagedDecodeLaunch | None = None,
        num_programs: int | None = None,
        due_pivot: torch.Tensor | None = None,
    ) -> None:
        self.cell, self.launch, self.due_pivot = cell, launch, due_pivot
        if DEVICE.type == "cpu":
            num_programs = 2
        self.workspace = DecodeWorkspace.allocate(
            cell.num_rows, cell.num_layers, H, G, D, DEVICE, num_programs
        )
        self.results = Results.allocate(cell, cell.query.dtype)
        self.results = self.results._replace(head_lse=self.workspace.head_lse)
        self.plan()

    def plan(self, layer: int = 0) -> None:
        plan_decode(self.cell.tables, self.cell.rows, self.workspace)

    def __call__(self, layer: int) -> torch.Tensor:
        cell = self.cell
        paged_decode(
            cell.query, cell.pages, cell.tables, cell.rows, self.workspace, layer, D**-0.5,
            self.results.output, cell.last_queries, self.due_pivot, self.launch,
        )  # fmt: skip
        return self.results.output


def time_ours(cell: Cell, exact: Results, what: str, launch=None, due_pivot=None):
    """Median and spread of `paged_decode`; wrong results before or after are the end."""
    ours = PagedDecode(cell, launch, None, due_pivot)
    for when in ("before", "after"):
        ours.results.output.fill_(torch.nan)
        check(ours(0), exact.output, f"paged_decode {what} {when} timing")
        if due_pivot is cell.due_pivot:
            check_lse(ours.results, exact, cell, what)
        if when == "before":
            timed = time_calls(ours, cell.num_layers)
    return timed


def check_lse(actual: Results, exact: Results, cell: Cell, what: str) -> None:
    """By-products of layer 0; a page's weights are rounded to bfloat16 before they are added."""
    written = ~exact.page_lse.isnan()
    pages = (actual.page_lse[written] - exact.page_lse[written]).abs()
    pivots = cell.is_pivot[0].to(DEVICE).repeat(cell.num_rows)
    heads = (actual.head_lse[0, pivots] - exact.head_lse[0, pivots]).abs()
    if not (pages < 2**-7).all() or not (heads < 1e-3).all():
        raise SystemExit(f"the log-sum-exp of {what} is wrong; nothing is reported")


def provenance(commit: str) -> dict[str, object]:
    """What a row needs so that somebody else can repeat it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "device": bench_engine.device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }


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


def quantiles(call) -> list[float]:
    """Milliseconds of one call, L2 flushed before each: median, 90th and 10th percentile."""
    return triton.testing.do_bench(call, warmup=20, rep=150, quantiles=[0.5, 0.9, 0.1])


def append(out_dir: str | None, rows: list[dict[str, object]]) -> None:
    if out_dir:
        with open(Path(out_dir) / "kernels.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def report(names: list[str], with_fused: bool, out_dir: str | None, commit: str) -> None:
    dense: dict[tuple[int, int], tuple[float, float, int]] = {}
    head = f"{'cell':14}{'ours us':>9}{'spread':>8}{'GB/s':>7}{'fa3 dense':>10}{'GB/s':>7}"
    head += f"{'ratio':>7}{'per head':>10}{'scored':>8}{'none due':>9}{'plan':>6}"
    lines = [head + (f"{'fused':>8}{'scored':>8}" if with_fused else "")]
    rows = []
    launch = tuning.PAGED_DECODE[D]
    for name in names:
        num_rows, num_tokens, mix = parse(name)
        if (num_rows, num_tokens) not in dense:
            dense[num_rows, num_tokens] = fa3_dense(num_rows, num_tokens)
            torch.cuda.empty_cache()
        dense_us, dense_spread, dense_bytes = dense[num_rows, num_tokens]
        cell = make_cell(num_rows, num_tokens, mix)
        exact = cell.reference(0)
        nobody = torch.full_like(cell.due_pivot, -1)
        us, spread = time_ours(cell, exact, "plain")
        scored_us, _ = time_ours(cell, exact, "with scores", None, cell.due_pivot)
        idle_us, _ = time_ours(cell, exact, "with no head due", None, nobody)
        plan_us, _ = time_calls(PagedDecode(cell).plan, cell.num_layers)
        head_us, head_spread = fa3_per_head(cell, exact.output)
        rate, dense_rate = cell.bytes_per_layer / us / 1e3, dense_bytes / dense_us / 1e3
        line = (
            f"{name:14}{us:9.1f}{spread:8.1f}{rate:7.0f}{dense_us:10.1f}{dense_rate:7.0f}"
            f"{rate / dense_rate:7.3f}{head_us:10.1f}{scored_us:8.1f}{idle_us:9.1f}{plan_us:6.1f}"
        )
        row = {
            "benchmark": "paged_decode",
            "cell": name,
            **provenance(commit),
            "config": launch._asdict(),
            "kv_bytes": cell.bytes_per_layer,
            "median_us": us,
            "spread_us": spread,
            "gb_per_s": rate,
            "scored_us": scored_us,
            "no_head_due_us": idle_us,
            "plan_us": plan_us,
            "fa3_dense_us": dense_us,
            "fa3_dense_spread_us": dense_spread,
            "fa3_dense_gb_per_s": dense_rate,
            "fa3_per_head_us": head_us,
            "fa3_per_head_spread_us": head_spread,
        }
        if with_fused:
            fused = launch._replace(fused_merge=not launch.fused_merge)
            other_us, other_spread = time_ours(cell, exact, "other merge", fused)
            other_scored_us, _ = time_ours(
                cell, exact, "other merge with scores", fused, cell.due_pivot
            )
            line += f"{other_us:8.1f}{other_scored_us:8.1f}"
            row["other_merge"] = {
                "fused_merge": fused.fused_merge,
                "median_us": other_us,
                "spread_us": other_spread,
                "scored_us": other_scored_us,
            }
        print(line, flush=True)
        lines.append(line)
        rows.append(row)
        del cell, exact
        torch.cuda.empty_cache()
    append(out_dir, rows)
    print("\n".join(lines))


def sweep(names: list[str], tiles, warps, stages, per_sm, merges) -> None:
    """Every launch on every cell, best first by the geometric mean of the times."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    global NUM_LAYERS_MIN
    NUM_LAYERS_MIN = 10
    cells = []
    for name in names:
        num_rows, num_tokens, mix = parse(name)
        cell = make_cell(num_rows, num_tokens, mix)
        cells.append((cell, cell.reference(0).output))
    results = []
    for fused, *shape in itertools.product(merges, tiles, warps, stages):
        for programs in per_sm:
            launch = tuning.PagedDecodeLaunch(*shape, programs, fused)
            times = []
            try:
                for cell, exact in cells:
                    call = PagedDecode(cell, launch, round(sms * programs))
                    check(call(0), exact, str(launch))
                    times.append(time_calls(call, cell.num_layers, 7)[0])
            except triton.runtime.errors.OutOfResources as error:
                print(launch, str(error)[:60])
                break
            print(tuple(launch), *(f"{t:.1f}" for t in times), flush=True)
            results.append((statistics.geometric_mean(times), tuple(launch), times))
    print("cells", names, [cell.bytes_per_layer / 4.5e6 for cell, _ in cells])
    for mean, launch, times in sorted(results, key=lambda r: r[0])[:40]:
        print(f"{tuple(launch)!s:27} {mean:8.1f}", *(f"{t:8.1f}" for t in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tiles", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--warps", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4, 5])
    parser.add_argument("--per-sm", nargs="+", type=float, default=[1, 2, 3, 4])
    parser.add_argument("--launch", nargs=4, type=int, help="tile warps stages programs-per-SM")
    parser.add_argument(
        "--fused", action="store_true", help="time both ways of merging, not only the tuned one"
    )
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    if args.launch:
        tuning.PAGED_DECODE[D] = tuning.PagedDecodeLaunch(*args.launch)
    if args.sweep:
        merges = [False, True] if args.fused else [tuning.PAGED_DECODE[D].fused_merge]
        sweep(args.cells, args.tiles, args.warps, args.stages, args.per_sm, merges)
    else:
        out_dir = os.environ.get("OUT")
        report(args.cells, args.fused, out_dir, args.commit)
        report_gather(out_dir, args.commit)


if __name__ == "__main__":
    main()
