"""Which layers of a model have full attention, and what the others have, by the model's config."""

from __future__ import annotations

from typing import Any

FULL_ATTENTION_KINDS = ("full_attention", "attention", "global")
SLIDING_KIND = "sliding_attention"
# Layers with a state of one size instead of KV: gated delta nets, Mamba, short convolutions.
RECURRENT_KINDS = ("linear_attention", "mamba", "conv")
KINDS_WITHOUT_CACHE = ("mlp", "moe")


def layer_kinds(model_config: Any) -> set[str]:
    """Kinds of attention in the model, by the names of its config (`layer_types`).

    Without a window (`--disable-sliding-window`) layers that would slide have full attention.
    """
    window = model_config.get_sliding_window()
    kinds = set(_layer_types(model_config) or ())
    if not kinds:
        kinds = {FULL_ATTENTION_KINDS[0] if window is None else SLIDING_KIND}
    if window is None:
        kinds.discard(SLIDING_KIND)
    return kinds


def mixes_sliding_layers(model_config: Any) -> bool:
    """Whether some layers slide over a window and others have full attention."""
    kinds = layer_kinds(model_config)
    return SLIDING_KIND in kinds and not kinds.isdisjoint(FULL_ATTENTION_KINDS)


def mixes_recurrent_layers(model_config: Any) -> bool:
    """Whether some layers are recurrent and others have full attention."""
    kinds = layer_kinds(model_config)
    return not kinds.isdisjoint(RECURRENT_KINDS) and not kinds.isdisjoint(FULL_ATTENTION_KINDS)


def num_recurrent_layers(model_config: Any) -> int:
    """Layers of the model with a state instead of KV."""
    return sum(kind in RECURRENT_KINDS for kind in _layer_types(model_config) or ())


def served_layers(model_config: Any) -> list[int]:
    """Indices of the layers that HeteroCache serves: all of a model whose layers are of one kind,
    else those with full attention."""
    layers = range(model_config.get_total_num_hidden_layers())
    if not (mixes_sliding_layers(model_config) or mixes_recurrent_layers(model_config)):
        return list(layers)
    kinds = _layer_types(model_config) or ()
    return [index for index in layers if kinds[index] in FULL_ATTENTION_KINDS]


def _layer_types(model_config: Any) -> Any:
    """The kind of each layer, where the config tells them."""
    text = model_config.hf_text_config
    return getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
