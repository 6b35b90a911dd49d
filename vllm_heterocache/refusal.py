"""Options as checked dataclasses, the one sentence with which something is refused, and any error
in one line.

The command line imports this module for its help, so pydantic is imported where options are made.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
from typing import (
    TYPE_CHECKING,
    Any,
    NamedTuple,
    NoReturn,
    TypeVar,
    cast,
    dataclass_transform,
    get_args,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")
_MOST_SHOWN = 120  # letters of a name or a value; the rest is left out in the middle
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = _MOST_SHOWN
LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


class Sentence(NamedTuple):
    """What the user is told, as one sentence and in its two parts."""

    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}."


class Refusal(ValueError):
    """Its message is a `Sentence`, whose parts `heterocache doctor` shows apart."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem, fix)  # both are arguments, so that pickling keeps them
        self.sentence = Sentence(problem, fix)

    def __str__(self) -> str:
        return str(self.sentence)


class Why(NamedTuple):
    """In a field's `Annotated`: what is said of a value that has the right type and cannot work."""

    reason: str
    fix: str


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,)
)
def options(kind: type[T]) -> type[T]:
    """Make `kind` a frozen dataclass whose fields pydantic checks when an instance is made.

    Nothing is converted but a whole number where a fraction is meant. A bad value or an unknown
    name raises Refusal with the sentence of `refuse`.
    """
    import pydantic.dataclasses

    config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    checked: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(kind)
    construct = checked.__init__

    @functools.wraps(construct)
    def __init__(self: Any, **given: Any) -> None:
        first = None
        try:
            construct(self, **given)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
        if first is not None:
            _refuse_option(checked, first, given)

    checked.__init__ = __init__
    return cast("type[T]", checked)


def refuse(option: str, value: object, reason: str, fix: str) -> NoReturn:
    """Raise Refusal that names the option, its value, the reason and the fix."""
    shown = _BRIEF.repr(value)
    raise Refusal(f"heterocache option {option:.{_MOST_SHOWN}}={shown} is refused: {reason}", fix)


def nearest(word: object, known: Iterable[str], likeness: float = 0.5) -> str | None:
    """The name that `word` was probably meant to be; None where no name is like it (0 to 1)."""
    if not isinstance(word, str) or len(word) > _MOST_SHOWN:
        return None
    return next(iter(difflib.get_close_matches(word, known, 1, likeness)), None)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """What a reason ends with where a name is unknown; empty where no known name is like it."""
    near = nearest(word, known)
    return f" (did you mean {near!r}?)" if near else ""


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


def _refuse_option(kind: Any, first: Any, given: dict[str, Any]) -> NoReturn:
    """`refuse` with pydantic's first error. A policy's options are given in `policy_options`."""
    name, fields = str(first["loc"][0]), kind.__pydantic_fields__
    value = given.get(name)
    policy = getattr(kind, "name", None)
    if first["type"] == "unexpected_keyword_argument":
        lacks = "there is no such option"
        if policy:
            lacks = f"policy {policy!r} has no option {_BRIEF.repr(name)}"
        reason = lacks + did_you_mean(name, fields)
        fix = f"known options are {', '.join(fields) or 'none'}"
    else:
        reason, fix = _why(name, value, fields[name], first["type"])
        reason += f" (policy {policy!r})" if policy else ""
    if policy:
        refuse("policy_options", {name: value}, reason, fix)
    refuse(name, value, reason, fix)


def _why(name: str, value: object, field: Any, problem: str) -> Why:
    """The field's own `Why`, else one made of its limits; for a wrong type the latter's reason."""
    if problem == "literal_error":
        choices = get_args(field.annotation)
        reason = f"there is no such {name}{did_you_mean(value, choices)}"
        return Why(reason, f"choose one of {', '.join(choices)}")
    mistyped = problem in ("int_type", "float_type") and type(value) is not int  # nor too large
    own = next((why for why in field.metadata if isinstance(why, Why)), None)
    if own and not mistyped:
        return own
    wanted = ["it must be a whole number" if field.annotation is int else "it must be a number"]
    for one in field.metadata:
        wanted += [
            f"{word} {getattr(one, key):,}" for key, word in LIMITS.items() if hasattr(one, key)
        ]
    if mistyped:
        wanted.append(f"not {type(value).__name__}")
    if _is_quoted_number(value):
        fix = "write it without quotes"
    else:
        fix = own.fix if own else "choose another value or remove it"
    return Why(", ".join(wanted), fix)


def _is_quoted_number(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True
