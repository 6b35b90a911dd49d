#!/usr/bin/env python3
"""Time per output token of whole engines: stock vLLM and HeteroCache, one after the other.

A cell is `batch x context`, such as 3x224K; within a cell all requests decode, and every step is
timed. Stock gets distinct prompts, HeteroCache one prompt that every request compacts into blocks
of its own; prompts of longer cells begin with those of shorter ones, so that each token is
prefilled once. Nothing is printed unless every step gave one token to every request, short prompts
got stock's tokens, long ones were decoded from page lists, and the pool gave their blocks back.
A row also has what its context adds to a step, which is the time a token less that of the shortest
dense cell of the same engine, and the requests of its length that the pool holds at once.

    python scripts/bench/decode.py --engine stock retrieval --run 1
    python scripts/bench/decode.py --engine stock paper --run 1 --raw FOLDER      # stock from there
    python scripts/bench/decode.py --engine retrieval --cells 1x128K --drift-force off 0 0.01 0.1
    python scripts/bench/decode.py --run 1 --kv-cache-dtype fp8 --drafts 4        # of all engines
    python scripts/bench/decode.py --cells 8x32K --drift-force off real --trace 32   # and kernels
    python scripts/bench/decode.py --model-shape gemma-3-27b --run 1     # with sliding layers

With drafts a step may give a request several tokens; ratios are of the time a token.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

from common import engine, engine_runs, trace
from common.rows import append_rows, print_table

CELLS = ["1x1K", "1x32K", "8x32K", "1x128K", "1x224K", "3x224K"]
SHAPE_CELLS = ["1x1K", "1x128K", "1x224K"]  # of a --model-shape, whose prefill is longer
TINY_CELLS = ["1x200", "1x1K", "3x1K"]
MIN_PROMPT = 2048  # cells with shorter contexts stay dense
EQUAL_TOKENS = 32
COUNTED = ("drift_checks", "drift_triggers", "pages_fetched", "fetches_late")


def parse_cell(cell: str) -> tuple[int, int]:
    """Requests and prompt tokens."""
    count, _, tokens = cell.partition("x")
    if tokens.endswith("K"):
        return int(count), int(tokens[:-1]) * 1024
    return int(count), int(tokens)


def in_order(cells: list[str]) -> list[str]:
    """Shorter contexts first, so that longer prompts find their beginning in the prefix cache."""
    return sorted(cells, key=lambda cell: parse_cell(cell)[::-1])


# --- in the engine's process ---


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    session = engine.Session(spec)
    cells = [measure_cell(session, spec, cell) for cell in spec["cells"]]
    session.close()
    return {"engine": session.describe(), "cells": cells}


def measure_cell(session: engine.Session, spec: dict[str, Any], cell: str) -> dict[str, Any]:
    count, num_tokens = parse_cell(cell)
    is_stock = session.options is None
    is_short = is_stock or num_tokens < session.options["min_prompt_tokens"]
    seeds = range(count) if is_short else [0] * count
    prompts = [engine.random_prompt(num_tokens, spec["vocab_size"], seed) for seed in seeds]
    if spec["switch_levels"]:  # prompts are offloaded whatever level comes first
        session.set_drift(next(level for level in spec["levels"] if level != "off"))
    names = session.start(prompts)
    first = session.requests[names[0]]
    result: dict[str, Any] = {
        "cell": cell,
        # with the answer's first token; the cache may hold the prompt's beginning
        "first_token_s": first.first_token_s,
        "cached_tokens": first.cached_tokens,
        "is_compact": not is_short,
        "random_attention": spec["random_attention"],
    }

    def is_settled() -> bool:
        if is_short:
            return True
        result["kv"] = engine.kv_blocks(session, names)
        return result["kv"]["used"] <= result["kv"]["limit"]

    session.settle(is_settled)
    kept = session.used_blocks() / count
    result["requests_that_fit"] = engine.requests_that_fit(session, num_tokens, kept)
    result["windows"] = {}
    for level in spec["levels"] if not is_short else ["off"]:
        if spec["switch_levels"] and not is_short:
            session.set_drift(level)
            session.settle(lambda: True)
        result["windows"][level] = session.window(names, spec["num_steps"])
        if spec["trace_steps"]:
            result["windows"][level]["trace"] = session.trace(spec["trace_steps"])
    result["first_tokens"] = first.tokens[:EQUAL_TOKENS]
    session.stop()
    return result


# --- in the parent ---


def check(results: dict[str, dict[str, Any]], num_equal: int = EQUAL_TOKENS) -> None:
    """Raise SystemExit if anything that was measured is not what it should be.

    Args:
        num_equal: tokens of short prompts that must be stock's.
    """
    stock_tokens = {}
    if "stock" in results:
        stock_tokens = {c["cell"]: c["first_tokens"] for c in results["stock"]["cells"]}
    engine_runs.check_same_machine(list(results.values()))
    for name, result in results.items():
        engine_runs.check_default_engine(result)
        for cell in result["cells"]:
            problem = cell_problem(cell, stock_tokens.get(cell["cell"]), num_equal)
            if problem:
                raise SystemExit(f"{name}, {cell['cell']}: {problem}; nothing is reported")


def equal_tokens(cell: dict[str, Any], stock_tokens: list[int]) -> int:
    """First tokens that are stock's."""
    pairs = zip(cell["first_tokens"], stock_tokens, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def cell_problem(
    cell: dict[str, Any], stock_tokens: list[int] | None, num_equal: int = EQUAL_TOKENS
) -> str | None:
    count, _ = parse_cell(cell["cell"])
    if len(cell["first_tokens"]) < EQUAL_TOKENS:
        return f"{len(cell['first_tokens'])} tokens instead of {EQUAL_TOKENS} or more"
    if (
        not cell["is_compact"]
        and stock_tokens
        and equal_tokens(cell, stock_tokens) < min(num_equal, len(stock_tokens))
    ):
        return f"tokens {cell['first_tokens']} differ from stock's {stock_tokens}"
    if cell["is_compact"] and not cell["kv"]["used"] <= cell["kv"]["limit"]:
        return f"blocks held: {cell['kv']}"
    for level, window in cell["windows"].items():
        rows, asked = window["decode_rows"], window["num_steps"] * count
        # the counters may lag by a step or two at either end of the window
        if cell["is_compact"] and (rows["dense"] or abs(rows["compact"] - asked) > 3 * count):
            return f"decode rows {rows} instead of {asked} compact ones"
        if window["num_preemptions"]:
            return f"{window['num_preemptions']} preemptions"
        checks, triggers = (window["counters"].get(f"drift_{n}", 0) for n in ("checks", "triggers"))
        fetched = window["counters"].get("pages_fetched", 0)
        if cell["random_attention"] and level not in ("off", "0") and not fetched:
            return "no page was fetched"
        if level not in ("off", "real") and not is_share(triggers, checks, float(level)):
            return f"{triggers} of {checks} checks triggered instead of {level}"
    return None


def is_share(hits: int, tries: int, share: float) -> bool:
    """Whether `hits` of `tries` is what a chance of `share` gives, within five deviations."""
    deviation = (tries * share * (1 - share)) ** 0.5
    return tries > 0 and abs(hits - tries * share) <= 5 * deviation + 1e-6 * tries + 1


def shortest_dense(result: dict[str, Any]) -> tuple[int, float] | None:
    """Tokens and time a token of the shortest single prompt, if that stays dense in all engines."""
    cells = [(parse_cell(cell["cell"]), cell) for cell in result["cells"]]
    short = [
        (num_tokens, cell["windows"]["off"]["token_ms"])
        for (count, num_tokens), cell in cells
        if count == 1 and num_tokens < MIN_PROMPT and not cell["is_compact"]
    ]
    return min(short, default=None)


def added_ms(result: dict[str, Any], cell: dict[str, Any], window: dict[str, Any]) -> float | None:
    """What the context of a cell adds to the time a token; None of the cell it is added to."""
    shortest = shortest_dense(result)
    if shortest is None or parse_cell(cell["cell"])[1] <= shortest[0]:
        return None
    return window["token_ms"] - shortest[1]


def rows_of(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each engine, cell and level of drift, with its ratio to stock's row."""
    stock: dict[str, dict[str, Any]] = {}
    if "stock" in results:
        for c in results["stock"]["cells"]:
            window = c["windows"]["off"]
            stock[c["cell"]] = window | {
                "added_ms": added_ms(results["stock"], c, window),
                "requests_that_fit": c["requests_that_fit"],
                "first_tokens": c["first_tokens"],
            }
    rows = []
    for result in results.values():
        for cell in result["cells"]:
            off = cell["windows"].get("off")
            for level, window in cell["windows"].items():
                baseline = stock.get(cell["cell"])
                times = {k: v for k, v in window.items() if k.endswith("_ms")}
                added = added_ms(result, cell, window)
                stock_added = baseline and baseline["added_ms"]
                rows.append(
                    {
                        **engine_runs.engine_row("decode", args, result),
                        "cell": cell["cell"],
                        "drift": level if cell["is_compact"] else None,
                        "random_attention": cell["random_attention"],
                        "config": {"options": result["options"], "engine": result["engine"]},
                        "num_steps": window["num_steps"],
                        "tokens_per_step": window["tokens_per_step"],
                        **times,
                        "stock_token_ms": baseline and baseline["token_ms"],
                        "to_stock": baseline and window["token_ms"] / baseline["token_ms"],
                        "median_to_stock": baseline and window["median_ms"] / baseline["median_ms"],
                        "to_no_drift": off and window["token_ms"] / off["token_ms"],
                        "added_ms": added,
                        "added_to_stock": added and stock_added and added / stock_added,
                        "requests_that_fit": cell["requests_that_fit"],
                        "requests_to_stock": baseline
                        and cell["requests_that_fit"] / max(1, baseline["requests_that_fit"]),
                        "first_token_s": cell["first_token_s"],
                        "cached_tokens": cell["cached_tokens"],
                        "kv": cell.get("kv"),
                        "equal_tokens": None
                        if baseline is None or cell["is_compact"]
                        else equal_tokens(cell, baseline["first_tokens"]),
                        "decode_rows": window["decode_rows"],
                        "counters": window["counters"],
                        "trace": window.get("trace"),
                    }
                )
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    heads = ["engine", "cell", "drift", "token ms", "step ms", "median", "p99", "max"]
    heads += ["to stock", "no drift", "added", "to stock's", "requests", "to stock's"]
    heads += ["1st token s", "cached", "KV share", "checks", "triggers", "fetched", "late"]
    lines = []
    for row in rows:
        counters = row["counters"]
        times = [row[f"{name}_ms"] for name in ("token", "mean", "median", "p99", "max")]
        counts = [counters.get(name) for name in COUNTED]
        lines.append(
            [
                row["engine"],
                row["cell"],
                row["drift"],
                *times,
                row["to_stock"],
                row["to_no_drift"],
                row["added_ms"],
                row["added_to_stock"],
                row["requests_that_fit"],
                row["requests_to_stock"],
                row["first_token_s"],
                row["cached_tokens"],
                row["kv"] and row["kv"]["prompt_share"],
                *counts,
            ]
        )
    print_table(heads, lines)


def print_traces(rows: list[dict[str, Any]]) -> None:
    """Of each row that has one."""
    for row in rows:
        if made_of := row["trace"]:
            span, idle = made_of["span_us"], made_of["idle_us"]
            print(f"\n{row['engine']}, {row['cell']}, drift {row['drift']}: microseconds a step:")
            print(f"{span:.0f}, in {idle:.0f} of which the compute stream does nothing")
            beside = [[f"beside: {name}", *numbers] for name, *numbers in made_of["beside"]]
            print_table(["kernel", "launches", "us"], made_of["kernels"] + beside)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = engine_runs.engine_parser(__doc__)
    parser.add_argument(
        "--cells",
        nargs="+",
        help=f"default {' '.join(CELLS)}, with --model-shape {' '.join(SHAPE_CELLS)}",
    )
    parser.add_argument("--steps", type=int, default=160, help="decode steps timed in a cell")
    parser.add_argument(
        "--drift-force",
        nargs="+",
        default=["off"],
        help="off: nothing is fetched; SHARE: the share of the checks that triggers, of pivots and "
        "satellites; real: as it comes out, with finders in engine retrieval unless a SHARE is "
        "measured in the same engine",
    )
    parser.add_argument(
        "--random-attention",
        action="store_true",
        help="give the dummy model random norms, embeddings and QKV: with its own weights all "
        "pages score alike, and no retrieval finds a page that is missing; needs the environment "
        "variable VLLM_ALLOW_INSECURE_SERIALIZATION=1",
    )
    parser.add_argument(
        "--engine-per-level",
        action="store_true",
        help="start an engine for each level of drift instead of switching one",
    )
    parser.add_argument(
        "--trace",
        type=int,
        default=0,
        metavar="STEPS",
        help="further steps of each window under torch's profiler: what they are made of",
    )
    args = engine_runs.parse_args(parser, argv)
    cells = SHAPE_CELLS if args.model_shape else CELLS
    args.cells = in_order(args.cells or (TINY_CELLS if args.tiny else cells))
    for cell in args.cells:
        parse_cell(cell)
    if args.trace and args.tiny:
        raise SystemExit("--trace is of kernels on a GPU; leave --tiny out")
    return args


def specs_of(args: argparse.Namespace, folder: Any) -> list[dict[str, Any]]:
    """Engines to run, in order; several of a name only where levels of drift need their own."""
    shape = engine_runs.shape_of(args)
    # requests run until their cell ends: steps of all windows, settling, prompts of the others
    room = len(args.drift_force) * (args.steps + args.trace + 64) * (1 + args.drafts) + 4096
    longest = max(parse_cell(cell)[1] for cell in args.cells)
    max_model_len = min(shape.max_tokens, longest + room)
    base = {
        "cells": args.cells,
        "num_steps": args.steps,
        "trace_steps": args.trace,
        "vocab_size": shape.vocab_size,
        "random_attention": args.random_attention,
        "switch_levels": False,
        "levels": ["off"],
    }
    specs = []
    for name in args.engine:
        groups = [["off"]] if name == "stock" else [args.drift_force]
        if args.engine_per_level and name != "stock":
            groups = [[level] for level in args.drift_force]
        for levels in groups:
            start = next((level for level in levels if level != "off"), "off")
            options = {"min_prompt_tokens": 512 if args.tiny else MIN_PROMPT}
            options |= engine_runs.drift_options(*levels)
            spec = engine_runs.engine_spec(args, name, folder, max_model_len, **options)
            if args.model_shape:  # capturing graphs of hundreds of rows takes longer than the cells
                spec["llm"]["max_num_seqs"] = max(8, *(parse_cell(c)[0] for c in args.cells))
            if args.trace:
                spec["llm"]["profiler_config"] = trace.profiler_config(folder / "traces")
            of_levels = {"levels": levels, "switch_levels": len(levels) > 1, "drift": start}
            specs.append(spec | base | of_levels)
    return specs


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results: dict[str, dict[str, Any]] = {}
    with engine_runs.model_folder(args) as folder:
        for spec in specs_of(args, folder):
            result = engine_runs.run_engine(args, __file__, spec)
            result["options"] = engine_runs.options_in_rows(spec)
            merge(results, spec["engine"], result)
    check(results, 0 if engine_runs.shape_of(args).is_chaotic else EQUAL_TOKENS)
    rows = rows_of(args, results)
    print_rows(rows)
    print_traces(rows)
    append_rows(args.out, "decode.jsonl", rows)


def merge(results: dict[str, dict[str, Any]], name: str, result: dict[str, Any]) -> None:
    """Windows of further levels of drift, measured on an engine of their own, join the first's."""
    if name not in results:
        results[name] = result
        return
    for cell, more in zip(results[name]["cells"], result["cells"], strict=True):
        cell["windows"] |= more["windows"]


if __name__ == "__main__":
    if "--in-engine" in sys.argv:
        engine.main(measure)
    else:
        main()
