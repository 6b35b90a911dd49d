"""Times the Triton kernels on a GPU, each beside its baseline in the same process.

`paged_decode` beside FlashAttention 3, dense and per head; `page_gather` from pinned memory and
within the GPU, and `page_means`, beside one large copy. The kernels of policy `quest` have
bench_step_kernels.py.

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
import itertools
import os
import statistics

import torch
import triton
from decode_cells import CELLS, Cell, D, Results, make_cell, parse
from decode_timing import PagedDecode, time_ours, time_with_means
from flash_attention_baseline import fa3_dense, fa3_per_head
from gather_bandwidth import report_gather
from kernel_timing import append, check, provenance, time_calls
from mean_timing import report_means

from vllm_heterocache.kernels import tuning

SWEEP_LAYERS = 10
COLUMNS = {
    "ours us": "median_us",
    "spread": "spread_us",
    "GB/s": "gb_per_s",
    "fa3 dense": "fa3_dense_us",
    "GB/s ": "fa3_dense_gb_per_s",
    "per head": "fa3_per_head_us",
    "scored": "scored_us",
    "none due": "no_head_due_us",
    "means": "with_means_us",
    "plan": "plan_us",
}


def measure(name: str, dense: tuple[float, float, int], with_fused: bool) -> dict[str, object]:
    """The row of one cell. `dense`: what `fa3_dense` said of its batch."""
    num_rows, num_tokens, mix = parse(name)
    cell = make_cell(num_rows, num_tokens, mix)
    exact = cell.reference(0)
    nobody = torch.full_like(cell.due_pivot, -1)
    us, spread = time_ours(cell, exact, "plain")
    head_us, head_spread = fa3_per_head(cell, exact.output)
    row = {
        "kv_bytes": cell.bytes_per_layer,
        "median_us": us,
        "spread_us": spread,
        "gb_per_s": cell.bytes_per_layer / us / 1e3,
        "scored_us": time_ours(cell, exact, "with scores", None, cell.due_pivot)[0],
        "no_head_due_us": time_ours(cell, exact, "with no head due", None, nobody)[0],
        "with_means_us": time_with_means(cell),
        "plan_us": time_calls(PagedDecode(cell).plan, cell.num_layers)[0],
        "fa3_dense_us": dense[0],
        "fa3_dense_spread_us": dense[1],
        "fa3_dense_gb_per_s": dense[2] / dense[0] / 1e3,
        "fa3_per_head_us": head_us,
        "fa3_per_head_spread_us": head_spread,
    }
    if with_fused:
        row["other_merge"] = time_other_merge(cell, exact)
    return row


def time_other_merge(cell: Cell, exact: Results) -> dict[str, object]:
    launch = tuning.PAGED_DECODE[D]
    other = launch._replace(fused_merge=not launch.fused_merge)
    us, spread = time_ours(cell, exact, "other merge", other)
    scored_us, _ = time_ours(cell, exact, "other merge with scores", other, cell.due_pivot)
    times = {"median_us": us, "spread_us": spread, "scored_us": scored_us}
    return {"fused_merge": other.fused_merge, **times}


def report(names: list[str], with_fused: bool, out_dir: str | None, commit: str) -> None:
    dense: dict[tuple[int, int], tuple[float, float, int]] = {}
    lines = [f"{'cell':14}" + "".join(f"{title:>10}" for title in COLUMNS) + f"{'ratio':>8}"]
    config = tuning.PAGED_DECODE[D]._asdict()
    for name in names:
        batch = parse(name)[:2]
        if batch not in dense:
            dense[batch] = fa3_dense(*batch)
            torch.cuda.empty_cache()
        row = measure(name, dense[batch], with_fused)
        line = "".join(f"{row[key]:10.1f}" for key in COLUMNS.values())
        line = f"{name:14}{line}{row['gb_per_s'] / row['fa3_dense_gb_per_s']:8.3f}"
        if with_fused:
            line += "   other merge {median_us:.1f}, scored {scored_us:.1f}".format(
                **row["other_merge"]
            )
        print(line, flush=True)
        lines.append(line)
        named = {"benchmark": "paged_decode", "cell": name, **provenance(commit)}
        append(out_dir, [{**named, "config": config, **row}])
        torch.cuda.empty_cache()
    print("\n".join(lines))


def sweep(names: list[str], tiles, warps, stages, per_sm, merges) -> None:
    """Every launch on every cell, best first by the geometric mean of the times."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    cells = []
    for name in names:
        num_rows, num_tokens, mix = parse(name)
        cell = make_cell(num_rows, num_tokens, mix, least_layers=SWEEP_LAYERS)
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
        report_means(out_dir, args.commit)


if __name__ == "__main__":
    main()
