"""A tiny model some layers of which slide over a window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mixed_model
from mixed_model import HEAD_DIM

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = 50


def write(folder: Path) -> str:
    """A Gemma 3, in which all layers have heads of one size."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **mixed_model.COMMON,
        layer_types=mixed_model.layer_types("sliding_attention"),
        sliding_window=WINDOW,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=8,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
    )
    return mixed_model.write(folder, Gemma3ForCausalLM, config)
