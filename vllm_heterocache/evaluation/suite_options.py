"""Reads what a suite takes from its settings: the tasks asked for and its own options."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_heterocache.evaluation.sample import SuiteSettings

_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def choose_tasks(
    suite: str, settings: SuiteSettings, known: Sequence[str], default: Sequence[str]
) -> list[str]:
    """The tasks to run, in the order asked for.

    Args:
        suite: name of the suite, for the error.
        known: every task of the suite.
        default: the tasks where the user names none.

    Raises:
        ValueError: a task asked for is not known.
    """
    if settings.tasks is None:
        return list(default)
    for task in settings.tasks:
        if task not in known:
            raise ValueError(
                f"--tasks {task} is not a task of --suite {suite}; choose from {', '.join(known)}."
            )
    return list(dict.fromkeys(settings.tasks))


def read_options(suite: str, settings: SuiteSettings, defaults: dict[str, Any]) -> dict[str, Any]:
    """`settings.extra` over `defaults`, each value brought to the type of its default.

    Raises:
        ValueError: an option the suite does not have, a value of another type, or a number below 1.
    """
    options = dict(defaults)
    for name, value in settings.extra.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            hint = f"did you mean {near[0]}" if near else f"it has {', '.join(defaults)}"
            raise ValueError(f"--set {name}=... is not an option of --suite {suite}; {hint}.")
        options[name] = _convert(name, value, type(defaults[name]))
    return options


def _convert(name: str, value: Any, kind: type) -> Any:
    """`value` as a `kind`; text from the command line is parsed."""
    if kind is bool:
        truth = _TRUTHS.get(str(value).lower())
        if truth is None:
            raise ValueError(f"--set {name}={value} is neither true nor false.")
        return truth
    if kind is int and isinstance(value, bool | float):
        raise ValueError(f"--set {name}={value} is not of type int.")
    try:
        converted = kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"--set {name}={value} is not of type {kind.__name__}.") from None
    if kind is int and converted < 1:
        raise ValueError(f"--set {name}={value} is refused: it must be a whole number above 0.")
    return converted
