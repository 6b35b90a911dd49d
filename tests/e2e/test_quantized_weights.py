"""Weights and activations of 8 bits: the tokens of stock vLLM with the same checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_llama
import torch
from engines import Engine, assert_same_completions
from tiny_llama import NEAR_TIE

# kind of number -> dtype, largest number, vLLM's class
KINDS = {
    "int": (torch.int8, 127, "CompressedTensorsW8A8Int8"),
    "float": (torch.float8_e4m3fn, 448, "CompressedTensorsW8A8Fp8"),
}
NUMBER = {"num_bits": 8, "symmetric": True}


@pytest.fixture
def quantize(tmp_path) -> Callable[[str], str]:
    """`quantize(kind)` writes a checkpoint in the format of compressed-tensors: a scale for each
    output channel, and activations with a scale for each token."""
    from safetensors.torch import load_file, save_file

    def quantize(kind: str) -> str:
        tiny_llama.write(tmp_path)
        dtype, largest, _ = KINDS[kind]
        file = tmp_path / "model.safetensors"
        weights = load_file(file)
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            scale = weights[name].abs().amax(1, keepdim=True) / largest
            scaled = weights[name] / scale
            weights[name] = (scaled if dtype.is_floating_point else scaled.round()).to(dtype)
            weights[f"{name}_scale"] = scale
        save_file(weights, file, {"format": "pt"})
        _declare(tmp_path / "config.json", kind)
        return str(tmp_path)

    return quantize


def _declare(config_file: Path, kind: str) -> None:
    linear = {
        "targets": ["Linear"],
        "weights": {**NUMBER, "type": kind, "strategy": "channel", "dynamic": False},
        "input_activations": {**NUMBER, "type": kind, "strategy": "token", "dynamic": True},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": linear},
        "ignore": ["lm_head"],
    }
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "int", marks=pytest.mark.feature("int8 weights and activations (W8A8)"), id="int8"
        ),
        pytest.param("float", marks=pytest.mark.feature("fp8 weights"), id="fp8"),
    ],
)
def test_greedy_tokens_are_those_of_stock(quantize, kind):
    def check(engine: Engine) -> None:
        layer = engine.worker.model_runner.model.model.layers[0]
        for linear in (layer.self_attn.qkv_proj, layer.mlp.down_proj):
            assert type(linear.scheme).__name__ == KINDS[kind][2]

    model, prompts = quantize(kind), tiny_llama.text_prompts()
    stock = tiny_llama.stock_completions(model, prompts)
    ours = tiny_llama.compacted_completions(model, prompts, check)
    assert_same_completions(ours, stock, NEAR_TIE)
