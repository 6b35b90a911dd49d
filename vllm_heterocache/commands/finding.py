"""One line of a report on an installation or a model, and an error in one line."""

from __future__ import annotations

from typing import NamedTuple

GIB = 1 << 30


class Finding(NamedTuple):
    """One line of the report; `fix` says what to do and is empty when nothing is wrong."""

    subject: str
    detail: str
    fix: str = ""
    is_error: bool = False

    def __str__(self) -> str:
        mark = "FAIL" if self.is_error else "note" if self.fix else " ok "
        return f"[{mark}] {self.subject}: {self.detail}" + (
            f"\n       -> {self.fix}" * bool(self.fix)
        )


def in_one_line(error: Exception) -> str:
    """An error's message; of pydantic's report, which vLLM raises for its options, the first
    finding."""
    from pydantic import ValidationError

    text = str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        option = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        text = f"{option}={first['input']!r:.80}: {reason}" if option else reason
    return " ".join(text.split())
