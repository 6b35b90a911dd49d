"""gpu_budget=1: the whole machinery runs, and the answers are stock vLLM's."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import request_options
from engines import (
    NEAR_TIE,
    assert_same_completions,
    assert_same_greedy_tokens,
    chain_engine,
    run_chains,
    run_greedy,
)
from request_options import CITIES, NO_PENALTY, NUM_BEAMS, PENALTIES

COMPACTED = "requests_compacted{}"
COMPACT_ROWS = "decode_rows{kind=compact,reason=compacted}"


@pytest.fixture(scope="module")
def engine(model, stock):
    from vllm.config import KVEventsConfig

    options = {"gpu_budget": 1.0, "min_prompt_tokens": 64}
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    with chain_engine(model, options, kv_events_config=events) as engine:
        yield engine


@pytest.mark.feature(
    "Chunked prefill",
    "KV cache of the model's dtype",
    "V1 model runner",
    "Eager mode",
    "Full attention",
)
def test_greedy_tokens_equal_stock_in_a_mixed_chunked_batch(engine, stock, mixed_prompts):
    free_before = engine.num_free
    outputs = run_greedy(engine, mixed_prompts)
    assert_same_completions(outputs, stock.greedy)
    metrics = engine.metrics()
    assert metrics["requests_compacted{}"] == len(mixed_prompts) - 1  # one is under 64 tokens
    assert metrics["decode_rows{kind=compact,reason=compacted}"] > 0
    assert metrics["decode_rows{kind=dense,reason=short_prompt}"] > 0
    assert engine.num_free == free_before


@pytest.mark.feature("Prefix caching")
def test_prefix_hit_on_given_back_blocks_changes_nothing(engine, stock, mixed_prompts):
    """The prompts of the test above were compacted and freed; their hashed blocks still serve."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2, ignore_eos=True)
    first = engine.run(mixed_prompts[4:5], params)["0"]
    again = engine.run(mixed_prompts[4:5], params)["0"]
    assert again.num_cached_tokens >= len(mixed_prompts[4]) - 16
    assert_same_greedy_tokens(first.outputs[0].token_ids, stock.greedy[4])
    assert_same_greedy_tokens(again.outputs[0].token_ids, stock.greedy[4])


@pytest.mark.feature("Custom logits processors")
def test_forced_chain_answers_equal_stock(long_model, engine, stock, chain):
    (output,) = run_chains(engine, [chain])
    assert chain.correct(output) == chain.correct(stock.chain)


# --- options of requests ---


@pytest.fixture
def count(engine) -> Callable[[], dict[str, float]]:
    """`count()`: what the engine counted since the test began, without what stayed as it was."""
    before = engine.metrics()

    def since() -> dict[str, float]:
        moved = {name: n - before.get(name, 0) for name, n in engine.metrics().items()}
        return {name: n for name, n in moved.items() if n and not name.startswith("pages{")}

    return since


@pytest.fixture
def ask(engine, count, text_tokens):
    """`ask(*names)`: outputs of these requests of request_options.py, all of them compacted."""

    def ask(*names: str) -> dict:
        asked = request_options.requests(text_tokens)
        outputs = request_options.answer(engine, {name: asked[name] for name in names})
        counted = count()
        rows = sum(len(one.outputs[0].token_ids) - 1 for one in outputs.values())
        assert counted[COMPACTED] == len(names) and counted[COMPACT_ROWS] >= rows > 0
        assert not [name for name in counted if "kind=dense" in name]
        return outputs

    return ask


def assert_answers_equal(outputs: dict, stock: dict) -> None:
    """Of requests with options, up to near ties of what stock chose by."""
    ours, theirs = ([of[name].outputs[0] for name in outputs] for of in (outputs, stock))
    assert_same_completions(ours, theirs)


@pytest.mark.feature("Log-probabilities of prompt tokens")
def test_log_probabilities_of_a_prompt_equal_stock(ask, stock):
    outputs = ask("prompt_logprobs")
    assert_answers_equal(outputs, stock.options)
    ours, theirs = (of["prompt_logprobs"] for of in (outputs, stock.options))
    tokens = ours.prompt_token_ids
    assert len(ours.prompt_logprobs) == len(theirs.prompt_logprobs) == len(tokens)
    assert ours.prompt_logprobs[0] is None  # nothing comes before the first token
    for position in range(1, len(tokens)):
        mine, expected = (
            one.prompt_logprobs[position][tokens[position]].logprob for one in (ours, theirs)
        )
        assert abs(mine - expected) <= NEAR_TIE, position


@pytest.mark.feature("Penalties")
def test_penalties_change_tokens_as_in_stock(ask, stock):
    outputs = ask(NO_PENALTY, *PENALTIES)
    assert_answers_equal(outputs, stock.options)
    plain = outputs[NO_PENALTY].outputs[0].token_ids
    assert all(outputs[name].outputs[0].token_ids != plain for name in PENALTIES)


@pytest.mark.feature("Structured output")
def test_structured_outputs_keep_to_their_grammar_as_in_stock(ask, stock):
    outputs = ask("json", "choice")
    assert_answers_equal(outputs, stock.options)
    request_options.assert_follows_schema(json.loads(outputs["json"].outputs[0].text))
    assert outputs["choice"].outputs[0].text in CITIES


@pytest.mark.feature("Beam search")
def test_beams_are_those_of_stock(engine, stock, text_tokens, count):
    """Each token of a beam is the first token of a request of its own, which ends before its prompt
    would be compacted."""
    beams = request_options.beams(engine, request_options.beam_prompt(text_tokens))
    assert len(beams) == len(stock.beams) == NUM_BEAMS
    for ours, theirs in zip(beams, stock.beams, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.cum_logprob == pytest.approx(theirs.cum_logprob, abs=NEAR_TIE)
    assert count() == {}


# --- KV events ---


@pytest.mark.feature("KV events")
def test_kv_events_name_the_blocks_of_the_prefix_cache(engine, text_tokens, count, monkeypatch):
    """Prompts of compacted requests stay in the cache. What they generate is no prefix of others,
    and compact blocks hold no prefix."""
    from vllm import SamplingParams

    batches = []
    monkeypatch.setattr(engine.scheduler.kv_event_publisher, "publish", batches.append)
    assert engine.llm.reset_prefix_cache()
    prompts = [text_tokens(15000, 307), text_tokens(17000, 40)]
    params = SamplingParams(temperature=0.0, max_tokens=35, ignore_eos=True)
    outputs = engine.run(prompts, params)
    counted = count()
    assert counted[COMPACTED] == 1 and counted[COMPACT_ROWS] == 34

    cached = {}  # hash of a block -> hash of the block before it, and tokens
    for event in [event for batch in batches for event in batch.events]:
        kind = type(event).__name__
        if kind == "AllBlocksCleared":
            cached.clear()
        elif kind == "BlockRemoved":
            for block_hash in event.block_hashes:
                del cached[block_hash]
        else:
            before, size = event.parent_block_hash, event.block_size
            for index, block_hash in enumerate(event.block_hashes):
                cached[block_hash] = before, event.token_ids[index * size : (index + 1) * size]
                before = block_hash
    is_parent = {before for before, _ in cached.values()}
    chains = []
    for block_hash in cached.keys() - is_parent:
        tokens = []
        while block_hash is not None:
            block_hash, part = cached[block_hash]
            tokens = [*part, *tokens]
        chains.append(tokens)
    dense = [*prompts[1], *outputs["1"].outputs[0].token_ids]
    assert sorted(chains) == sorted([prompts[0][:304], dense[:64]])
