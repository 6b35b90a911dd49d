"""One line of a report on an installation or a model."""

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
