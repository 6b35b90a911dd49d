"""A model some layers of which slide over a window: vLLM serves these, and the others are
compacted."""

from __future__ import annotations

from typing import Any

import churn
import engines
import numpy as np
import pytest
import sliding_model
from sliding_model import FULL, VOCABULARY, WINDOW

from vllm_heterocache.heads.budget import compact_blocks

MIN_PROMPT, BUDGET, NUM_TOKENS = 128, 0.3, 24
LENGTHS = (40, 500, 901)  # the first one stays dense
SETTINGS = {
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
}
SLIDING_GROUPS = 2  # of two layers, as many as have full attention


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return sliding_model.write(tmp_path_factory.mktemp("sliding"))


def options(model: str, gpu_budget: float) -> dict[str, Any]:
    return {
        "gpu_budget": gpu_budget,
        "min_prompt_tokens": MIN_PROMPT,
        "profile": f"{model}/profile.json",
        "cpu_pool_gib": 0.125,
        "debug_poison": True,
    }


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCABULARY, length).tolist() for length in LENGTHS]


def run(engine, some: list[list[int]]) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=2
    )
    outputs = engine.run(some, params)
    return [outputs[str(index)] for index in range(len(some))]


def completions(outputs: list[Any]) -> list[Any]:
    return [output.outputs[0] for output in outputs]


@pytest.fixture(scope="module")
def stock(model) -> list[Any]:
    with engines.start(model, None, **SETTINGS) as engine:
        return completions(run(engine, prompts()))


@pytest.mark.feature("Sliding windows beside full attention")
def test_full_budget_gives_the_tokens_of_stock(model, stock):
    """All at once, and again from the prefix cache of all groups."""
    with engines.start(model, options(model, 1.0), **SETTINGS) as engine:
        total = engine.num_free
        first, again = run(engine, prompts()), run(engine, prompts())
        assert engine.num_free == total
        metrics = engine.metrics()
        layers = engine.llm.collective_rpc("heterocache_head_roles")[0][0]
    engines.assert_same_completions(completions(first), stock)
    engines.assert_same_completions(completions(again), stock)
    assert [output.num_cached_tokens for output in again] == [32, 496, 896]
    assert metrics["requests_compacted{}"] == 2 * 2
    assert metrics[churn.COMPACT] == 2 * 2 * (NUM_TOKENS - 1)
    assert layers == list(FULL)


@pytest.mark.feature("Sliding windows beside full attention")
def test_less_budget_gives_back_blocks_of_the_full_layers(model, stock):
    """One prompt alone, then from the prefix cache, then beside others, then amid churn."""
    longest = prompts()[-1]
    with engines.start(model, options(model, BUDGET), **SETTINGS) as engine:
        total, spec = engine.num_free, engine.manager.kv_cache_spec
        assert engine.worker.kernel_block_bytes() == len(FULL) * spec.page_size_bytes
        assert len(engine.managers) == 1 + SLIDING_GROUPS
        (first,) = run(engine, [longest])
        held = total - engine.free_blocks[-2]
        (again,) = run(engine, [longest])
        (short, _, _) = run(engine, prompts())
        assert engine.num_free == total
        metrics = engine.metrics()
        tokens = np.random.default_rng(1).integers(1, VOCABULARY, 70000).tolist()
        churned = churn.run(engine, tokens, num_late=12, longest=1600)
    tail = -(-(len(longest) % 16 + NUM_TOKENS) // 16)
    windows = SLIDING_GROUPS * (-(-WINDOW // 16) + 1)
    compact = compact_blocks(len(longest), BUDGET)
    assert compact < held <= compact + tail + windows
    assert again.num_cached_tokens == 896
    assert first.outputs[0].token_ids[0] == again.outputs[0].token_ids[0] == stock[2].token_ids[0]
    engines.assert_same_completions(completions([short]), stock[:1])
    assert metrics["requests_compacted{}"] == 4
    assert metrics["pages_offloaded{}"] > 0 and metrics["drift_checks{}"] > 0
    churn.check(churned)
