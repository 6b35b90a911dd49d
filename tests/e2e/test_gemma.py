"""A real model some layers of which slide over a window; skipped where it was not built."""

from __future__ import annotations

import engines
import pytest

from vllm_heterocache.evaluation.haystacks import prose

NUM_TOKENS, LENGTH = 12, 1025
SETTINGS = {"max_model_len": 2048, "max_num_batched_tokens": 512}
OPTIONS = {"gpu_budget": 1.0, "min_prompt_tokens": 64}


@pytest.fixture(scope="module")
def prompt(gemma_model) -> list[int]:
    """A piece of prose, longer than a window."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma_model)
    return tokenizer.encode(prose())[:LENGTH]


def test_full_budget_gives_the_tokens_of_stock(gemma_model, prompt):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
    outputs = []
    for options in (None, OPTIONS):
        with engines.start(gemma_model, options, **SETTINGS) as engine:
            outputs.append(engine.run([prompt], params)["0"].outputs[0])
            if options is not None:
                assert engine.metrics()["requests_compacted{}"] == 1
    stock, ours = outputs
    engines.assert_same_completions([ours], [stock])
