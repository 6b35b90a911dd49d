"""Which layers are served, by a model's config."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_heterocache.compat.layer_kinds import (
    mixes_recurrent_layers,
    mixes_sliding_layers,
    num_recurrent_layers,
    served_layers,
)

SLIDING, FULL = "sliding_attention", "full_attention"


def model_config(num_layers: int, window: int | None, kinds: list[str] | None):
    text = SimpleNamespace() if kinds is None else SimpleNamespace(layer_types=kinds)
    return SimpleNamespace(
        hf_text_config=text,
        get_sliding_window=lambda: window,
        get_total_num_hidden_layers=lambda: num_layers,
    )


@pytest.mark.parametrize(
    ("window", "kinds", "served"),
    [
        (None, None, [0, 1, 2, 3]),
        (None, [FULL] * 4, [0, 1, 2, 3]),
        (9, [SLIDING, FULL] * 2, [1, 3]),
        (9, [SLIDING, SLIDING, SLIDING, "global"], [3]),
        (None, [SLIDING, FULL] * 2, [0, 1, 2, 3]),  # --disable-sliding-window
        (9, [SLIDING] * 4, [0, 1, 2, 3]),  # refused elsewhere
        (9, [SLIDING, FULL] * 3, [1, 3]),  # kinds of layers that are not there
    ],
)
def test_layers_with_full_attention_are_served_where_others_slide(window, kinds, served):
    config = model_config(4, window, kinds)
    assert served_layers(config) == served
    assert mixes_sliding_layers(config) == (len(served) < 4)
    assert not mixes_recurrent_layers(config)


@pytest.mark.parametrize(
    ("kinds", "served"),
    [
        (["linear_attention", "linear_attention", "full_attention", "linear_attention"], [2]),
        (["conv", "full_attention"] * 2, [1, 3]),
        (["mamba", "mlp", "attention", "moe"], [2]),
        (["linear_attention"] * 4, [0, 1, 2, 3]),  # refused elsewhere
    ],
)
@pytest.mark.parametrize("name", ["layer_types", "layers_block_type"])
def test_layers_with_full_attention_are_served_beside_recurrent_ones(kinds, served, name):
    config = model_config(4, None, None)
    setattr(config.hf_text_config, name, kinds)
    assert served_layers(config) == served
    assert mixes_recurrent_layers(config) == (len(served) < 4)
    assert not mixes_sliding_layers(config)
    assert num_recurrent_layers(config) == sum(
        kind in ("linear_attention", "conv", "mamba") for kind in kinds
    )
