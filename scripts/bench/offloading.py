#!/usr/bin/env python3
"""Time to the first token of a prompt that the GPU forgot: loaded from the host, or prefilled.

All engines copy prompts to --offloading-gib of host memory, with vLLM's own offloading. Each gets
one request at a time:
1. prefilled: prompts that nothing has cached;
2. cached: the last of them again, from the prefix cache on the GPU;
3. loaded: the same again, each time after the prefix cache on the GPU was emptied.
Nothing is reported if a prompt was prefilled in place of being loaded, or if what was loaded gave
other tokens than what the GPU had. A prefill computes the end of a prompt beside other tokens, so
rounding may let its tokens differ after a while: the row says how many are equal.

    python scripts/bench/offloading.py --run 1 --gpu-budget 0.1 --out FOLDER
    python scripts/bench/offloading.py --run 1 --gpu-budget 0.25 --raw FOLDER     # stock from there

vLLM keeps this memory in /dev/shm, and offloads on GPUs alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from common import engine, engine_runs, profiles
from common.rows import append_rows, print_table
from vllm_heterocache.heads.matched_tokens import REFERENCE_POSITIONS

GIB = 1 << 30
KINDS = ("prefilled", "cached", "loaded")
WARM_UP_TOKENS, WARM_UP_SEED = 16384, 99
LEFT = REFERENCE_POSITIONS + engine.PAGE  # tokens at most that are computed behind a load
PROMPTS_KEPT = 1.25  # on the host: the one that is asked for, and the warm-up's
CAPTURED_SIZES = [1, 2, 4, 8, 16, 160]  # of one request: decode steps, and what a load leaves


# --- in the engine's process ---


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    session = engine.Session(spec)
    warm_up = engine.random_prompt(
        min(WARM_UP_TOKENS, spec["num_tokens"] // 2), spec["vocab_size"], WARM_UP_SEED
    )
    for _ in range(2):  # prefilled, then loaded
        ask(session, warm_up, spec["num_output"])
        session.forget_prompts()
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed in range(spec["prefills"]):
        prompt = engine.random_prompt(spec["num_tokens"], spec["vocab_size"], seed)
        found["prefilled"].append(ask(session, prompt, spec["num_output"]))
    found["cached"].append(ask(session, prompt, spec["num_output"]))
    for _ in range(spec["loads"]):
        session.forget_prompts()
        found["loaded"].append(ask(session, prompt, spec["num_output"]))
    metrics = session.metrics()
    session.close()
    transfers = {name: metrics[name] for name in metrics if name.startswith("kv_offload_load_")}
    compacted = metrics.get("requests_compacted", 0)
    return {
        "engine": session.describe(),
        "asked": found,
        "transfers": transfers,  # vLLM's own counts, of all loads
        "requests_compacted": compacted,
    }


def ask(session: engine.Session, prompt: list[int], num_output: int) -> dict[str, Any]:
    """One request, from its submission to its end."""
    (name,) = session.start([prompt], num_output)
    session.finish()
    request = session.requests[name]
    return {
        "first_token_s": request.first_token_s,
        "second_token_s": request.times[1] - request.submitted,
        "cached_tokens": request.cached_tokens,
        "tokens": request.tokens,
    }


# --- in the parent ---


def problem(result: dict[str, Any], num_tokens: int) -> str | None:
    """What is wrong with a result; None if nothing is."""
    prefilled, (cached,), loaded = (result["asked"][kind] for kind in KINDS)
    if any(sample["cached_tokens"] for sample in prefilled):
        return "a prompt whose prefill was timed was cached"
    for sample in (cached, *loaded):
        if sample["cached_tokens"] < num_tokens - LEFT:
            return (
                f"a prompt of {num_tokens} tokens was prefilled behind the first "
                f"{sample['cached_tokens']}"
            )
    for sample in loaded:
        if sample["tokens"] != cached["tokens"]:
            return f"a loaded prompt gave {sample['tokens']}, and the GPU's {cached['tokens']}"
    asked = len(prefilled) + 1 + len(loaded)
    if result["options"] and result["requests_compacted"] < asked:
        return f"{result['requests_compacted']:.0f} of {asked} prompts were compacted"
    return None


def num_equal(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(one, other, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def row_of(args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    asked = result["asked"]
    times = {
        f"{kind}_s": statistics.median(sample["first_token_s"] for sample in asked[kind])
        for kind in KINDS
    }
    samples = {
        kind: [{name: s[name] for name in s if name != "tokens"} for s in asked[kind]]
        for kind in KINDS
    }
    return {
        **engine_runs.engine_row("offloading", args, result),
        "config": {"options": result["options"], "engine": result["engine"]},
        "drift": args.drift if result["options"] else None,
        "num_tokens": args.tokens,
        "num_output": args.output,
        "offloading_gib": args.offloading_gib,
        **times,  # until the first token
        "loaded_to_prefilled": times["loaded_s"] / times["prefilled_s"],
        "tokens_as_prefilled": num_equal(
            asked["loaded"][0]["tokens"], asked["prefilled"][-1]["tokens"]
        ),
        "samples": samples,
        "transfers": result["transfers"],
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    heads = ["engine", "budget", *(f"{kind} s" for kind in KINDS), "loaded / prefilled"]
    heads += ["tokens loaded", "output as prefilled"]
    lines = []
    for row in rows:
        options = row["config"]["options"] or {}
        lines.append(
            [
                row["engine"],
                options.get("gpu_budget"),
                *(row[f"{kind}_s"] for kind in KINDS),
                row["loaded_to_prefilled"],
                row["samples"]["loaded"][0]["cached_tokens"],
                f"{row['tokens_as_prefilled']} of {row['num_output']}",
            ]
        )
    print_table(heads, lines)


def prompt_gib(shape: profiles.Shape, num_tokens: int, kv_cache_dtype: str) -> float:
    """KV of a prompt."""
    elements = 2 if kv_cache_dtype.startswith("fp8") else 1  # in the bytes of one of the model's
    pages = math.ceil(num_tokens / engine.PAGE) * shape.num_layers * shape.num_kv_heads
    return pages * shape.page_bytes / elements / GIB


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = engine_runs.engine_parser(__doc__)
    parser.set_defaults(engine=["stock", "retrieval"])
    parser.add_argument("--tokens", type=int, default=128 * 1024 + 8, help="of a prompt")
    parser.add_argument("--output", type=int, default=32, help="generated tokens of a request")
    parser.add_argument("--offloading-gib", type=float, help="default: a prompt and a quarter")
    parser.add_argument("--prefills", type=int, default=1, help="prompts that are prefilled")
    parser.add_argument("--loads", type=int, default=3, help="how often the last one is loaded")
    parser.add_argument(
        "--drift", default="off", help="off, real, or a share of triggers (no finders)"
    )
    args = parser.parse_args(argv)
    if args.tiny:
        raise SystemExit("--tiny runs on a CPU, and vLLM offloads from a GPU alone: leave it out")
    if min(args.prefills, args.loads) < 1 or args.output < 2:
        raise SystemExit("--prefills and --loads are 1 or more, --output is 2 or more")
    if args.tokens % engine.PAGE == 0:
        raise SystemExit(
            f"--tokens {args.tokens} ends with a block: stock vLLM would compute 1 token behind a "
            f"load and {engine.PAGE} behind its cache; add a few tokens"
        )
    of_prompt = prompt_gib(engine_runs.shape_of(args), args.tokens, args.kv_cache_dtype)
    args.offloading_gib = args.offloading_gib or math.ceil(PROMPTS_KEPT * of_prompt)
    return args


def spec_of(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    options = {"min_prompt_tokens": 256, **engine_runs.drift_options(args.drift)}
    max_model_len = args.tokens + args.output + 1024
    spec = engine_runs.engine_spec(args, name, folder, max_model_len, **options)
    spec["llm"] |= {
        "kv_offloading_size": args.offloading_gib,
        "compilation_config": {"cudagraph_capture_sizes": CAPTURED_SIZES},
    }
    return spec | {
        "num_tokens": args.tokens,
        "num_output": args.output,
        "vocab_size": engine_runs.shape_of(args).vocab_size,
        "prefills": args.prefills,
        "loads": args.loads,
        "drift": args.drift,
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results = engine_runs.checked_results(
        args, __file__, spec_of, lambda result: problem(result, args.tokens)
    )
    rows = [row_of(args, result) for result in results]
    print_rows(rows)
    append_rows(args.out, "offloading.jsonl", rows)


if __name__ == "__main__":
    if "--in-engine" in sys.argv:
        engine.main(measure)
    else:
        main()
