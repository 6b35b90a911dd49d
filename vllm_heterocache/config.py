"""The options of HeteroCache: one frozen dataclass, parsed and checked once at start-up."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from vllm_heterocache.kernels.values import PAGE_SIZE as PAGE_SIZE
from vllm_heterocache.kernels.values import Protected
from vllm_heterocache.refusal import Why, nearest, options, refuse

SECTION = "heterocache"
MAX_GIB = 10**6  # no host has as much; more is a slip
# Pages of the longest prompt that start-up plans for, 16 Mi tokens. Tables and kernels count pages
# in int32, so sums of a few such counts fit too.
MAX_PROMPT_PAGES = 1 << 20

ProtectedPages = Annotated[
    int,
    Field(ge=0, le=MAX_PROMPT_PAGES),
    Why(
        f"it counts pages of a prompt, and start-up plans for {MAX_PROMPT_PAGES:,} at most",
        f"choose 0 to {MAX_PROMPT_PAGES:,}, or remove it for the default",
    ),
]
Overlap = Annotated[
    float, Field(ge=0, le=1), Why("it is an overlap of two page sets", "choose 0 to 1")
]


DEFAULT_MATCHED_SHARE, DEFAULT_FINDER_SHARE = 0.5, 0.045  # docs/quality.md
# Budgets so small have twice the finders: the GPU's memory is better spent on them than on pages.
SMALL_BUDGET, SMALL_BUDGET_FINDER_SHARE = 0.05, 0.09


@options
class HeteroCacheConfig:
    """Options under `additional_config["heterocache"]`; every value is checked on construction.

    Raises ValueError in one sentence that names the option, the value, the reason and the fix.
    """

    gpu_budget: Annotated[
        float,
        Field(gt=0, le=1),
        Why(
            "it is the fraction of a prompt's KV that stays on the GPU",
            "choose a number above 0 and up to 1, such as 0.3",
        ),
    ] = 0.3
    """Fraction of a prompt's KV pages kept on the GPU over all heads, (0, 1]; 1.0 keeps all."""
    policy: Annotated[str, Why("it names a policy", 'write "heterocache", for example')] = (
        "heterocache"
    )
    """Which pages a head keeps or reads; see docs/policies.md."""
    policy_options: Annotated[
        dict[str, Any], Why("they are a JSON object", 'write {"window": 32}, or remove it')
    ] = field(default_factory=dict, hash=False)
    """Options of the policy itself; docs/policies.md lists them."""
    profile: Annotated[
        str,
        Field(min_length=1),
        Why(
            "it names a head profile",
            'give the path of a JSON file written by `heterocache calibrate`, or "auto"',
        ),
    ] = "auto"
    """Path of a head profile JSON; "auto" calibrates at the first start and caches the result."""
    recipe: Literal["retrieval", "paper"] = "retrieval"
    """How roles are made from the profile: "retrieval" or "paper"."""
    full_share: Annotated[
        float | None,
        Field(ge=0, lt=1),
        Why(
            "it is the share of the GPU budget for heads kept whole, the rest must get pages",
            "choose a number from 0 up to but not including 1, such as 0.5, or remove it for the "
            "recipe's own",
        ),
    ] = None
    """Retrieval recipe: share of the GPU budget spent on heads kept whole (pivots), [0, 1); None:
    half of it, and less where the other heads would keep too little (heads/recipes.py); 0: no head
    is whole, so none leads others, and only finders fetch."""
    finder_share: Annotated[
        float | None,
        Field(ge=0, lt=1),
        Why(
            "it is the share of the KV heads that find their pages by their own attention",
            "choose a number from 0 up to but not including 1, such as 0.09, or remove it for the "
            "recipe's own",
        ),
    ] = None
    """Retrieval recipe: share of the KV heads that are finders, the compressed ones of the highest
    retrieval score; only they fetch pages then. 0: none; None: DEFAULT_FINDER_SHARE of them with
    this recipe of policy heterocache, SMALL_BUDGET_FINDER_SHARE at budgets up to SMALL_BUDGET, but
    none where nothing is fetched (`drift_threshold` 0)."""
    even_budgets: Annotated[bool, Why("it is a switch", "write true or false")] = False
    """Give compressed heads equal budgets, whatever weights the recipe has."""
    evicted_means: Annotated[
        bool | None,
        Why("it is a switch", "write true or false, or remove it for the recipe's own"),
    ] = None
    """Leave a mean key and value behind for each run of about 16 evicted pages of a head; None:
    with the retrieval recipe of policy heterocache, where there are no matched tokens. Beside
    matched tokens None leaves some means among them, and False none."""
    matched_share: Annotated[
        float | None,
        Field(ge=0, lt=1),
        Why(
            "it is the share of a head's pages for matched tokens, beside those it selects",
            "choose a number from 0 up to but not including 1, such as 0.5, or remove it for the "
            "recipe's own",
        ),
    ] = None
    """Share of a compressed head's unprotected pages that hold matched tokens, fitted to stand for
    the tokens it evicts, [0, 1); 0: none; None: with the retrieval recipe of policy heterocache,
    where `evicted_means` is None too, what start-up makes of the model's heads
    (heads/matched_tokens.py), most often DEFAULT_MATCHED_SHARE. They take the place of means."""
    min_prompt_tokens: Annotated[int, Field(ge=1)] = 1024
    """Prompts with fewer tokens stay dense."""
    drift_threshold: Overlap = 0.7
    """Chance-corrected overlap under which a cluster drifted, [0, 1]; 0 never fetches."""
    drift_interval: Annotated[int, Field(ge=1)] = 2
    """Decode steps of a request between two checks of its drift."""
    sink_pages: ProtectedPages = 1
    """Pages at the start of a prompt that every head keeps."""
    recent_pages: ProtectedPages = 3
    """Pages at the end of a prompt that every head keeps."""
    stability_threshold: Overlap = 0.4
    """Paper recipe: stability (0 to 1) from which a head counts as stable (tau_stable)."""
    similarity_threshold: Overlap = 0.7
    """Paper recipe: similarity (0 to 1) from which a head joins a pivot (tau_sim)."""
    cpu_pool_gib: Annotated[
        float | None,
        Field(gt=0, le=MAX_GIB),
        Why(
            "offloaded pages need host memory",
            f"choose a number of GiB above 0 and up to {MAX_GIB:,}, or remove it for automatic "
            "sizing",
        ),
    ] = None
    """Host memory for offloaded pages, GiB per worker; None sizes it automatically."""
    debug_poison: Annotated[bool, Why("it is a switch", "write true or false")] = False
    """Fill freed KV blocks before anything else can use them, with NaN or, beside layers that vLLM
    serves, with large numbers; slow, for tests."""

    @property
    def min_pages(self) -> int:
        """Fewest pages a compressed head may hold: sinks, recent pages and one selected page."""
        return sum(self.protected) + 1

    @property
    def protected(self) -> Protected:
        """The pages of a prompt that every head keeps."""
        return Protected(self.sink_pages, self.recent_pages)

    @property
    def keeps_means(self) -> bool:
        """Whether heads keep means, and nothing else, of what they evict (`evicted_means`)."""
        if self.share_of_matched:
            return False
        return self._is_retrieval if self.evicted_means is None else self.evicted_means

    @property
    def share_of_matched(self) -> float:
        """`matched_share`, or what None stands for where the heads of the model are not known; 0
        where nothing is evicted."""
        if self.keeps_everything:
            return 0.0
        if self.matched_share is None:
            return DEFAULT_MATCHED_SHARE if self.leaves_share_of_matched else 0.0
        return self.matched_share

    @property
    def share_of_finders(self) -> float:
        """`finder_share`, or what None stands for."""
        if self.finder_share is not None:
            return self.finder_share
        if not (self._is_retrieval and self.watches_drift):
            return 0.0
        is_small = self.gpu_budget <= SMALL_BUDGET
        return SMALL_BUDGET_FINDER_SHARE if is_small else DEFAULT_FINDER_SHARE

    @property
    def leaves_share_of_matched(self) -> bool:
        """Whether `matched_share` is left to the recipe, which then has matched tokens."""
        is_unset = self.matched_share is None and self.evicted_means is None
        return is_unset and self._is_retrieval and not self.keeps_everything

    @property
    def mixes_means(self) -> bool:
        """Whether some of the tokens that matched tokens have room for are means."""
        return self.share_of_matched > 0 and self.evicted_means is not False

    @property
    def _is_retrieval(self) -> bool:
        return self.policy == "heterocache" and self.recipe == "retrieval"

    @property
    def watches_drift(self) -> bool:
        """False when nothing is ever fetched, so that no host memory is needed."""
        return self.drift_threshold > 0

    @property
    def keeps_everything(self) -> bool:
        """True when no prompt is ever compressed, so that no head profile is needed."""
        return self.gpu_budget == 1.0

    @classmethod
    def from_additional_config(cls, additional_config: dict[str, Any] | None) -> HeteroCacheConfig:
        """Parse vLLM's `additional_config`; a missing "heterocache" section means the defaults.

        Raises ValueError for an unknown key (with the nearest known one), a bad value, or an option
        beside the section.
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
        _check_nothing_is_outside(additional_config)
        section = additional_config.get(SECTION, {})
        if not isinstance(section, dict):
            refuse(
                SECTION,
                section,
                "the options of HeteroCache are a JSON object",
                'write {"heterocache": {"gpu_budget": 0.3}}',
            )
        return cls(**{str(key): value for key, value in section.items()})


def _check_section_name(additional_config: dict[str, Any]) -> None:
    """A misspelt section would be ignored in silence, and the server would run on defaults."""
    # Beside the section there may be others whose names begin like it, as the plan's does.
    likeness = 0.9 if SECTION in additional_config else 0.75
    for key in additional_config:
        if key != SECTION and nearest(str(key).lower(), [SECTION], likeness):
            refuse(
                str(key),
                additional_config[key],
                f"the section is called {SECTION!r}",
                f"rename it to {SECTION!r}",
            )


def _check_nothing_is_outside(additional_config: dict[str, Any]) -> None:
    """An option beside the section would be ignored in silence."""
    for key, value in additional_config.items():
        option = nearest(str(key).lower(), HeteroCacheConfig.__dataclass_fields__, 0.9)
        if option:
            refuse(
                str(key),
                value,
                f"options stand inside the section {SECTION!r}",
                f'write {{"{SECTION}": {{"{option}": ...}}}}',
            )
