"""Retrieval heads of RTPurbo (arXiv 2605.16928), `headwise_config` in a checkpoint's config.json.

A key is a layer, its value a list with 1 for each query head that reads the whole context, and 0
for each that reads the first and the last tokens alone. Other keys are settings of the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection

KEY = "headwise_config"


def retrieval_shares(
    data: dict[str, Any], num_layers: int, num_q_heads: int, num_kv_heads: int
) -> np.ndarray:
    """[L, H] float32 in [0, 1]: the share of each group's query heads that are retrieval heads.

    The maximum over the group would make all groups with a retrieval head equal; the share keeps
    the order of the maximum, and tells these groups apart.

    Args:
        data: content of the config.json.
        num_layers, num_q_heads, num_kv_heads: those of the model.

    Raises:
        ValueError: the lists are not those of such a model.
    """
    lists = data[KEY]
    if not isinstance(lists, dict):
        raise ValueError(f"{KEY} is {type(lists).__name__}, not an object of layers")
    layers = {int(key): flags for key, flags in lists.items() if key.isdecimal()}
    if layers.keys() != set(range(num_layers)):
        raise ValueError(f"{KEY} has {_counted(layers)}, and the model has {num_layers} layers")
    flags = np.array([_flags(layer, layers[layer], num_q_heads) for layer in range(num_layers)])
    grouped = flags.reshape(num_layers, num_kv_heads, num_q_heads // num_kv_heads)
    return grouped.mean(axis=2).astype(np.float32)


def _counted(layers: Collection[int]) -> str:
    return f"{len(layers)} layers, {min(layers)} to {max(layers)}" if layers else "no layers"


def _flags(layer: int, flags: Any, num_q_heads: int) -> list[int]:
    if not isinstance(flags, list) or any(flag not in (0, 1) for flag in flags):
        raise ValueError(f"{KEY} of layer {layer} is {flags!r:.40}, not a list of 0 and 1")
    if len(flags) != num_q_heads:
        raise ValueError(
            f"{KEY} of layer {layer} has {len(flags)} query heads, and the model has {num_q_heads}"
        )
    return flags
