#!/usr/bin/env python3
"""Times the Triton kernels on a GPU, each beside its baseline in the same process.

`paged_decode` beside FlashAttention 3, dense and per head; the kernels of policies `quest`, `fier`
and `rocketkv`, and those of finders, beside decode attention; `page_gather` from pinned memory and
within the GPU, `page_means` and `page_scores`, beside one large copy; `match_tokens` by its halves.

Shape of Llama-3.1-8B: 32 query heads, 8 KV heads of 128, bf16, pages of 16 tokens. Calls are
captured in CUDA graphs and go round the layers of a pool several times the size of the L2 cache.
A cell whose result is wrong is not printed. One JSON line per cell goes to kernels.jsonl in --out.

    python scripts/bench/kernel_times.py              # all kernels and cells, tuned launch
    python scripts/bench/kernel_times.py --kernels step_select page_summaries
    python scripts/bench/kernel_times.py --kernels find_pages exchange_pages quantized_keys
    python scripts/bench/kernel_times.py --kernels one_bit_step_select hybrid_step_select
    python scripts/bench/kernel_times.py --fused      # and with the other way of merging
    python scripts/bench/kernel_times.py --kernels paged_decode --fp8
    python scripts/bench/kernel_times.py --sweep --cells 1x224K-2full 4x224K-full

With --tiny and TRITON_INTERPRET=1 it runs on a CPU, without FlashAttention 3.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import triton

from common import (
    cells,
    exchange_kernels,
    finder_kernels,
    hybrid_kernels,
    matched_tokens,
    one_bit_kernels,
    page_scores,
    step_kernels,
)
from common.cells import Cell, D, G, H, Results, make_cell, parse
from common.page_gather import gather_rows
from common.page_means import TINY_LAYERS, TINY_PROMPT_PAGES, means_row
from common.paged_decode import PagedDecode, time_ours, time_with_means
from common.rows import append_rows, made_by, print_table, row_parser
from common.timing import DEVICE, expect_close, time_calls
from vllm_heterocache.kernels import tuning

SWEEP_LAYERS = 10
TINY_CELLS = ["1x1K-2full", "1x1K-25", "1x1K-2finder"]
Row = dict[str, Any]
ALL_CELLS = cells.CELLS + step_kernels.CELLS + finder_kernels.CELLS
CHOICE = {
    "us": "median_us",
    "spread": "spread_us",
    "GB/s": "gb_per_s",
    "keys": "keys_us",
    "choice": "choose_us",
    "decode": "decode_us",
    "all pages": "whole_decode_us",
    "ratio": "to_whole_decode",
}
COLUMNS = {
    "paged_decode": {
        "ours us": "median_us",
        "spread": "spread_us",
        "GB/s": "gb_per_s",
        "fa3 dense": "fa3_dense_us",
        "fa3 GB/s": "fa3_dense_gb_per_s",
        "ratio": "to_fa3_dense",
        "per head": "fa3_per_head_us",
        "scored": "scored_us",
        "none due": "no_head_due_us",
        "means": "with_means_us",
        "split": "plan_us",
        "other merge": "other_merge_us",
    },
    "step_select": CHOICE,
    "one_bit_step_select": CHOICE,
    "hybrid_step_select": {
        "us": "median_us",
        "spread": "spread_us",
        "GB/s": "gb_per_s",
        "decode": "decode_us",
        "kept pages": "kept_decode_us",
        "ratio": "to_kept_decode",
    },
    "page_summaries": {"us": "median_us", "spread": "spread_us", "GB/s": "gb_per_s"},
    "find_pages": {
        "us": "median_us",
        "spread": "spread_us",
        "GB/s": "gb_per_s",
        "none due": "no_row_due_us",
        "decode": "decode_us",
        "to decode": "to_decode",
        "all pages": "whole_decode_us",
        "ratio": "to_whole_decode",
    },
    "exchange_pages": {
        "us": "median_us",
        "spread": "spread_us",
        "pages": "moved_pages",
        "nothing better": "nothing_better_us",
        "none due": "no_row_due_us",
        "with search": "with_search_us",
        "attention": "attention_us",
        "in turn": "in_turn_us",
        "layer": "layer_us",
        "added": "added_us",
        "all pages": "whole_decode_us",
        "ratio": "to_whole_decode",
    },
    "quantized_keys": {"us": "median_us", "spread": "spread_us", "GB/s": "gb_per_s"},
    "page_gather": {
        "pinned GB/s": "pinned_gb_per_s",
        "fetch": "fetch_gb_per_s",
        "one copy": "one_copy_gb_per_s",
        "GPU r+w": "gpu_read_and_written_gb_per_s",
    },
    "page_scores": {"one query ms": "one_ms", "several ms": "several_ms", "copy ms": "copy_ms"},
    "page_means": {"ms": "ms", "GB/s": "read_gb_per_s", "one copy ms": "copy_ms"},
    "matched_tokens": {
        "ms": "whole_ms",
        "attention": "candidates_ms",
        "choice and fit": "match_ms",
    },
}


def decode_cells(args: argparse.Namespace) -> list[str]:
    mixes = {cells.DENSE, *cells.MIXES}
    return [name for name in args.cells if parse(name)[2] in mixes]


def share_cells(args: argparse.Namespace) -> list[str]:
    return [name for name in args.cells if parse(name)[2].isdigit()]


def finder_cells(args: argparse.Namespace) -> list[str]:
    return [name for name in args.cells if parse(name)[2] in finder_kernels.MIXES]


def paged_decode_rows(args: argparse.Namespace) -> Iterator[Row]:
    dense: dict[tuple[int, int], Row] = {}
    for name in decode_cells(args):
        num_rows, num_tokens, _ = parse(name)
        if (num_rows, num_tokens) not in dense:
            shape = num_rows, num_tokens, args.fp8, args.queries
            dense[num_rows, num_tokens] = fa3_dense_columns(*shape)
            torch.cuda.empty_cache()
        row = measure(name, args) | dense[num_rows, num_tokens]
        if "fa3_dense_gb_per_s" in row:
            row["to_fa3_dense"] = row["gb_per_s"] / row["fa3_dense_gb_per_s"]
        yield row


def fa3_dense_columns(num_rows: int, num_tokens: int, is_fp8: bool, num_queries: int) -> Row:
    if DEVICE.type == "cpu":
        return {}
    from common.flash_attention import fa3_dense

    us, spread, num_bytes = fa3_dense(num_rows, num_tokens, is_fp8, num_queries)
    rate = num_bytes / us / 1e3
    return {"fa3_dense_us": us, "fa3_dense_spread_us": spread, "fa3_dense_gb_per_s": rate}


def fa3_per_head_columns(cell: Cell, exact: Results) -> Row:
    if DEVICE.type == "cpu":
        return {}
    from common.flash_attention import fa3_per_head

    us, spread = fa3_per_head(cell, exact.output)
    return {"fa3_per_head_us": us, "fa3_per_head_spread_us": spread}


def measure(name: str, args: argparse.Namespace) -> Row:
    """The row of one cell."""
    cell = cell_of(args, name, num_layers=args.layers)
    exact = cell.reference(0)
    nobody = torch.zeros_like(cell.rows.is_due)
    none_due = replace(cell, rows=cell.rows._replace(is_due=nobody))
    none_due_us, _ = time_ours(none_due, exact, "with no row due", None, cell.pivot_of_head)
    us, spread = time_ours(cell, exact, "plain")
    row = {
        "benchmark": "paged_decode",
        "cell": name,
        "config": launch_of(cell)._asdict() | {"fp8": args.fp8, "queries": args.queries},
        "kv_bytes": cell.bytes_per_layer,
        "median_us": us,
        "spread_us": spread,
        "gb_per_s": cell.bytes_per_layer / us / 1e3,
        "scored_us": time_ours(cell, exact, "with scores", None, cell.pivot_of_head)[0],
        "no_head_due_us": none_due_us,
        "with_means_us": time_with_means(cell),
        "plan_us": time_calls(PagedDecode(cell).split, cell.num_layers)[0],
        **fa3_per_head_columns(cell, exact),
    }
    if args.fused:
        row["other_merge"] = time_other_merge(cell, exact)
        row["other_merge_us"] = row["other_merge"]["median_us"]
    return row


def cell_of(args: argparse.Namespace, name: str, **layers: int | None) -> Cell:
    cell = make_cell(*parse(name), **layers)
    cell = cell.as_fp8() if args.fp8 else cell
    return cell.with_queries(args.queries) if args.queries > 1 else cell


def launch_of(cell: Cell) -> tuning.PagedDecodeLaunch:
    is_fp8, num_segments = cell.kv_scales is not None, cell.num_rows * H
    return tuning.paged_decode_launch(D, num_segments, G, cell.rows.max_queries, is_fp8)


def time_other_merge(cell: Cell, exact: Results) -> dict[str, object]:
    launch = launch_of(cell)
    other = launch._replace(fused_merge=not launch.fused_merge)
    us, spread = time_ours(cell, exact, "other merge", other)
    scored_us, _ = time_ours(cell, exact, "other merge with scores", other, cell.pivot_of_head)
    times = {"median_us": us, "spread_us": spread, "scored_us": scored_us}
    return {"fused_merge": other.fused_merge, **times}


def step_select_rows(args: argparse.Namespace) -> Iterator[Row]:
    for name in share_cells(args):
        yield step_kernels.step_row(name, args.layers)


def one_bit_step_select_rows(args: argparse.Namespace) -> Iterator[Row]:
    for name in share_cells(args):
        yield one_bit_kernels.one_bit_row(name, args.layers)


def hybrid_step_select_rows(args: argparse.Namespace) -> Iterator[Row]:
    for name in share_cells(args):
        yield hybrid_kernels.hybrid_row(name, args.layers)


def page_summaries_rows(args: argparse.Namespace) -> Iterator[Row]:
    yield step_kernels.summaries_row(args.summaries * 1024, args.layers or 32)


def find_pages_rows(args: argparse.Namespace) -> Iterator[Row]:
    for name in finder_cells(args):
        yield finder_kernels.find_row(name, args.layers)


def exchange_pages_rows(args: argparse.Namespace) -> Iterator[Row]:
    for name in finder_cells(args):
        yield exchange_kernels.exchange_row(name, args.layers)


def quantized_keys_rows(args: argparse.Namespace) -> Iterator[Row]:
    for number in finder_kernels.MIXES.values():
        yield finder_kernels.quantized_row(args.summaries * 1024, args.layers or 32, number)


def page_gather_rows(args: argparse.Namespace) -> Iterator[Row]:
    yield from gather_rows(args.tiny)


def page_means_rows(args: argparse.Namespace) -> Iterator[Row]:
    yield means_row(TINY_LAYERS, TINY_PROMPT_PAGES) if args.tiny else means_row()


def page_scores_rows(args: argparse.Namespace) -> Iterator[Row]:
    return rows_of_prompts(args, page_scores, page_scores.scores_row)


def matched_tokens_rows(args: argparse.Namespace) -> Iterator[Row]:
    return rows_of_prompts(args, matched_tokens, matched_tokens.matched_row)


def rows_of_prompts(
    args: argparse.Namespace, prompts: ModuleType, make_row: Callable[..., Row]
) -> Iterator[Row]:
    """For each of the lengths that `prompts` names."""
    for sizes in [prompts.TINY] if args.tiny else zip(prompts.LENGTHS):
        yield make_row(*sizes)


ROWS = {
    "paged_decode": paged_decode_rows,
    "step_select": step_select_rows,
    "one_bit_step_select": one_bit_step_select_rows,
    "hybrid_step_select": hybrid_step_select_rows,
    "page_summaries": page_summaries_rows,
    "find_pages": find_pages_rows,
    "exchange_pages": exchange_pages_rows,
    "quantized_keys": quantized_keys_rows,
    "page_gather": page_gather_rows,
    "page_means": page_means_rows,
    "page_scores": page_scores_rows,
    "matched_tokens": matched_tokens_rows,
}


def report(args: argparse.Namespace, kernel: str) -> None:
    """Measure, keep and show the rows of one kernel."""
    lines, columns = [], COLUMNS[kernel]
    for row in ROWS[kernel](args):
        append_rows(args.out, "kernels.jsonl", [row | made_by(args)])
        cells_of_line = [row.get(key) for key in columns.values()]
        # of several values the median is the first
        line = [cell[0] if isinstance(cell, list) else cell for cell in cells_of_line]
        lines.append([row["cell"], *line])
        print(f"{kernel} {row['cell']}: measured", flush=True)
        torch.cuda.empty_cache()
    if lines:
        print_table([kernel, *columns], lines)


def sweep(args: argparse.Namespace, names: list[str]) -> None:
    """Every launch on every cell, best first by the geometric mean of the times."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    merges = [False, True] if args.fused else [False]
    batches = []
    for name in names:
        cell = cell_of(args, name, least_layers=SWEEP_LAYERS)
        batches.append((cell, cell.reference(0).output))
    results = []
    for fused, *shape in itertools.product(merges, args.tiles, args.warps, args.stages):
        for programs in args.per_sm:
            launch = tuning.PagedDecodeLaunch(*shape, programs, fused)
            times = []
            try:
                for cell, exact in batches:
                    call = PagedDecode(cell, launch, round(sms * programs))
                    expect_close(call(0), exact, str(launch))
                    times.append(time_calls(call, cell.num_layers, 7)[0])
            except triton.runtime.errors.OutOfResources as error:
                print(launch, str(error)[:60])
                break
            print(tuple(launch), *(f"{t:.1f}" for t in times), flush=True)
            results.append((statistics.geometric_mean(times), tuple(launch), times))
    print("cells", names, [cell.bytes_per_layer / 4.5e6 for cell, _ in batches])
    for mean, launch, times in sorted(results, key=lambda r: r[0])[:40]:
        print(f"{tuple(launch)!s:27} {mean:8.1f}", *(f"{t:8.1f}" for t in times))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = row_parser(__doc__)
    parser.add_argument("--kernels", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--cells",
        nargs="+",
        help="BATCHxCONTEXT-HEADS of paged_decode, BATCHxCONTEXT-PERCENT of the step selections, "
        "BATCHxCONTEXT-1finder or -2finder of find_pages and exchange_pages",
    )
    parser.add_argument(
        "--summaries", type=int, default=32, help="prompt of page_summaries and quantized_keys, K"
    )
    parser.add_argument("--layers", type=int, help="default: too many for the L2; 32 of a prompt")
    parser.add_argument("--sweep", action="store_true", help="try launches of paged_decode")
    parser.add_argument("--tiles", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--warps", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4, 5])
    parser.add_argument("--per-sm", nargs="+", type=float, default=[1, 2, 3, 4])
    parser.add_argument("--launch", nargs=4, type=int, help="tile warps stages programs-per-SM")
    parser.add_argument("--fp8", action="store_true", help="paged_decode and FA3 on fp8 pages")
    parser.add_argument(
        "--queries", type=int, default=1, help="of a row of paged_decode: a token and its drafts"
    )
    parser.add_argument(
        "--fused",
        action="store_true",
        help="time both ways of merging, not only the one that kernels/tuning.py chooses",
    )
    args = parser.parse_args(argv)
    if args.fused and args.queries > 1:
        parser.error("--fused: rows of several --queries always merge in a second launch")
    if args.tiny:
        args.layers, args.summaries = 1, 1
    args.cells = args.cells or (TINY_CELLS if args.tiny else ALL_CELLS)
    check_cells(parser, args)
    return args


def check_cells(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit where a cell is of no benchmark."""
    mixes = [*cells.MIXES, cells.DENSE, *finder_kernels.MIXES]
    pattern = rf"\d+x\d+K?-([1-9]\d?|100|{'|'.join(mixes)})"
    for name in args.cells:
        if not re.fullmatch(pattern, name):
            parser.error(
                f"--cells: {name} is no cell; take a batch, a context and a percentage or one of "
                f"{', '.join(mixes)}, such as 1x32K-10 or 1x32K-2full"
            )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if DEVICE.type == "cpu" and not (args.tiny and triton.knobs.runtime.interpret):
        raise SystemExit("no GPU here; TRITON_INTERPRET=1 and --tiny try the script on a CPU")
    if args.tiny:
        step_kernels.make_tiny()
        finder_kernels.make_tiny()
    if args.launch:
        tuning.PAGED_DECODE[D] = tuning.PagedDecodeLaunch(*args.launch)
    if args.sweep:
        sweep(args, decode_cells(args))
        return
    for kernel in args.kernels:
        report(args, kernel)


if __name__ == "__main__":
    sys.exit(main())
