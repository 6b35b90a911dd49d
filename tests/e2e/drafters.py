"""Drafters of random weights for the model of `parallel.write_model`, and a model that brings its
own (MTP)."""

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

MIMO_CONFIG = """
from transformers import Qwen2Config


class MiMoConfig(Qwen2Config):
    model_type = "mimo"
"""


def write_draft_model(model: str, folder: Path, num_layers: int = 3) -> dict[str, Any]:
    """The model's first layers: a draft model that is often right and often wrong."""
    kept = {
        name: weights
        for name, weights in load_file(f"{model}/model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < num_layers
    }
    _write(folder, SHAPE.config() | {"num_hidden_layers": num_layers}, kept)
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
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
    }
    _write(folder, config, _random(shapes))
    return {"method": "eagle3", "model": str(folder)}


def write_mimo(folder: Path) -> str:
    """The model of `parallel.write_model` as a MiMo, with one layer for MTP. A MiMo's heads divide
    its hidden size."""
    hidden = SHAPE.num_q_heads * SHAPE.head_dim
    parallel.write_model(folder, SHAPE.dtype, hidden_size=hidden)
    weights = load_file(folder / "model.safetensors")
    heads = {"q": SHAPE.num_q_heads, "k": SHAPE.num_kv_heads, "v": SHAPE.num_kv_heads}
    layer = "model.mtp_layers.0."
    shapes = _layer(layer, hidden, hidden) | {
        f"{layer}input_proj.weight": (hidden, 2 * hidden),
        **{f"{layer}{name}_layernorm.weight": (hidden,) for name in ("token", "hidden", "final")},
    }
    prefixes = [layer, *(f"model.layers.{index}." for index in range(SHAPE.num_layers))]
    biases = {
        f"{prefix}self_attn.{name}_proj.bias": torch.zeros(count * SHAPE.head_dim)
        for prefix in prefixes
        for name, count in heads.items()
    }
    config = SHAPE.config() | {
        "architectures": ["MiMoForCausalLM"],
        "hidden_size": hidden,
        "model_type": "mimo",
        "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"},
        "num_nextn_predict_layers": 1,
    }
    _write(folder, config, weights | _random(shapes) | biases)
    (folder / "configuration_mimo.py").write_text(MIMO_CONFIG)
    return str(folder)


def _layer(prefix: str, num_inputs: int, hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder layer whose attention takes so many inputs."""
    queries, keys = (n * SHAPE.head_dim for n in (SHAPE.num_q_heads, SHAPE.num_kv_heads))
    inner = SHAPE.intermediate_size
    shapes = {
        "self_attn.q_proj": (queries, num_inputs),
        "self_attn.k_proj": (keys, num_inputs),
        "self_attn.v_proj": (keys, num_inputs),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
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
