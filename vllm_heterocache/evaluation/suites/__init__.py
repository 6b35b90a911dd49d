"""The suites by name. Their modules are imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_heterocache.evaluation.sample import Suite

_PLACES = {
    "chain": "chain:ChainSuite",
    "fidelity": "fidelity:FidelitySuite",
    "quick": "quick:QuickSuite",
    "ruler": "ruler.suite:RulerSuite",
    "needle": "needle:NeedleSuite",
    "probes": "probes.suite:ProbesSuite",
    "lm_eval": "lm_eval:LmEvalSuite",
}


def _maker(place: str) -> Callable[[], Suite]:
    def make() -> Suite:
        module, name = place.split(":")
        found = importlib.import_module(f"vllm_heterocache.evaluation.suites.{module}")
        return getattr(found, name)()

    return make


SUITES: dict[str, Callable[[], Suite]] = {name: _maker(place) for name, place in _PLACES.items()}


def make_suite(name: str) -> Suite:
    """The suite called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in SUITES:
        raise ValueError(f"--suite {name} is not one of {', '.join(SUITES)}")
    return SUITES[name]()
