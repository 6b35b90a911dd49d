#!/usr/bin/env python3
"""Output tokens per second with as many long requests as one GPU holds, and the cost of prefill.

Stock vLLM and HeteroCache get the same `gpu_memory_utilization`. For each engine:
1. prefill: prompts that nothing has cached, one at a time, until the second token is out, which
   HeteroCache computes from the compacted prompt; then until the pool has its blocks back;
2. decode phase: as many requests as fit, each for --output tokens, with their prompts in the prefix
   cache (stock: distinct prompts; HeteroCache: one, compacted anew for every request); tokens per
   second over the steps in which all of them decode;
3. whole run, computed: requests times prefill, one after the other, plus the decode phase. With
   --cold it is measured instead: distinct prompts for every request, submitted at once.
`--drift real` offloads what the roles fetch: finders in engine `retrieval`, satellites in `paper`.
With a share, satellites are offloaded in both, and so many drift checks of their pivots trigger.
Requests that find no room in the host pool are compacted without retrieval, and counted.

    python scripts/bench/serving.py --engine stock retrieval --run 1
    python scripts/bench/serving.py --engine stock retrieval --drift real --run 1
    python scripts/bench/serving.py --model-shape qwen3.5-27b --run 1      # with recurrent layers
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from common import engine, engine_runs
from common.rows import append_rows, print_table

SLACK_TOKENS = 1024  # of the pool that nobody gets


# --- in the engine's process ---


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    session = engine.Session(spec)
    warm_up(session, spec)
    count = min(capacity(session, spec), spec["most_requests"])
    if spec["cold"]:
        phases = {"cold": cold_run(session, spec, count)}
    else:
        phases = {"prefill": prefills(session, spec, count), "decode": decode(session, spec, count)}
    session.close()
    return {"engine": session.describe(), "requests": count, **phases}


def prompt(spec: dict[str, Any], seed: int) -> list[int]:
    return engine.random_prompt(spec["num_tokens"], spec["vocab_size"], seed)


def warm_up(session: engine.Session, spec: dict[str, Any]) -> None:
    """One short request, so that no first prefill pays for what happens once."""
    session.start([engine.random_prompt(spec["warm_up_tokens"], spec["vocab_size"], 99)])
    session.settle(lambda: True)
    session.stop()


def capacity(session: engine.Session, spec: dict[str, Any]) -> int:
    """Requests that vLLM's pool holds at once, the prompt of the last one dense until the end."""
    size, num_tokens = session.block_size, spec["num_tokens"]
    tail = -(-spec["num_output"] // size) + 2
    _, others = engine.blocks_of_groups(session.other_groups, num_tokens)
    kept = engine.prompt_blocks(session, num_tokens) + tail + others
    return engine.requests_that_fit(session, num_tokens, kept, tail - (-SLACK_TOKENS // size))


def is_compact(session: engine.Session, names: list[str], found: dict[str, Any]) -> bool:
    """Whether the pool holds no more than it should; `found` takes what it holds."""
    if session.options is None:
        return True
    found["kv"] = engine.kv_blocks(session, names)
    return found["kv"]["used"] <= found["kv"]["limit"]


def prefills(session: engine.Session, spec: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Stock needs every prompt of the decode phase; HeteroCache the last one only."""
    wanted = count if session.options is None else spec["prefills"]
    found = []
    for seed in range(wanted):
        names = session.start([prompt(spec, seed)])
        request = session.requests[names[0]]
        while len(request.tokens) < 2:
            session.step()
        sample: dict[str, Any] = {
            "first_token_s": request.first_token_s,
            "second_token_s": request.times[1] - request.submitted,
            "cached_tokens": request.cached_tokens,
        }
        while not is_compact(session, names, sample):
            session.step()
            if len(request.tokens) > spec["num_output"]:
                raise engine.BadResult(f"the prompt is still dense: {sample}")
        sample["released_s"] = request.times[-1] - request.submitted
        session.stop()
        found.append(sample)
    return found


def decode(session: engine.Session, spec: dict[str, Any], count: int) -> dict[str, Any]:
    if session.options is None:
        prompts = [prompt(spec, seed) for seed in range(count)]
    else:
        prompts = [prompt(spec, spec["prefills"] - 1)] * count
    before = without_retrieval(session)
    names = session.start(prompts, spec["num_output"])
    found: dict[str, Any] = {}
    session.settle(lambda: is_compact(session, names, found))
    left = min(spec["num_output"] - len(session.requests[name].tokens) for name in names)
    if len(session.active) < count or left < 32:
        raise engine.BadResult(
            f"{len(session.active)} of {count} requests decode, {left} tokens left"
        )
    found["window"] = session.window(names, left - 8)
    session.finish()
    requests = [session.requests[name] for name in names]
    return {
        **found,
        "tokens": [len(request.tokens) for request in requests],
        "cached_tokens": [request.cached_tokens for request in requests],
        "tokens_per_s": count / found["window"]["token_ms"] * 1e3,
        "elapsed_s": max(r.times[-1] for r in requests) - requests[0].submitted,
        "num_preemptions": session.metrics().get("num_preemptions", 0),
        "requests_without_retrieval": without_retrieval(session) - before,
    }


def without_retrieval(session: engine.Session) -> int:
    """Requests so far that found no room in the host pool."""
    return int(session.metrics().get("requests_without_retrieval", 0))


def cold_run(session: engine.Session, spec: dict[str, Any], count: int) -> dict[str, Any]:
    """All prompts distinct, all submitted at once."""
    before = session.metrics()
    names = [session.submit(prompt(spec, seed), spec["num_output"]) for seed in range(count)]
    session.finish()
    after = session.metrics()
    requests = [session.requests[name] for name in names]
    elapsed = max(r.times[-1] for r in requests) - requests[0].submitted
    return {
        "tokens": [len(request.tokens) for request in requests],
        "cached_tokens": [request.cached_tokens for request in requests],
        "first_token_s": requests[0].first_token_s,
        "elapsed_s": elapsed,
        "tokens_per_s": sum(len(r.tokens) for r in requests) / elapsed,
        "compact_rows": after.get("decode_rows_compact", 0) - before.get("decode_rows_compact", 0),
        "dense_rows": after.get("decode_rows_dense", 0) - before.get("decode_rows_dense", 0),
        "num_preemptions": after.get("num_preemptions", 0),
    }


# --- in the parent ---


def problem(result: dict[str, Any], num_output: int) -> str | None:
    """What is wrong with a result; None if nothing is."""
    phase = result.get("decode") or result["cold"]
    if phase["tokens"] != [num_output] * result["requests"]:
        return f"requests generated {phase['tokens']} tokens instead of {num_output} each"
    if phase["num_preemptions"]:
        return f"{phase['num_preemptions']:.0f} preemptions"
    if any(sample["cached_tokens"] > engine.PAGE for sample in result.get("prefill", ())):
        return "a prompt whose prefill was timed was in the prefix cache"
    if "cold" in result:
        if any(cached > engine.PAGE for cached in phase["cached_tokens"]):
            return "a prompt of the cold run was in the prefix cache"
        # a row may be dense for the step or two between prefill and compaction
        if result["options"] and phase["dense_rows"] > 0.02 * phase["compact_rows"]:
            return f"{phase['dense_rows']:.0f} decode rows were dense"
        return None
    if min(phase["cached_tokens"]) < least_cached(result):
        return f"a prompt of the decode phase was prefilled again: {phase['cached_tokens']}"
    rows, window = phase["window"]["decode_rows"], phase["window"]
    asked = window["num_steps"] * result["requests"]
    if result["options"]:
        if rows["dense"] or abs(rows["compact"] - asked) > 3 * result["requests"]:
            return f"decode rows {rows} instead of {asked} compact ones"
        if not phase["kv"]["used"] <= phase["kv"]["limit"]:
            return f"blocks held: {phase['kv']}"
    return None


def least_cached(result: dict[str, Any]) -> float:
    """Tokens that a prompt finds in the prefix cache if it was prefilled before; with large blocks,
    those before its last block but one."""
    size, num_tokens = result["engine"].get("block_size", engine.PAGE), result["num_tokens"]
    return min(0.9 * num_tokens - 2 * engine.PAGE, num_tokens - 2 * size)


def row_of(args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    row = {
        **engine_runs.engine_row("serving", args, result),
        "drift": args.drift if result["options"] else None,
        "config": {"options": result["options"], "engine": result["engine"]},
        "num_tokens": args.tokens,
        "num_output": args.output,
        "requests": result["requests"],
    }
    if "cold" in result:
        cold = result["cold"]
        row["whole_run_tokens_per_s_measured"] = cold["tokens_per_s"]
        row["first_token_s"] = cold["first_token_s"]
        return row
    samples, phase = result["prefill"], result["decode"]
    prefill = statistics.median(s["second_token_s"] for s in samples)
    whole = result["requests"] * prefill + phase["elapsed_s"]
    return row | {
        "decode_phase_tokens_per_s": phase["tokens_per_s"],
        "whole_run_tokens_per_s_computed": result["requests"] * args.output / whole,
        "prefill_s": prefill,  # median time to the second token
        "prefill_samples": samples,
        "step": phase["window"],
        "decode_elapsed_s": phase["elapsed_s"],
        "kv": phase.get("kv"),
        "requests_without_retrieval": phase["requests_without_retrieval"],
    }


RATIOS = (
    "decode_phase_tokens_per_s",
    "whole_run_tokens_per_s_computed",
    "whole_run_tokens_per_s_measured",
    "prefill_s",
)


def rows_of(args: argparse.Namespace, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each engine, with its ratios to stock's."""
    rows = [row_of(args, result) for result in results]
    stock = next((row for row in rows if row["engine"] == "stock"), {})
    for row in rows:
        row["to_stock"] = {
            name: row[name] / stock[name] for name in RATIOS if name in row and name in stock
        }
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    heads = ["engine", "requests", "no retrieval", "drift"]
    for name in RATIOS:
        if any(name in row for row in rows):
            heads += [name, "to stock"]
    lines = []
    for row in rows:
        without = row.get("requests_without_retrieval")
        line = [row["engine"], row["requests"], without, row["drift"]]
        for name in heads[4::2]:
            line += [row.get(name), row["to_stock"].get(name)]
        lines.append(line)
    print_table(heads, lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = engine_runs.engine_parser(__doc__)
    parser.add_argument("--tokens", type=int, help="prompt tokens; default 128K")
    parser.add_argument("--output", type=int, help="generated tokens of a request; default 512")
    parser.add_argument("--prefills", type=int, default=3, help="HeteroCache's prompts timed")
    parser.add_argument("--most-requests", type=int, default=1 << 30)
    parser.add_argument(
        "--drift", default="off", help="off, real, or a share of triggers (no finders)"
    )
    parser.add_argument("--cold", action="store_true", help="measure the whole run instead")
    args = engine_runs.parse_args(parser, argv)
    # beside recurrent layers no prefix cache holds a prompt that ends with a block
    args.tokens = args.tokens or (1100 if args.tiny else 128 * 1024)
    args.output = args.output or (96 if args.tiny else 512)
    return args


def spec_of(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    options = {"min_prompt_tokens": 256, **engine_runs.drift_options(args.drift)}
    max_model_len = args.tokens + args.output + 1024
    return engine_runs.engine_spec(args, name, folder, max_model_len, **options) | {
        "num_tokens": args.tokens,
        "num_output": args.output,
        "vocab_size": engine_runs.shape_of(args).vocab_size,
        "prefills": args.prefills,
        "most_requests": args.most_requests,
        "warm_up_tokens": min(args.tokens // 2, 16384),
        "cold": args.cold,
        "drift": args.drift,
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results = engine_runs.checked_results(
        args,
        __file__,
        spec_of,
        lambda result: problem(result | {"num_tokens": args.tokens}, args.output),
    )
    rows = rows_of(args, results)
    print_rows(rows)
    append_rows(args.out, "serving.jsonl", rows)


if __name__ == "__main__":
    if "--in-engine" in sys.argv:
        engine.main(measure)
    else:
        main()
