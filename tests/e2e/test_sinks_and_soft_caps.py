"""Tiny models of random numbers whose softmax is not the plain one: a Granite with attention sinks
and a Gemma 2 with soft-capped logits. Layers have full attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_llama
import torch
from engines import NEAR_TIE, ON_GPU, assert_same_completions
from tiny_llama import SHAPE

SETTINGS = {"dtype": "bfloat16" if ON_GPU else "float32"}
ROUNDING = tiny_llama.NEAR_TIE if ON_GPU else NEAR_TIE
SOFT_CAP = 2.0


def write_granite(folder: Path) -> None:
    """The tiny Llama, with a sink for each query head; some outweigh all tokens."""
    from safetensors.torch import load_file, save_file

    tiny_llama.write(folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for layer in range(SHAPE.num_layers):
        sinks = 3 + 3 * torch.randn(SHAPE.num_q_heads, generator=generator)
        weights[f"model.layers.{layer}.self_attn.sinks"] = sinks
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_sinks": True,
        "attention_multiplier": SHAPE.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_gemma2(folder: Path) -> None:
    """Random weights, under which logits exceed the cap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_q_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        query_pre_attn_scalar=SHAPE.head_dim,
        max_position_embeddings=SHAPE.max_tokens,
        layer_types=["full_attention"] * SHAPE.num_layers,
        attn_logit_softcapping=SOFT_CAP,
        final_logit_softcapping=None,
        initializer_range=0.2,
        architectures=["Gemma2ForCausalLM"],
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)


def has_sinks(engine) -> None:
    sinks = engine.runtime.ops.memory.sink_logits
    assert sinks.shape == (SHAPE.num_layers, SHAPE.num_q_heads) and sinks.std() > 1


def has_cap(engine) -> None:
    assert engine.runtime.rank.geometry.soft_cap == SOFT_CAP


@pytest.mark.parametrize(
    ("write", "check"),
    [
        pytest.param(
            write_granite, has_sinks, id="sinks", marks=pytest.mark.feature("Attention sinks")
        ),
        pytest.param(
            write_gemma2, has_cap, id="soft-cap", marks=pytest.mark.feature("Soft-capped logits")
        ),
    ],
)
def test_greedy_tokens_are_those_of_stock(write, check, tmp_path):
    write(tmp_path)
    prompts = tiny_llama.text_prompts()
    stock = tiny_llama.stock_completions(str(tmp_path), prompts, **SETTINGS)
    ours = tiny_llama.compacted_completions(str(tmp_path), prompts, check, **SETTINGS)
    assert_same_completions(ours, stock, ROUNDING)
