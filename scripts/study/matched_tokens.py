#!/usr/bin/env python3
"""Simulates what evicted tokens leave behind: nothing, means, or matched tokens.

    python scripts/study/matched_tokens.py MODEL --profile FILE --lengths 4096 --budgets 0.1 0.05 \
        --methods pages means matched matched,share=0.25 --texts 2 --wordings station --out DIR

The model is a folder of the Llama shape; no engine starts. Roles, page budgets, protected pages and
page scores are the engine's, of recipe `retrieval`. Nothing is fetched back but by methods with a
`fetch`. Every method reads as many tokens a head. Of each prompt's continuation the next-token
distributions are compared with full attention's, as in suite `fidelity`; of each chain, as in suite
`chain`, the answers are greedy, with the right answers to earlier questions before them. The first
question is left out. `nll` is the mean negative log-likelihood of the right answers, in nats an
answer: it also tells methods apart that give the same answers.
A row per text, budget and method goes to DIR/matched_tokens_simulation.jsonl.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import torch
from compact_heads import Compactor, KeptHead, Method, Prompt, whole_caches
from retrieval import RetrievingReader
from simulated_model import CacheReader, SimulatedModel

from common.rows import append_rows, print_table
from vllm_heterocache.evaluation.chain import WORDINGS, make_chain
from vllm_heterocache.evaluation.haystacks import piece, prose
from vllm_heterocache.evaluation.provenance import provenance, rounded
from vllm_heterocache.evaluation.sample import FREE
from vllm_heterocache.evaluation.suites.chain import CHARACTERS_PER_TOKEN
from vllm_heterocache.heads.profile import HeadProfile

ROWS = "matched_tokens_simulation.jsonl"
# What matched tokens stand for is fitted near the prompt's end, so that the KL far behind is noted.
LAST_TOKENS = 128
HEADS = [
    "tokens",
    "budget",
    "method",
    "texts",
    "KL",
    "KL of last",
    "top-1",
    "right",
    "asked",
    "NLL",
]


class Text(NamedTuple):
    """A prompt and the tokens behind it; answers by their place among these tokens."""

    name: str
    index: int  # which piece of the haystack; decides what is random
    prompt: list[int]
    tokens: list[int]
    answers: dict[int, list[int]]  # empty for prose


def prose_text(tokenizer: Any, length: int, index: int, num_tokens: int) -> Text:
    """A piece of the haystack and what follows it."""
    needed = length + num_tokens
    part = piece(prose(), index, CHARACTERS_PER_TOKEN * needed)
    ids = tokenizer.encode(part, add_special_tokens=False)[:needed]
    return Text("prose", index, ids[:length], ids[length:], {})


def chain_text(tokenizer: Any, length: int, index: int, wording: str, facts: int) -> Text:
    """Facts in a piece of the haystack, and questions with their right answers."""
    part = piece(prose(), index, CHARACTERS_PER_TOKEN * length)
    chain = make_chain(tokenizer, part, length, facts, index, WORDINGS[wording])
    tokens = list(chain.forced)
    for start, answer in zip(chain.positions, chain.answers, strict=True):
        tokens[start : start + len(answer)] = answer
    assert FREE not in tokens
    later = dict(zip(chain.positions[1:], chain.answers[1:], strict=True))
    return Text(wording, index, chain.prompt, tokens, later)


def compare(text: Text, full: torch.Tensor, mine: torch.Tensor) -> dict[str, float]:
    """Numbers of one text, from log-probabilities [tokens, vocabulary]."""
    if not text.answers:
        kl = (full.exp() * (full - mine)).sum(-1)
        top1 = (full.argmax(-1) == mine.argmax(-1)).float()
        last = kl[-LAST_TOKENS:].mean()
        return {"kl": float(kl.mean()), "kl_of_last": float(last), "top1": float(top1.mean())}
    greedy = mine.argmax(-1).tolist()  # greedy[i] follows token i
    right = [
        greedy[start - 1 : start - 1 + len(answer)] == answer
        for start, answer in text.answers.items()
    ]
    nll = [
        -float(mine[torch.arange(start - 1, start - 1 + len(answer)), answer].sum())
        for start, answer in text.answers.items()
    ]
    return {"right": sum(right), "asked": len(right), "nll": sum(nll) / len(nll)}


def simulate(
    model: SimulatedModel,
    profile: HeadProfile,
    texts: list[Text],
    budgets: list[float],
    methods: list[Method],
) -> Iterator[dict[str, Any]]:
    """A row for every text, budget and method; a budget below the floor is left out."""
    for text in texts:
        prompt = Prompt(model, model.prefill(text.prompt), text.index)
        length = len(text.prompt)
        full = model.follow(text.tokens, length, CacheReader(whole_caches(prompt)))
        yield _row(text, 1.0, "full") | compare(text, full, full)
        for budget in budgets:
            # by what is left behind and the pages that are set aside
            kept: dict[tuple[Method, int], list[list[KeptHead]]] = {}
            for method in methods:
                started = time.monotonic()
                try:
                    compactor = Compactor.of(profile, budget, method.full_share)
                    alone = method.without_retrieval(), compactor.spares(prompt, method)
                    if alone not in kept:
                        kept[alone] = compactor.keep(prompt, method)
                except ValueError as error:
                    print(f"left out: {error}", flush=True)
                    continue
                fitted = time.monotonic()
                reader = RetrievingReader(prompt, compactor, method, kept[alone])
                mine = model.follow(text.tokens, length, reader)
                row = _row(text, budget, str(method)) | compare(text, full, mine)
                row["pages_a_token"] = reader.fetched / len(text.tokens)
                seconds = {"fit_seconds": fitted - started, "seconds": time.monotonic() - fitted}
                yield row | seconds


def _row(text: Text, budget: float, method: str) -> dict[str, Any]:
    config = {"gpu_budget": budget, "method": method}
    return {"text": text.name, "index": text.index, "tokens": len(text.prompt), "config": config}


def table(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """A line per length, budget and method: texts, mean KL and top-1, answers right, all asked,
    their mean NLL."""
    groups: dict[tuple, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        groups[row["tokens"], *row["config"].values()].append(row)
    lines = []
    for key, group in groups.items():
        texts = [row for row in group if "kl" in row]
        means = [
            sum(row[name] for row in texts) / len(texts) if texts else None
            for name in ("kl", "kl_of_last", "top1")
        ]
        counts = [sum(row.get(name, 0) for row in group) for name in ("right", "asked")]
        asked = counts[1]
        nll = sum(row["nll"] * row["asked"] for row in group if "nll" in row)
        lines.append([*key, len(texts), *means, *counts, nll / asked if asked else None])
    return lines


def method_of(text: str) -> Method:
    """`Method.parse`, whose errors argparse would hide."""
    try:
        return Method.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--methods ")) from None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a model of the Llama shape")
    parser.add_argument("--profile", required=True, help="made by `heterocache calibrate`")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.1, 0.05])
    parser.add_argument(
        "--methods",
        type=method_of,
        nargs="+",
        default=[Method(kind) for kind in ("pages", "means", "matched")],
    )
    parser.add_argument("--texts", type=int, default=2, help="of prose")
    parser.add_argument("--first-text", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=128, help="that follow each text")
    parser.add_argument("--wordings", nargs="*", default=[], choices=sorted(WORDINGS))
    parser.add_argument("--chains", type=int, default=1, help="of each wording")
    parser.add_argument("--first-chain", type=int, default=0)
    parser.add_argument("--facts", type=int, default=32, help="of each chain")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="folder that the rows are appended in")
    return parser.parse_args(arguments)


def texts_of(args: argparse.Namespace, tokenizer: Any, length: int) -> list[Text]:
    wanted = range(args.first_text, args.first_text + args.texts)
    texts = [prose_text(tokenizer, length, index, args.tokens) for index in wanted]
    for wording in args.wordings:
        for index in range(args.first_chain, args.first_chain + args.chains):
            texts.append(chain_text(tokenizer, length, index, wording, args.facts))
    return texts


def main() -> None:
    from transformers import AutoTokenizer

    args = parse_arguments()
    model = SimulatedModel(args.model, args.device, getattr(torch, args.dtype))
    profile = HeadProfile.load(args.profile)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    made_by = {"benchmark": "matched_tokens_simulation"} | provenance()
    made_by |= {"model": Path(args.model).name, "dtype": args.dtype}
    rows = []
    for length in args.lengths:
        texts = texts_of(args, tokenizer, length)
        for row in simulate(model, profile, texts, args.budgets, args.methods):
            print(json.dumps(rounded(row)), flush=True)
            append_rows(args.out, ROWS, [made_by | row])
            rows.append(row)
    print_table(HEADS, table(rows))


if __name__ == "__main__":
    main()
