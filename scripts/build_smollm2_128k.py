#!/usr/bin/env python3
"""Build SmolLM2-135M-128K, a small real long-context model, as a Hugging Face folder.

usage: build_smollm2_128k.py OUT_DIR      (a minute on a CPU; needs transformers, gguf, accelerate)

The base is SmolLM2-135M-Instruct as build_smollm2.py reads it: Llama architecture, 30 layers, 9
query and 3 KV heads of 64, 8192 tokens of context. A RoPE base of 8e6 and a LoRA adapter (rank 32,
alpha 64, all seven projections) extend it to 131,072 tokens. train_long_context.py made the
adapter: 20 minutes on one H200, on facts hidden in prose or noise and on prose. Facts that
training never saw, 16 in a context, greedy, full attention, answers that are right in every token:

    tokens                      4096   32768   131072
    asked at the end, prose     64/64  64/64   64/64
    asked at the end, noise     64/64  64/64   64/64
    listed in order, prose      64/64  64/64   64/64
"""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import TYPE_CHECKING

from build_smollm2 import build, download_gguf, load, plain_model, save

if TYPE_CHECKING:
    import torch

ADAPTER = Path(__file__).resolve().parent / "data" / "smollm2-128k-lora.safetensors.xz"
ROPE_THETA, MAX_TOKENS = 8e6, 131072
SCALE = 2.0  # alpha / rank


def read_adapter(path: Path = ADAPTER) -> dict[str, torch.Tensor]:
    """bf16 factors: `X.lora_A.weight` [rank, in] and `X.lora_B.weight` [out, rank] of each X."""
    from safetensors.torch import load as tensors_of

    return tensors_of(lzma.decompress(path.read_bytes()))


def merge(weights: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor]) -> None:
    """Add the adapter to fp32 `weights`, in place."""
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            b = adapter[name.replace("lora_A", "lora_B")]
            weights[name.replace(".lora_A.weight", ".weight")] += SCALE * (b.float() @ a.float())


def long_context(settings: dict) -> dict:
    """The settings of a config.json for contexts of MAX_TOKENS."""
    settings = settings | {"max_position_embeddings": MAX_TOKENS}
    if settings.get("rope_parameters"):
        settings["rope_parameters"] = settings["rope_parameters"] | {"rope_theta": ROPE_THETA}
    else:
        settings["rope_theta"] = ROPE_THETA
    return settings


def convert(gguf: Path, out: Path) -> None:
    """Dequantise `gguf` to bf16, merge the adapter in fp32, and write the model to `out`."""
    import torch

    loaded, tokenizer = load(gguf, torch.float32)
    weights = {name: w.to(torch.bfloat16).float() for name, w in loaded.state_dict().items()}
    merge(weights, read_adapter())
    save(plain_model(loaded, weights, long_context), tokenizer, out)


if __name__ == "__main__":
    build(__doc__, download_gguf, convert)
