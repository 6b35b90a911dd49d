"""Tiny models of random numbers, some layers of which slide over a window, and their profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_heterocache.heads.profile import LEAD_LAYERS, HeadProfile, ModelIdentity

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = 50
KINDS = ("sliding_attention", "sliding_attention", "full_attention") * 2
FULL = (2, 5)
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCABULARY = 8, 4, 64, 499
SHARPNESS = 8.0  # of the next token's distribution, so that rounding does not decide
# In which all layers have heads of one size, and four slide for two that do not.
COMMON: dict[str, Any] = {
    "layer_types": list(KINDS),
    "num_hidden_layers": len(KINDS),
    "sliding_window": WINDOW,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": NUM_Q_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # attention must matter
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


def write(folder: Path, seed: int = 0) -> str:
    """A Gemma 3 with weights, and a profile of its layers with full attention, `profile.json`."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, query_pre_attn_scalar=HEAD_DIM))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(SHARPNESS)
    model.save_pretrained(folder)
    profile().save(folder / "profile.json")
    return str(folder)


def profile() -> HeadProfile:
    """Of no measurement: no two heads score alike, and near layers resemble each other."""
    shape = len(FULL), NUM_KV_HEADS
    similarity = np.full((1 + LEAD_LAYERS, *shape, NUM_KV_HEADS), np.nan, np.float32)
    similarity[0], similarity[1, 0] = 0.9, 0.8
    return HeadProfile(
        ModelIdentity(
            "tiny-gemma", "Gemma3ForCausalLM", len(FULL), NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM,
            layers=FULL,
        ),
        {},
        {"source": "tests; not measured on any model"},
        retrieval=np.float32([[7, 8, 6, 5], [3, 1, 4, 2]]) / 8,
        similarity=similarity,
    )  # fmt: skip
