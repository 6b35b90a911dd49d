"""Tiny models of random numbers, some layers of which vLLM serves beside those that are compacted:
their folders and profiles, and what their tests ask of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import churn
import engines
import numpy as np

from vllm_heterocache.heads.profile import LEAD_LAYERS, HeadProfile, ModelIdentity

if TYPE_CHECKING:
    from pathlib import Path

NUM_LAYERS, FULL = 6, (2, 5)  # a third of them with full attention
NUM_KV_HEADS, HEAD_DIM, VOCABULARY = 4, 64, 499
SHARPNESS = 8.0  # of the next token's distribution, so that rounding does not decide
OTHER_GROUPS = 2  # of two layers, as many as have full attention
COMMON: dict[str, Any] = {
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": NUM_KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # attention must matter
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}

MIN_PROMPT, BUDGET, NUM_TOKENS = 128, 0.3, 24
LENGTHS = (40, 500, 901)  # the first one stays dense
SETTINGS = {
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
}


def layer_types(other: str) -> list[str]:
    """Two layers of another kind before each with full attention."""
    return [other, other, "full_attention"] * (NUM_LAYERS // 3)


def write(
    folder: Path,
    model_class: Any,
    config: Any,
    sharpened: str = "lm_head.weight",
    embedding_scale: float = 1.0,
) -> str:
    """A model with weights, and a profile of its layers with full attention, `profile.json`.

    Args:
        sharpened: the weights that logits are proportional to.
        embedding_scale: of the embeddings; where it is large, a token often has one successor.
    """
    import torch

    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        model.get_parameter(sharpened).mul_(SHARPNESS)
        model.get_input_embeddings().weight.mul_(embedding_scale)
    model.save_pretrained(folder)
    profile(model_class.__name__, config.num_attention_heads).save(folder / "profile.json")
    return str(folder)


def profile(architecture: str, num_q_heads: int) -> HeadProfile:
    """Of no measurement: no two heads score alike, and near layers resemble each other."""
    shape = len(FULL), NUM_KV_HEADS
    similarity = np.full((1 + LEAD_LAYERS, *shape, NUM_KV_HEADS), np.nan, np.float32)
    similarity[0], similarity[1, 0] = 0.9, 0.8
    return HeadProfile(
        ModelIdentity(
            "tiny-mixed", architecture, len(FULL), num_q_heads, NUM_KV_HEADS, HEAD_DIM, layers=FULL
        ),
        {},
        {"source": "tests; not measured on any model"},
        retrieval=np.float32([[7, 8, 6, 5], [3, 1, 4, 2]]) / 8,
        similarity=similarity,
    )


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


def churn_tokens() -> list[int]:
    return np.random.default_rng(1).integers(1, VOCABULARY, 70000).tolist()


def run(engine, some: list[list[int]], adapters: list[Any] | None = None) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=2
    )
    outputs = engine.run(some, params, adapters=adapters)
    return [outputs[str(index)] for index in range(len(some))]


def completions(outputs: list[Any]) -> list[Any]:
    return [output.outputs[0] for output in outputs]


def check_full_budget(
    model: str,
    stock: list[Any],
    settings: dict[str, Any],
    cached: list[int],
    near_tie: float = engines.NEAR_TIE,
) -> None:
    """A budget of 1 gives stock's tokens, all prompts at once, and again from the prefix cache of
    all groups, which holds `cached` tokens of each prompt."""
    with engines.start(model, options(model, 1.0), **settings) as engine:
        total = engine.num_free
        first, again = run(engine, prompts()), run(engine, prompts())
        assert engine.num_free == total
        metrics = engine.metrics()
        layers = engine.llm.collective_rpc("heterocache_head_roles")[0][0]
    engines.assert_same_completions(completions(first), stock, near_tie)
    engines.assert_same_completions(completions(again), stock, near_tie)
    assert [output.num_cached_tokens for output in again] == cached
    assert metrics["requests_compacted{}"] == 2 * 2
    assert metrics[churn.COMPACT] == 2 * 2 * (NUM_TOKENS - 1)
    assert layers == list(FULL)
