"""Local data sets: files of JSON, and which of their rows become samples."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_heterocache.evaluation.sample import SuiteSettings


def data_folder(suite: str, settings: SuiteSettings, layout: str) -> Path:
    """The path given by --data.

    Args:
        layout: what the suite expects there, for the error.

    Raises:
        ValueError: no --data, or nothing is there.
    """
    if settings.data is None:
        raise ValueError(f"--suite {suite} reads a local dataset: give --data DIR with {layout}.")
    if not settings.data.exists():
        raise ValueError(f"--data {settings.data} does not exist; it should hold {layout}.")
    return settings.data


def read_json(path: Path) -> Any:
    """The whole file as one JSON value; ValueError if it is not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--data: {path} is not JSON ({error}).") from None


def draw(num_rows: int, count: int, seed: int, task: str) -> list[int]:
    """Indices of `count` of the rows, in the data set's order; of all if there are fewer.

    The draw is random in the seed but nested: more samples contain the fewer.
    """
    order = list(range(num_rows))
    random.Random(f"{seed} {task}").shuffle(order)
    return sorted(order[:count])
