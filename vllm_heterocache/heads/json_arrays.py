"""Arrays as JSON that people can read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np


def rounded(array: np.ndarray) -> list:
    """Nested lists with 5 digits, NaN as None."""
    values = np.round(array.astype(np.float64), 5)
    return np.where(np.isnan(values), np.array(None), values).tolist()


def readable(value: Any, indent: int = 0) -> str:
    """JSON text with rows of arrays and short values on one line each."""
    flat = json.dumps(value, allow_nan=False, ensure_ascii=False)
    is_row = isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value)
    if not isinstance(value, (dict, list)) or is_row or (indent and len(flat) <= 90):
        return flat
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        lines = [f"{pad}{json.dumps(k)}: {readable(v, indent + 1)}" for k, v in value.items()]
    else:
        lines = [pad + readable(v, indent + 1) for v in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + "\n" + ",\n".join(lines) + "\n" + " " * indent + closing
