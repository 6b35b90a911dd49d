"""Finders in an engine: pages come for them alone, and all goes back."""

from __future__ import annotations

import tiny_llama
from engines import start

from common import profiles

BUDGET = 0.5


def test_finders_fetch_within_their_budget(tmp_path):
    """Every invariant is checked after every step."""
    tiny_llama.write(tmp_path)
    profile = tmp_path / "retrieval.json"
    profiles.retrieval_profile(tiny_llama.SHAPE).save(profile)
    options = {
        "profile": str(profile),
        "gpu_budget": BUDGET,
        "min_prompt_tokens": tiny_llama.MIN_PROMPT_TOKENS,
        "finder_share": 0.3,
        "matched_share": 0.5,
    }
    prompts = tiny_llama.text_prompts()
    with start(str(tmp_path), options, **tiny_llama.SETTINGS) as engine:
        free, roles = engine.num_free, engine.runtime.rank.assignment
        completions = tiny_llama.completions(engine, prompts)
        metrics = engine.metrics()
        assert engine.num_free == free
    assert len(roles.finders) == max(1, round(0.3 * roles.num_heads)) == roles.num_led
    assert all(len(one.token_ids) == tiny_llama.NUM_TOKENS for one in completions)
    assert metrics["requests_compacted{}"] == 1, "the others are too short for this budget"
    assert metrics["drift_checks{}"] == 0, "finders look in every step"
    assert metrics["pages_fetched{}"] > 0
