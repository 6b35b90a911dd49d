"""Gate tables of DuoAttention (arXiv 2410.10819), `full_attention_heads.tsv`.

A row is a layer, a column a KV head. A gate is trained: 1 leaves the head's attention whole, 0
leaves it the first and the last tokens alone.
"""

from __future__ import annotations

import numpy as np

# The last training step may overshoot: published gates reach -0.0014. DuoAttention clips them too.
OVERSHOOT = 0.05


def read_gates(text: str) -> np.ndarray:
    """[L, H] float32 in [0, 1]: the gate of every KV head.

    Raises ValueError for what is no table of gates.
    """
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if not rows:
        raise ValueError("it is empty")
    gates = np.array([_layer(i, row, len(rows[0])) for i, row in enumerate(rows)], np.float32)
    return np.clip(gates, 0, 1)


def _layer(layer: int, row: list[str], num_kv_heads: int) -> list[float]:
    if len(row) != num_kv_heads:
        raise ValueError(f"layer {layer} has {len(row)} values, and layer 0 has {num_kv_heads}")
    return [_gate(layer, head, word) for head, word in enumerate(row)]


def _gate(layer: int, head: int, word: str) -> float:
    try:
        gate = float(word)
    except ValueError:
        gate = float("nan")
    if not -OVERSHOOT <= gate <= 1 + OVERSHOOT:
        raise ValueError(f"layer {layer}, KV head {head} has {word!r:.40}, not a gate from 0 to 1")
    return gate
