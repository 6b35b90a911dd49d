"""Drafters: a model's own first layers, EAGLE heads for the model of `parallel.write_model`, and a
model that brings its own (MTP)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import parallel
import torch
from safetensors.torch import load_file, save_file

from common import profiles

SHAPE = profiles.TINY
HIDDEN, VOCABULARY = SHAPE.hidden_size, SHAPE.vocab_size
NUM_DRAFTS = 3
MTP = {"method": "mtp", "num_speculative_tokens": NUM_DRAFTS}


def write_draft_model(model: str, folder: Path, num_layers: int = 3) -> dict[str, Any]:
    """The model's first layers: a draft model that is often right and often wrong."""
    kept = {
        name: weights
        for name, weights in load_file(f"{model}/model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < num_layers
    }
    config = json.loads((Path(model) / "config.json").read_text())
    _write(folder, config | {"num_hidden_layers": num_layers}, kept)
    return {"method": "draft_model", "model": str(folder)}


def write_eagle(model: str, folder: Path) -> dict[str, Any]:
    shapes = _layer("layers.0.", HIDDEN) | {"fc.weight": (HIDDEN, 2 * HIDDEN)}
    del shapes["layers.0.input_layernorm.weight"]
    _write(folder, SHAPE.config() | {"num_hidden_layers": 1}, _random(shapes))
    return {"method": "eagle", "model": str(folder)}


def write_eagle3(model: str, folder: Path) -> dict[str, Any]:
    shapes = _layer("midlayer.", 2 * HIDDEN) | {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        "midlayer.hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    config = SHAPE.config() | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": VOCABULARY,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }
    _write(folder, config, _random(shapes))
    return {"method": "eagle3", "model": str(folder)}


def write_mimo(folder: Path) -> str:
    """The model of `parallel.write_model` as a MiMo, whose MTP layer is the model's first layer
    over the last token alone: drafts that are sometimes right.

    A MiMo's heads divide its hidden size.
    """
    hidden = SHAPE.num_q_heads * SHAPE.head_dim
    parallel.write_model(folder, SHAPE.dtype, hidden_size=hidden)
    weights = load_file(folder / "model.safetensors")
    layer, first = "model.mtp_layers.0.", "model.layers.0."
    mtp = {
        name.replace(first, layer): tensor.clone()
        for name, tensor in weights.items()
        if name.startswith(first)
    }
    mtp |= {f"{layer}{name}_layernorm.weight": torch.ones(hidden) for name in ("hidden", "final")}
    mtp[f"{layer}token_layernorm.weight"] = torch.full((hidden,), 0.1)  # as large as embeddings
    mtp[f"{layer}input_proj.weight"] = torch.eye(hidden, 2 * hidden).roll(hidden, 1)
    heads = {"q": SHAPE.num_q_heads, "k": SHAPE.num_kv_heads, "v": SHAPE.num_kv_heads}
    prefixes = [layer, *(f"model.layers.{index}." for index in range(SHAPE.num_layers))]
    biases = {
        f"{prefix}self_attn.{name}_proj.bias": torch.zeros(count * SHAPE.head_dim)
        for prefix in prefixes
        for name, count in heads.items()
    }
    config = SHAPE.config() | {
        "architectures": ["MiMoForCausalLM"],
        "hidden_size": hidden,
        "model_type": "qwen2",  # so that no code comes with it
        "num_nextn_predict_layers": 1,
    }
    _write(folder, config, weights | mtp | biases)
    return str(folder)


def _layer(prefix: str, num_inputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder layer whose attention takes so many inputs."""
    queries, keys = (n * SHAPE.head_dim for n in (SHAPE.num_q_heads, SHAPE.num_kv_heads))
    inner = SHAPE.intermediate_size
    shapes = {
        "self_attn.q_proj": (queries, num_inputs),
        "self_attn.k_proj": (keys, num_inputs),
        "self_attn.v_proj": (keys, num_inputs),
        "self_attn.o_proj": (HIDDEN, queries),
        "mlp.gate_proj": (inner, HIDDEN),
        "mlp.up_proj": (inner, HIDDEN),
        "mlp.down_proj": (HIDDEN, inner),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random matrices; norms of ones."""
    generator = torch.Generator().manual_seed(3)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape)
        return 0.1 * torch.randn(shape, generator=generator)

    return {name: tensor(shape) for name, shape in shapes.items()}


def _write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
