"""LoRA adapters of random numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

RANK = 8


def write(folder: Path, model: str) -> Any:
    """vLLM's LoRARequest of an adapter, in PEFT's format, for all projections of attention.

    Args:
        model: folder of the model, whose weights are in one file.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    generator = torch.Generator().manual_seed(7)
    weights, projections = {}, set()
    with safe_open(f"{model}/model.safetensors", "pt") as stored:
        for name in sorted(stored.keys()):
            found = re.fullmatch(r"(.*self_attn\.(\w+_proj))\.weight", name)
            if found is None:
                continue
            width_out, width_in = stored.get_slice(name).get_shape()
            first = torch.randn(RANK, width_in, generator=generator) / width_in**0.5
            second = torch.randn(width_out, RANK, generator=generator) / RANK**0.5
            weights[f"base_model.model.{found[1]}.lora_A.weight"] = first
            weights[f"base_model.model.{found[1]}.lora_B.weight"] = second
            projections.add(found[2])
    save_file(weights, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted(projections),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return LoRARequest("adapter", 1, str(folder))
