"""`heterocache eval` and `heterocache reproduce` with real engines."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from engines import DTYPE, GIB, spare_collections

from vllm_heterocache.commands import cli
from vllm_heterocache.evaluation.engine import worker
from vllm_heterocache.evaluation.run_folder import Run, RunFolder, configuration
from vllm_heterocache.evaluation.sample import SuiteSettings

LENGTH, CONTEXTS, FACTS, BUDGET = 2000, 2, 8, 0.3
OUTPUT_TOKENS = 130  # about what 8 questions and answers take
TURNS = 4
TASKS = Path(__file__).parents[1] / "evaluation" / "lm_eval_tasks"
CHOICE_LENGTH = 3000  # tokens, more than a row of hidden_city has
SMALL_ENGINE = {"dtype": DTYPE, "kv_cache_memory_bytes": GIB}


@pytest.fixture(scope="module")
def rows(long_model, tmp_path_factory) -> list[dict]:
    """Result rows of stock and of the default recipe: the small chain of `reproduce`."""
    out = tmp_path_factory.mktemp("reproduce") / "run"
    words = ["reproduce", long_model, "--small", "--parts", "chain", "--no-plots"]
    words += ["--gpu-budget", str(BUDGET), "--out", str(out), "--llm", json.dumps(SMALL_ENGINE)]
    assert cli.main(words) == 0
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def choice(long_model, tmp_path_factory) -> tuple[dict, dict]:
    """A row of snapkv over a task of lm-eval and what its engine noted; stock is left out."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `eval`)")
    folder = RunFolder(tmp_path_factory.mktemp("choices"))
    settings = SuiteSettings((CHOICE_LENGTH,), 1, tasks=("hidden_city",), data=TASKS)
    with contextlib.chdir(TASKS.parents[2]):
        return answered_by_snapkv(folder, Run(long_model, "lm_eval", settings, {}, batch=1))


@pytest.fixture(scope="module")
def turns(long_model, tmp_path_factory) -> tuple[dict, dict]:
    """The row of a chain of four turns, and what its engine noted; stock is left out."""
    folder = RunFolder(tmp_path_factory.mktemp("turns"))
    settings = SuiteSettings((LENGTH,), 1, extra={"facts": TURNS, "turns": True})
    run = Run(long_model, "chain", settings, {"enable_prefix_caching": True}, batch=1)
    return answered_by_snapkv(folder, run)


def answered_by_snapkv(folder: RunFolder, run: Run) -> tuple[dict, dict]:
    """The row of a small engine in this process, and what it noted."""
    from vllm.distributed import cleanup_dist_env_and_memory

    small = {**SMALL_ENGINE, "max_num_batched_tokens": 512}
    run = replace(run, llm=small | run.llm)
    folder.begin(run, resume=False)
    ours = configuration({"policy": "snapkv", "gpu_budget": BUDGET})
    tokenizer = worker.load_tokenizer(run.model, run.llm)
    spare_collections()
    worker.run_configuration(folder, ours, tokenizer, worker.open_vllm)
    cleanup_dist_env_and_memory()
    (row,) = folder.rows(ours).values()
    return row, folder.engine(ours)


def test_default_recipe_keeps_stocks_answers(rows, record_property):
    stock, ours = rows
    assert stock["length"] == LENGTH and stock["samples"] == CONTEXTS
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


def test_host_memory_and_time_are_measured(rows):
    """All pages of finders are on the host, and no page of what is generated."""
    stock, ours = rows
    offloaded = ours["counters"]["pages_offloaded"] / (CONTEXTS * (LENGTH // 16) * 90)
    least = offloaded * LENGTH / (LENGTH + OUTPUT_TOKENS + 32)
    assert least < ours["resident"]["host"] < 1.01 * offloaded and stock["resident"]["host"] == 0
    assert ours["steps"]["steps"] > 100 and ours["steps"]["median_ms"] > 0


def test_what_decode_reads_is_measured(rows):
    """Finders have no spare pages: all that is held is read. Pages are fetched now and then."""
    stock, ours = rows
    assert stock["reads"] == {}
    assert ours["reads"]["share"] == pytest.approx(ours["resident"]["share"], rel=0.01)
    assert 0 < ours["reads"]["fetched"] < 1
    # every decode step of the two requests, all heads of the 128K model
    pages = CONTEXTS * (OUTPUT_TOKENS - 30) * (LENGTH // 16) * 90
    assert pages < ours["reads"]["dense_pages"] < 1.5 * pages


def test_choice_of_a_task_of_lm_eval_is_made_in_decode(choice):
    """A forced question, then the model's letter; its memory and reading are measured."""
    row, engine = choice
    assert row["text"].startswith("\n\nWhere does ")
    assert row["scores"]["answered"] == 1 and row["scores"]["cut"] == 0
    assert 2000 < row["prompt_tokens"] < CHOICE_LENGTH
    assert engine["counters"]["requests_compacted"] == 1
    resident, reads = (engine[name][str(CHOICE_LENGTH)] for name in ("resident", "reads"))
    assert resident["moments"] > 0
    assert BUDGET < reads["share"] < resident["share"] < 1.3 * BUDGET


def test_every_turn_is_compacted_by_its_own_question(turns):
    """With questions in decode snapkv answers few of them but the first."""
    row, engine = turns
    assert engine["counters"]["requests_compacted"] == TURNS
    assert len(row["right"]) == TURNS and sum(row["right"]) >= TURNS - 1
