"""The 128K test model with one more KV head, so that two ranks can share its heads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch


def write_model(source: str, folder: Path) -> str:
    """Copy a Llama, and give every layer its first group of heads once more.

    Nothing reads what the new group attends to: its columns of the output projection are zero. So
    the copy computes what the source does, and the new heads look like others to calibration.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((Path(source) / "config.json").read_text())
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    kv_rows, query_rows = config["head_dim"], group * config["head_dim"]
    config["num_attention_heads"] += group
    config["num_key_value_heads"] += 1
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(Path(source) / "model.safetensors")
    for name, weight in tensors.items():
        if "q_proj" in name:
            tensors[name] = torch.cat([weight, weight[:query_rows]])
        elif "k_proj" in name or "v_proj" in name:
            tensors[name] = torch.cat([weight, weight[:kv_rows]])
        elif "o_proj" in name:
            nothing = torch.zeros_like(weight[:, :query_rows])
            tensors[name] = torch.cat([weight, nothing], dim=1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)
