"""A tiny Llama of random numbers, for what no trained model is needed for, and its completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from engines import Engine, start

from common import profiles

SHAPE = profiles.TINY
MAX_MODEL_LEN = 1000
LENGTHS = (40, 150, 333)  # the first prompt is too short to be compacted
MIN_PROMPT_TOKENS = 64
NUM_TOKENS = 20
SHARPNESS = 8.0  # of the next token's distribution, so that rounding does not decide
NEAR_TIE = 0.1  # of 16-bit numbers, and of activations that are rounded to 8 bits
SETTINGS = {
    "max_model_len": MAX_MODEL_LEN,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
}


def write(folder: Path) -> None:
    """Weights and config.json."""
    profiles.write_weights(SHAPE, folder, {"lm_head": SHARPNESS})


def text_prompts() -> list[list[int]]:
    """Random token ids, one prompt of each length."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, SHAPE.vocab_size, length).tolist() for length in LENGTHS]


def stock_completions(
    model: str, prompts: Sequence[Any], adapters: Sequence[Any] | None = None, **settings: Any
) -> list:
    """Greedy completions of unmodified vLLM; all prompts run at once."""
    with start(model, **(SETTINGS | settings)) as engine:
        return completions(engine, prompts, adapters)


def compacted_completions(
    model: str,
    prompts: Sequence[Any],
    check: Callable[[Engine], None],
    adapters: Sequence[Any] | None = None,
    **settings: Any,
) -> list:
    """The same of this backend, whose engine `check` sees before.

    Every prompt but the short ones is compacted, and every token after the first comes from a
    compacted prompt, or this raises AssertionError.
    """
    options = {"gpu_budget": 1.0, "min_prompt_tokens": MIN_PROMPT_TOKENS}
    with start(model, options, **(SETTINGS | settings)) as engine:
        check(engine)
        found = completions(engine, prompts, adapters)
        metrics = engine.metrics()
    num_compacted = sum(_length(prompt) >= MIN_PROMPT_TOKENS for prompt in prompts)
    assert metrics["requests_compacted{}"] == num_compacted > 0
    rows = num_compacted * (NUM_TOKENS - 1)
    assert metrics["decode_rows{kind=compact,reason=compacted}"] == rows
    return found


def completions(
    engine: Engine,
    prompts: Sequence[Any],
    adapters: Sequence[Any] | None = None,
    on_step: Callable[[Engine, int], None] | None = None,
) -> list:
    """Greedy completions of an engine; all prompts run at once."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, logprobs=2, ignore_eos=True, detokenize=False
    )
    outputs = engine.run(list(prompts), params, on_step, adapters)
    return [outputs[str(i)].outputs[0] for i in range(len(prompts))]


def _length(prompt: Any) -> int:
    return len(prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt)
