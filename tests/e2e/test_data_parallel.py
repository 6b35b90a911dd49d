"""`vllm serve --data-parallel-size 2`: each engine compacts its own requests and counts them once.

vLLM starts two API servers then, and its offline API refuses data parallelism for dense models.
"""

from __future__ import annotations

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import parallel
import pytest
from api_server import metric, serve, stock_metric
from engines import DTYPE, GREEDY_TOKENS, assert_same_greedy_tokens, run_greedy

from vllm_heterocache.heads.budget import compact_blocks

ENGINES = range(2)
NUM_BLOCKS = 300
HEADS = 16  # of all layers
WAIT_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return parallel.write_model(tmp_path_factory.mktemp("two-engines"), "float32")


@pytest.fixture(scope="module")
def options(model) -> dict:
    """Nothing is fetched: tokens do not depend on when."""
    return parallel.options(model, parallel.BUDGET, drift_threshold=0)


@pytest.fixture(scope="module")
def expected(model, options) -> list:
    """Completions of each engine's prompts by a single engine in this process."""
    with parallel.start(model, options, tensor_parallel_size=1) as engine:
        return [run_greedy(engine, parallel.prompts(seed)) for seed in ENGINES]


@pytest.fixture(scope="module")
def server(model, options, expected, tmp_path_factory):
    with serve(
        model,
        tmp_path_factory.mktemp("server") / "log",
        *("--additional-config", json.dumps({"heterocache": options})),
        *("--data-parallel-size", str(len(ENGINES)), "--skip-tokenizer-init", "--dtype", DTYPE),
        *("--max-model-len", "2048", "--max-num-batched-tokens", "256", "--max-num-seqs", "8"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--num-gpu-blocks-override", str(NUM_BLOCKS)),
        # six processes instead of eight: engines that have no worker process beside them
        *("--distributed-executor-backend", "uni"),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    ) as url:
        yield url


@pytest.fixture(scope="module")
def complete(server):
    """`complete(engine, prompt, ...)`: a completion by the engine of that index."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none", timeout=600)

    def run(engine: int, prompt: list[int], max_tokens: int, **kwargs):
        return client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            extra_headers={"X-data-parallel-rank": str(engine)},
            extra_body={"return_token_ids": True, "ignore_eos": True, "detokenize": False},
            **kwargs,
        )

    return run


def of_engine(engine: int, name: str, **labels: str) -> str:
    """Pattern of the samples of one engine; vLLM prints the labels in alphabetical order."""
    pairs = sorted({"engine": str(engine), **labels}.items())
    return name + "{[^}]*" + "[^}]*".join(f'{label}="{value}"' for label, value in pairs)


@pytest.mark.feature("Data parallelism", "OpenAI server, completions", "Prometheus metrics")
def test_tokens_and_counters_are_each_engines_own(server, complete, expected):
    jobs = [(e, p) for e in ENGINES for p in parallel.prompts(e)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        replies = list(pool.map(lambda job: complete(*job, GREEDY_TOKENS), jobs))
    wanted = [one for engine in ENGINES for one in expected[engine]]
    compared = 0
    for reply, one in zip(replies, wanted, strict=True):
        tokens = reply.choices[0].model_extra["token_ids"]
        compared += assert_same_greedy_tokens(tokens, one)
    assert compared > 0.6 * GREEDY_TOKENS * len(wanted)

    compacted = len(parallel.LENGTHS) - 1
    rows = GREEDY_TOKENS - 1  # the first token comes from the prefill
    for engine in ENGINES:
        assert metric(server, of_engine(engine, "requests_compacted_total")) == compacted
        for kind, count in (("compact", compacted * rows), ("dense", rows)):
            pattern = of_engine(engine, "decode_rows_total", kind=kind)
            assert metric(server, pattern) == count
        read, dense = (
            metric(server, of_engine(engine, f"decode_pages_{name}_total"))
            for name in ("read", "dense")
        )
        assert 0 < read < 0.6 * dense
    # and no sample of a third source
    assert metric(server, "requests_compacted_total") == compacted * len(ENGINES)


@pytest.mark.feature("Data parallelism", "OpenAI server, streamed answers")
def test_each_engine_gives_its_own_prompts_memory_back(server, complete):
    length, num_tokens = 1500, 500
    prompt = [(7 * i) % 499 for i in range(length)]
    kept = compact_blocks(length, parallel.BUDGET)
    most = kept + 1 + -(-num_tokens // 16)
    assert most < length // 16, "longer answers would hide what was given back"
    for engine in ENGINES:
        with contextlib.closing(complete(engine, prompt, num_tokens, stream=True)) as stream:
            next(iter(stream))
            wait_for(lambda e=engine: compact_pages(server, e) == kept * HEADS)
            # the prompt's own blocks go when the scheduler hears of the compaction
            wait_for(lambda e=engine: kept < used_blocks(server, e) <= most)
            assert compact_pages(server, 1 - engine) == 0
        wait_for(lambda e=engine: compact_pages(server, e) == 0)
    for engine in ENGINES:
        assert used_blocks(server, engine) == 0


def used_blocks(server: str, engine: int) -> float:
    """Blocks of vLLM's pool that the requests of an engine hold."""
    usage = stock_metric(server, of_engine(engine, "kv_cache_usage_perc"))
    return usage * (NUM_BLOCKS - 1)


def compact_pages(server: str, engine: int) -> float:
    """Pages of the compact blocks of an engine, spare ones included."""
    return sum(
        metric(server, of_engine(engine, "pages", kind=kind)) for kind in ("compact", "spare")
    )


def wait_for(condition) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
