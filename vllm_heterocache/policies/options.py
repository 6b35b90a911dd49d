"""Checks of a policy's own options; each raises ValueError in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from vllm_heterocache.refusal import refuse

if TYPE_CHECKING:
    from vllm_heterocache.policies.policy import Policy


def check_whole(policy: Policy, name: str, least: int) -> None:
    """The option is an integer of at least `least`."""
    value = getattr(policy, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        _refuse(policy, name, f"it is a whole number of at least {least}")


def check_odd(policy: Policy, name: str) -> None:
    """The option is an odd integer of at least 1."""
    check_whole(policy, name, 1)
    if getattr(policy, name) % 2 == 0:
        _refuse(policy, name, "it counts a page and as many on either side, so it is odd")


def check_number(policy: Policy, name: str, least: float, most: float, open_end: bool) -> None:
    """The option is a number from `least` (without it where `open_end`) to `most`."""
    value = getattr(policy, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or (open_end and value == least):
        limits = f"{'above' if open_end else 'from'} {least:g} to {most:g}"
        _refuse(policy, name, f"it is a number {limits}")


def check_choice(policy: Policy, name: str, choices: tuple[str, ...]) -> None:
    """The option is one of `choices`."""
    if getattr(policy, name) not in choices:
        _refuse(policy, name, f"it is one of {', '.join(choices)}")


def _refuse(policy: Policy, name: str, reason: str) -> NoReturn:
    refuse(
        "policy_options",
        {name: getattr(policy, name)},
        f"{reason} (policy {policy.name!r})",
        "choose another value or remove it",
    )
