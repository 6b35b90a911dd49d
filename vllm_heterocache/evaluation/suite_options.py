"""Reads what a suite takes from its settings: the tasks asked for and its own options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from vllm_heterocache.refusal import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_heterocache.evaluation.sample import SuiteSettings

Number = Annotated[int, Field(ge=1)]


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
            near = nearest(name, defaults)
            hint = f"did you mean {near}" if near else f"it has {', '.join(defaults)}"
            raise ValueError(f"--set {name}=... is not an option of --suite {suite}; {hint}.")
        options[name] = _convert(name, value, type(defaults[name]))
    return options


def _convert(name: str, value: Any, kind: type) -> Any:
    """`value` as a `kind`; values are read as the text that the command line has."""
    try:
        return TypeAdapter(Number if kind is int else kind).validate_strings(str(value))
    except ValidationError as error:
        wrong = error.errors()[0]["type"]
    if wrong == "greater_than_equal":
        raise ValueError(f"--set {name}={value} is refused: it must be a whole number above 0.")
    wanted = "neither true nor false" if kind is bool else f"not of type {kind.__name__}"
    raise ValueError(f"--set {name}={value} is {wanted}.")
