"""`heterocache eval` with real engines."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from vllm_heterocache import cli
from vllm_heterocache.evaluation.engine import runner
from vllm_heterocache.evaluation.run_folder import Run, RunFolder, configuration
from vllm_heterocache.evaluation.sample import SuiteSettings

LENGTH, CONTEXTS, FACTS, BUDGET = 2000, 2, 16, 0.3
OUTPUT_TOKENS = 260  # about what 16 questions and answers take
TURNS = 4
CHOICES, CHOICE_LENGTH = 4, 1200  # of LongBench v2's form


@pytest.fixture(scope="module")
def rows(long_model, tmp_path_factory) -> list[dict]:
    """Result rows of stock and of the default recipe: chain, 2K, two contexts."""
    out = tmp_path_factory.mktemp("eval") / "run"
    words = ["eval", long_model, "--suite", "chain", "--lengths", str(LENGTH), "--no-plots"]
    words += ["--samples", str(CONTEXTS), "--gpu-budget", str(BUDGET), "--out", str(out)]
    words += ["--set", f"facts={FACTS}", "--llm", '{"kv_cache_memory_bytes": 1073741824}']
    assert cli.main(words) == 0
    assert cli.main([*words, "--resume"]) == 0, "nothing is left to do"
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def choices(long_model, haystack, tmp_path_factory) -> tuple[list[dict], dict]:
    """Rows of snapkv over a data set of our own and what its engine noted; stock is left out."""
    folder = RunFolder(tmp_path_factory.mktemp("choices"))
    data = folder.path / "data.json"
    data.write_text(json.dumps([choice(haystack, i) for i in range(CHOICES)]))
    settings = SuiteSettings((CHOICE_LENGTH,), CHOICES, tasks=("short",), data=data)
    return answered_by_snapkv(folder, Run(long_model, "longbench_v2", settings, {}, CHOICES))


@pytest.fixture(scope="module")
def turns(long_model, tmp_path_factory) -> tuple[dict, dict]:
    """The row of a chain of four turns, and what its engine noted; stock is left out."""
    folder = RunFolder(tmp_path_factory.mktemp("turns"))
    settings = SuiteSettings((LENGTH,), 1, extra={"facts": TURNS, "turns": True})
    run = Run(long_model, "chain", settings, {"enable_prefix_caching": True}, batch=1)
    (row,), engine = answered_by_snapkv(folder, run)
    return row, engine


def answered_by_snapkv(folder: RunFolder, run: Run) -> tuple[list[dict], dict]:
    """Rows of a small engine, and what it noted."""
    small = {"kv_cache_memory_bytes": 1 << 29, "max_num_batched_tokens": 512}
    folder.begin(replace(run, llm=small | run.llm), resume=False)
    ours = configuration({"policy": "snapkv", "gpu_budget": BUDGET})
    runner.run_in_process(folder, ours, threading.Event())
    return list(folder.rows(ours).values()), folder.engine(ours)


def choice(haystack: str, index: int) -> dict:
    """A row in which a city is named; every second one is too long."""
    cities, name = ("Lisbon", "Cairo", "Lima", "Oslo"), ("Anna", "Boris", "Clara", "David")[index]
    begin, size = 20_000 * (index + 1), (4_000, 9_000)[index % 2]
    text = haystack[begin : begin + size]
    fact = f" {name} lives in {cities[index]}. "
    return {
        "_id": str(index),
        **dict.fromkeys(("domain", "difficulty"), "any"),
        "length": "short",
        "question": f"Where does {name} live?",
        **{f"choice_{letter}": city for letter, city in zip("ABCD", cities, strict=True)},
        "answer": "ABCD"[index],
        "context": text[:1000] + fact + text[1000:],
    }


def test_default_recipe_keeps_stocks_answers(rows, record_property):
    stock, ours = rows
    assert stock["config"] == "stock" and ours["config"] == {"gpu_budget": BUDGET}
    assert stock["units"] == ours["units"] == CONTEXTS * FACTS
    record_property("scores", f"{stock['score']}, {ours['score']}")
    assert stock["score"] >= 0.9 and ours["score"] >= 0.95 * stock["score"]
    assert ours["stock_score"] == stock["score"] and ours["low"] < ours["score"]


def test_resident_share_is_measured(rows):
    """Stock's blocks may be larger than a page; generated tokens stay whole in both."""
    stock, ours = rows
    assert 0.99 < stock["resident"]["share"] < 1.15
    most = (BUDGET * LENGTH + OUTPUT_TOKENS + 32) / (LENGTH + OUTPUT_TOKENS)
    assert BUDGET < ours["resident"]["share"] < most
    assert ours["counters"]["requests_compacted"] == CONTEXTS and ours["resident"]["moments"] > 10
    tables = ours["resident"]["with_tables"] / ours["resident"]["share"]
    kv_bytes, table_bytes = ours["block_bytes"]
    assert tables == pytest.approx(1 + table_bytes / kv_bytes, rel=1e-3) and 1 < tables < 1.1


def test_what_decode_reads_is_measured(rows):
    """Spare pages are held and not read; pages are fetched now and then."""
    stock, ours = rows
    assert stock["reads"] == {}
    assert 0.8 * BUDGET < ours["reads"]["share"] < ours["resident"]["share"]
    assert 0 < ours["reads"]["fetched"] < 1
    # every decode step of the two requests, all heads of the 128K model
    pages = CONTEXTS * (OUTPUT_TOKENS - 60) * (LENGTH // 16) * 90
    assert pages < ours["reads"]["dense_pages"] < 1.5 * pages


def test_choice_of_a_data_set_is_made_in_decode(choices):
    """A forced beginning, then the model's letter; its memory and reading are measured."""
    rows, engine = choices
    assert len(rows) == CHOICES and sum(row["scores"]["cut"] for row in rows) == CHOICES / 2
    for row in rows:
        assert row["text"].startswith("\n\nThe correct answer is (")
        assert row["scores"]["answered"] == 1 and row["prompt_tokens"] <= CHOICE_LENGTH
    assert engine["counters"]["requests_compacted"] == CHOICES
    resident, reads = (engine[name][str(CHOICE_LENGTH)] for name in ("resident", "reads"))
    assert resident["moments"] > 0
    assert BUDGET < reads["share"] < resident["share"] < 1.3 * BUDGET


def test_every_turn_is_compacted_by_its_own_question(turns):
    """With questions in decode snapkv answers few of them but the first."""
    row, engine = turns
    assert engine["counters"]["requests_compacted"] == TURNS
    assert len(row["right"]) == TURNS and sum(row["right"]) >= TURNS - 1
