"""Gemma 3 270M, a real model most layers of which slide over a window. It has one KV head.

The three layers with full attention alone are compacted. The model is weak at finding facts, so
answers are compared with stock vLLM's over all of them.
"""

from __future__ import annotations

from typing import Any

import engines
import pytest
from engines import chain_engine, num_right, run_chains

from vllm_heterocache.calibration.calibrate import BUNDLED_TEXT, calibrate
from vllm_heterocache.evaluation.chain import Chain, make_chain
from vllm_heterocache.heads.budget import compact_blocks

LENGTH, NUM_FACTS, NUM_CHAINS, BUDGET = 1500, 6, 2, 0.3
NUM_TURNS = 3
CALIBRATION_TOKENS = 1033
SETTINGS = {"enable_prefix_caching": True}


@pytest.fixture(scope="module")
def chains(gemma_model) -> list[Chain]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma_model)
    text = BUNDLED_TEXT.read_text()  # the same with every Python, as so weak a model depends on it
    return [
        make_chain(tokenizer, text[10000 * i :], LENGTH, NUM_FACTS, seed=i)
        for i in range(NUM_CHAINS)
    ]


@pytest.fixture(scope="module")
def profile(gemma_model, tmp_path_factory) -> str:
    """File of what a third of the default prompts measures, cut to half of the default length."""
    file = tmp_path_factory.mktemp("calibrated") / "profile.json"
    settings = {"dtype": engines.DTYPE, "enforce_eager": True, "kv_cache_memory_bytes": engines.GIB}
    settings["max_model_len"] = CALIBRATION_TOKENS
    engines.spare_collections()
    calibrate(gemma_model, samples=1, llm_kwargs=settings, progress=False).save(file)
    return str(file)


def converse(engine: Any, chain: Chain) -> dict[str, Any]:
    """The first questions of a chain as turns: each prompt is the one before, its right answer and
    the next question. Completions of all turns, the last one's tokens, and the blocks that it holds
    while it decodes."""
    from vllm import SamplingParams

    prompt, completions = list(chain.prompt), []
    free = engine.num_free
    ends = [*chain.positions[1:], len(chain.forced)]
    for turn in range(NUM_TURNS):
        answer = chain.answers[turn]
        params = SamplingParams(
            temperature=0.0, max_tokens=len(answer), ignore_eos=True, logprobs=2
        )
        completions.append(engine.run([prompt], params)["0"].outputs[0])
        length = len(prompt)
        asked_next = chain.forced[chain.positions[turn] + len(answer) : ends[turn]]
        prompt += answer + asked_next
    return {"turns": completions, "length": length, "held": free - engine.free_blocks[-2]}


def ask(
    model: str, options: dict[str, Any] | None, first: Chain, chains: list[Chain]
) -> dict[str, Any]:
    """Answers of a conversation about the first chain and then of all chains."""
    with chain_engine(model, options, **SETTINGS) as engine:
        found = converse(engine, first)
        assert engine.llm.reset_prefix_cache()
        found["outputs"] = run_chains(engine, chains) if chains else []
        return found | {"metrics": {} if options is None else engine.metrics()}


@pytest.fixture(scope="module")
def stock(gemma_model, chains) -> dict[str, Any]:
    return ask(gemma_model, None, chains[0], chains)


@pytest.fixture(scope="module")
def full(gemma_model, chains) -> dict[str, Any]:
    return ask(gemma_model, {"gpu_budget": 1.0, "min_prompt_tokens": 64}, chains[0], [])


def right_turns(chain: Chain, turns: list[Any]) -> list[bool]:
    answers = chain.answers[:NUM_TURNS]
    return [list(turn.token_ids) == answer for turn, answer in zip(turns, answers, strict=True)]


@pytest.mark.feature("Sliding windows beside full attention")
def test_full_budget_gives_the_tokens_of_stock(stock, full):
    engines.assert_same_completions(full["turns"], stock["turns"])
    assert full["metrics"]["requests_compacted{}"] == NUM_TURNS


@pytest.mark.feature("Sliding windows beside full attention")
def test_less_budget_keeps_the_answers_of_stock_and_gives_blocks_back(
    gemma_model, chains, profile, stock, full, record_property
):
    options = {"gpu_budget": BUDGET, "min_prompt_tokens": 64, "profile": profile}
    ours = ask(gemma_model, options, chains[0], chains)
    right, of_stock = (num_right(chains, found["outputs"]) for found in (ours, stock))
    turns, of_stock_turns = (right_turns(chains[0], found["turns"]) for found in (ours, stock))
    record_property("right", f"{right} of {of_stock}, turns {sum(turns)} of {sum(of_stock_turns)}")
    assert of_stock >= 0.5 * NUM_CHAINS * NUM_FACTS, "the model cannot do this"
    assert right >= 0.8 * of_stock
    assert sum(turns) >= sum(of_stock_turns) - 1
    metrics = ours["metrics"]
    assert metrics["requests_compacted{}"] == NUM_TURNS + NUM_CHAINS
    assert metrics["decode_pages_read{}"] < (BUDGET + 0.05) * metrics["decode_pages_dense{}"]
    # Blocks of the sliding layers are the same in both. A dense prompt holds a block for each page.
    given_back = ours["length"] // 16 - compact_blocks(ours["length"], BUDGET)
    assert abs(full["held"] - ours["held"] - given_back) <= 1
