"""A model some layers of which slide over a window: vLLM serves these, and the others are
compacted."""

from __future__ import annotations

import functools
import math
from typing import Any

import churn
import engines
import gpu_scenarios
import pytest
import sliding_model
import test_speculation
from mixed_model import (
    BUDGET,
    FULL,
    NUM_TOKENS,
    OTHER_GROUPS,
    SETTINGS,
    check_full_budget,
    churn_tokens,
    completions,
    options,
    prompts,
    run,
)
from sliding_model import WINDOW

from vllm_heterocache.heads.budget import compact_blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return sliding_model.write(tmp_path_factory.mktemp("sliding"))


@pytest.fixture(scope="module")
def stock(model) -> list[Any]:
    with engines.start(model, None, **SETTINGS) as engine:
        return completions(run(engine, prompts()))


@pytest.mark.feature("Sliding windows beside full attention")
def test_full_budget_gives_the_tokens_of_stock(model, stock):
    check_full_budget(model, stock, SETTINGS, [32, 496, 896])


@pytest.mark.feature("Sliding windows beside full attention")
def test_less_budget_gives_back_blocks_of_the_full_layers(model, stock):
    """One prompt alone, then from the prefix cache, then beside others, then amid churn."""
    longest = prompts()[-1]
    with engines.start(model, options(model, BUDGET), **SETTINGS) as engine:
        total, spec = engine.num_free, engine.manager.kv_cache_spec
        assert engine.worker.kernel_block_bytes() == len(FULL) * spec.page_size_bytes
        assert len(engine.managers) == 1 + OTHER_GROUPS
        (first,) = run(engine, [longest])
        held = total - engine.free_blocks[-2]
        (again,) = run(engine, [longest])
        (short, _, _) = run(engine, prompts())
        assert engine.num_free == total
        metrics = engine.metrics()
        tokens = churn_tokens()
        churned = churn.run(engine, tokens, num_late=12, longest=1600)
    tail = -(-(len(longest) % 16 + NUM_TOKENS) // 16)
    windows = OTHER_GROUPS * (-(-WINDOW // 16) + 1)
    compact = compact_blocks(len(longest), BUDGET)
    assert compact < held <= compact + tail + windows
    assert again.num_cached_tokens == (len(longest) - 128) // 16 * 16
    engines.assert_same_completions(completions([again]), completions([first]))
    assert first.outputs[0].token_ids[0] == stock[2].token_ids[0]
    engines.assert_same_completions(completions([short]), stock[:1])
    assert metrics["requests_compacted{}"] == 4
    assert metrics["pages_offloaded{}"] > 0 and metrics["drift_checks{}"] == 0
    assert churned["has_finders"]
    churn.check(churned)


@pytest.mark.feature("n-gram drafts")
@pytest.mark.parametrize("changes", [{"drift_threshold": 0.0}, {}], ids=["no-finders", "finders"])
def test_ngram_drafts_beside_sliding_layers(model, changes):
    """Finders ask once a step, so the tokens with drafts are others than those without."""
    changed = options(model, BUDGET) | changes
    generate = functools.partial(test_speculation.generate, model, changed, **SETTINGS)
    ours = gpu_scenarios.alone(generate, engines.NGRAM)
    test_speculation.check_drafts(ours)
    assert ours["metrics"]["requests_compacted{}"] == 2 * 3
    half = len(ours["outputs"]) // 2
    first, again = ours["outputs"][:half], ours["outputs"][half:]
    engines.assert_same_completions(again, first)
    logprobs = [position for one in first for position in one.logprobs]
    assert all(math.isfinite(e.logprob) for position in logprobs for e in position.values())
    if changes:
        without = generate(None)
        engines.assert_same_completions(ours["outputs"], without["outputs"])
    else:
        assert ours["metrics"]["pages_fetched{}"] > 0
