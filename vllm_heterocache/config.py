"""The options of HeteroCache: one frozen dataclass, parsed and checked once at start-up."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from vllm_heterocache.kernels.values import PAGE_SIZE as PAGE_SIZE
from vllm_heterocache.kernels.values import Protected
from vllm_heterocache.refusal import refuse

RECIPES = ("retrieval", "paper")
SECTION = "heterocache"


@dataclass(frozen=True)
class HeteroCacheConfig:
    """Options under `additional_config["heterocache"]`; every value is checked on construction.

    Raises ValueError in one sentence that names the option, the value, the reason and the fix.
    """

    gpu_budget: float = 0.3
    """Fraction of a prompt's KV pages kept on the GPU over all heads, (0, 1]; 1.0 keeps all."""
    policy: str = "heterocache"
    """Which pages a head keeps or reads; see docs/policies.md."""
    policy_options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Options of the policy itself; docs/policies.md lists them."""
    profile: str = "auto"
    """Path of a head profile JSON; "auto" calibrates at the first start and caches the result."""
    recipe: str = "retrieval"
    """How roles are made from the profile: "retrieval" or "paper"."""
    full_share: float = 0.5
    """Retrieval recipe: share of the GPU budget spent on heads kept whole (pivots), [0, 1)."""
    evicted_means: bool | None = None
    """Leave a mean key and value behind for each run of about 16 evicted pages of a head; None:
    with the retrieval recipe of policy heterocache."""
    min_prompt_tokens: int = 1024
    """Prompts with fewer tokens stay dense."""
    drift_threshold: float = 0.7
    """Chance-corrected overlap under which a cluster is refreshed, [0, 1]; 0 never refreshes."""
    drift_interval: int = 2
    """Decode steps between two checks of a cluster; the clusters take turns."""
    sink_pages: int = 1
    """Pages at the start of a prompt that every head keeps."""
    recent_pages: int = 3
    """Pages at the end of a prompt that every head keeps."""
    stability_threshold: float = 0.4
    """Paper recipe: stability (0 to 1) from which a head counts as stable (tau_stable)."""
    similarity_threshold: float = 0.7
    """Paper recipe: similarity (0 to 1) from which a head joins a pivot (tau_sim)."""
    cpu_pool_gib: float | None = None
    """Host memory for offloaded pages, GiB per worker; None sizes it automatically."""
    debug_poison: bool = False
    """Fill freed KV blocks with NaN before anything else can use them; slow, for tests."""

    def __post_init__(self) -> None:
        for name in _FLOATS:
            value = getattr(self, name)
            if name == "cpu_pool_gib" and value is None:
                continue
            object.__setattr__(self, name, _as_float(name, value))
        for name in ("min_prompt_tokens", "drift_interval"):
            _check_int(name, getattr(self, name), minimum=1)
        for name in ("sink_pages", "recent_pages"):
            _check_int(name, getattr(self, name), minimum=0)
        self._check_ranges()
        self._check_switches()
        self._check_names()

    def _check_ranges(self) -> None:
        if not 0 < self.gpu_budget <= 1:
            refuse(
                "gpu_budget",
                self.gpu_budget,
                "it is the fraction of a prompt's KV that stays on the GPU",
                "choose a number above 0 and up to 1, such as 0.3",
            )
        if not 0 <= self.full_share < 1:
            refuse(
                "full_share",
                self.full_share,
                "it is the share of the GPU budget for heads kept whole, the rest must get pages",
                "choose a number from 0 up to but not including 1, such as 0.5",
            )
        for name in ("drift_threshold", "stability_threshold", "similarity_threshold"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                refuse(name, value, "it is an overlap of two page sets", "choose 0 to 1")
        if self.cpu_pool_gib is not None and not self.cpu_pool_gib > 0:
            refuse(
                "cpu_pool_gib",
                self.cpu_pool_gib,
                "offloaded pages need host memory",
                "choose a positive number of GiB or remove it for automatic sizing",
            )

    def _check_switches(self) -> None:
        if not isinstance(self.debug_poison, bool):
            refuse("debug_poison", self.debug_poison, "it is a switch", "write true or false")
        if not isinstance(self.evicted_means, bool | None):
            refuse(
                "evicted_means",
                self.evicted_means,
                "it is a switch",
                "write true or false, or remove it for the recipe's own",
            )

    def _check_names(self) -> None:
        if not isinstance(self.profile, str) or not self.profile:
            refuse(
                "profile",
                self.profile,
                "it names a head profile",
                'give the path of a JSON file written by `heterocache calibrate`, or "auto"',
            )
        if not isinstance(self.policy, str):
            refuse("policy", self.policy, "it names a policy", 'write "heterocache", for example')
        if not isinstance(self.policy_options, dict):
            refuse(
                "policy_options",
                self.policy_options,
                "they are a JSON object",
                'write {"window": 32}, or remove it',
            )
        if self.recipe not in RECIPES:
            refuse(
                "recipe",
                self.recipe,
                "there is no such recipe" + _nearest(self.recipe, RECIPES),
                f"choose one of {', '.join(RECIPES)}",
            )

    @property
    def min_pages(self) -> int:
        """Fewest pages a compressed head may hold: sinks, recent pages and one selected page."""
        return self.sink_pages + self.recent_pages + 1

    @property
    def protected(self) -> Protected:
        """The pages of a prompt that every head keeps."""
        return Protected(self.sink_pages, self.recent_pages)

    @property
    def keeps_means(self) -> bool:
        """Whether heads keep means of what they evict (`evicted_means`)."""
        if self.evicted_means is None:
            return self.policy == "heterocache" and self.recipe == "retrieval"
        return self.evicted_means

    @property
    def watches_drift(self) -> bool:
        """False when satellites are never refreshed, so that no host memory is needed."""
        return self.drift_threshold > 0

    @property
    def keeps_everything(self) -> bool:
        """True when no prompt is ever compressed, so that no head profile is needed."""
        return self.gpu_budget == 1.0

    @classmethod
    def from_additional_config(cls, additional_config: dict[str, Any] | None) -> HeteroCacheConfig:
        """Parse vLLM's `additional_config`; a missing "heterocache" section means the defaults.

        Raises ValueError for an unknown key (with the nearest known one) or a bad value.
        """
        if additional_config is None:
            return cls()
        if not isinstance(additional_config, dict):
            refuse(
                "additional_config",
                type(additional_config).__name__,
                "options are read from a JSON object",
                "use --additional-config '{\"heterocache\": {...}}'",
            )
        _check_section_name(additional_config)
        section = additional_config.get(SECTION, {})
        if not isinstance(section, dict):
            refuse(
                SECTION,
                section,
                "the options of HeteroCache are a JSON object",
                'write {"heterocache": {"gpu_budget": 0.3}}',
            )
        known = [f.name for f in dataclasses.fields(cls)]
        for key in section:
            if key not in known:
                refuse(
                    str(key),
                    section[key],
                    "there is no such option" + _nearest(str(key), known),
                    f"known options are {', '.join(known)}",
                )
        return cls(**section)


_FLOATS = (
    "gpu_budget",
    "full_share",
    "drift_threshold",
    "stability_threshold",
    "similarity_threshold",
    "cpu_pool_gib",
)


def _nearest(word: object, known: tuple[str, ...] | list[str]) -> str:
    matches = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _as_float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = type(value).__name__
        refuse(name, value, f"it must be a number, not {kind}", "write it without quotes")
    return float(value)


def _check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        kind = type(value).__name__
        refuse(name, value, f"it must be a whole number, not {kind}", "write it as an integer")
    if value < minimum:
        refuse(name, value, f"it must be at least {minimum}", "choose a larger number")


def _check_section_name(additional_config: dict[str, Any]) -> None:
    """A misspelt section would be ignored in silence, and the server would run on defaults."""
    if SECTION in additional_config:
        return
    for key in additional_config:
        if difflib.get_close_matches(str(key).lower(), [SECTION], n=1, cutoff=0.75):
            refuse(
                str(key),
                additional_config[key],
                f"the section is called {SECTION!r}",
                f"rename it to {SECTION!r}",
            )
