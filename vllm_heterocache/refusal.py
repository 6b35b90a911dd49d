"""The one sentence with which an option is refused."""

from __future__ import annotations

from typing import NoReturn


def refuse(option: str, value: object, reason: str, fix: str) -> NoReturn:
    """Raise ValueError that names the option, its value, the reason and the fix."""
    raise ValueError(f"heterocache option {option}={value!r} is refused: {reason}; {fix}.")
