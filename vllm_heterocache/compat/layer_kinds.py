"""Which layers of a model have full attention, and which slide over a window, by its config."""

from __future__ import annotations

from typing import Any

FULL_ATTENTION_KINDS = ("full_attention", "attention", "global")
SLIDING_KIND = "sliding_attention"


def layer_kinds(model_config: Any) -> set[str]:
    """Kinds of attention in the model, by the names of its config (`layer_types`).

    Without a window (`--disable-sliding-window`) layers that would slide have full attention.
    """
    window = model_config.get_sliding_window()
    kinds = set(getattr(model_config.hf_text_config, "layer_types", None) or ())
    if not kinds:
        kinds = {FULL_ATTENTION_KINDS[0] if window is None else SLIDING_KIND}
    if window is None:
        kinds.discard(SLIDING_KIND)
    return kinds


def mixes_sliding_layers(model_config: Any) -> bool:
    """Whether some layers slide over a window and others have full attention."""
    kinds = layer_kinds(model_config)
    return SLIDING_KIND in kinds and not kinds.isdisjoint(FULL_ATTENTION_KINDS)


def served_layers(model_config: Any) -> list[int]:
    """Indices of the layers that HeteroCache serves: all of a model without sliding windows, else
    those with full attention."""
    layers = range(model_config.get_total_num_hidden_layers())
    if not mixes_sliding_layers(model_config):
        return list(layers)
    kinds = model_config.hf_text_config.layer_types
    return [index for index in layers if kinds[index] in FULL_ATTENTION_KINDS]
