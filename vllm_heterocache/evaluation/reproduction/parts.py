"""The evaluations that `heterocache reproduce` makes, each a command line of `heterocache eval`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_heterocache.policies import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable

BUDGETS = (0.2, 0.1, 0.05)
SMALL_BUDGETS = (0.1,)  # one engine beside stock's
PAPER_BUDGET = 0.3  # above the floors of the roles that the paper's authors have published
# The default, and each of its mechanisms switched off. Budgets in blocks are the same for all.
ABLATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"full_share": 0},  # no whole heads
    {"finder_share": 0},  # satellites of pivots that drift fetch, in place of finders
    {"drift_threshold": 0},  # nothing is fetched back
    {"matched_share": 0},  # means in place of matched tokens
    {"matched_share": 0.5, "evicted_means": False},  # as many matched tokens, no means among them
    {"evicted_means": False},  # neither means nor matched tokens
    {"even_budgets": True},  # budgets of compressed heads
    # all of them: without whole heads nobody leads, so nothing is fetched back
    {"full_share": 0, "finder_share": 0, "evicted_means": False, "even_budgets": True},
)
LEFT_OUT = ("full", "oracle")  # keeps everything; bounds what selection can reach
LONGBENCH = (
    "longbench_qasper longbench_multifieldqa_en longbench_hotpotqa longbench_2wikimqa "
    "longbench_musique longbench_triviaqa longbench_gov_report longbench_passage_retrieval_en"
)


def defaults(budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """Options of each engine but stock's: the defaults at each budget."""
    return [{"gpu_budget": budget} for budget in budgets]


def ablations(budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """The defaults without each mechanism at each budget, and the published method at its own."""
    found = [{"gpu_budget": budget} | one for budget in budgets for one in ABLATIONS]
    return [*found, {"gpu_budget": PAPER_BUDGET, "recipe": "paper"}]


def policies(budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """Every policy with its own defaults at each budget, `heterocache` with both recipes."""
    others = [name for name in POLICIES if name not in ("heterocache", *LEFT_OUT)]
    everyone = [{}, {"recipe": "paper"}, *({"policy": name} for name in others)]
    return [{"gpu_budget": budget} | one for budget in budgets for one in everyone]


class Part(NamedTuple):
    """One run of `heterocache eval`. Model, budgets and folder are added to its options."""

    about: str  # what is asked
    options: str  # words of the command line
    small: str  # the same for a few minutes on a CPU
    llm: dict[str, Any] = {}  # noqa: RUF012  arguments of vLLM's LLM()
    configurations: Callable[[tuple[float, ...]], list[dict[str, Any]]] = defaults
    budgets: tuple[float, ...] = BUDGETS

    def words(self, small: bool) -> list[str]:
        """Of the command line; an option's value has no blank."""
        words = (self.small if small else self.options).split()
        return words + (["--llm", json.dumps(self.llm, separators=(",", ":"))] if self.llm else [])


ABOUT_QUICK = (
    "Text is continued by its own tokens, and facts are asked for one by one during decode, in "
    "several wordings. Labels are the wordings `invoice` and `station`."
)
QUICK = (
    "--suite quick --tasks prose/register prose/invoice prose/station --seed 13 --samples 6 "
    "--set facts=32 --lengths"
)
SMALL_QUICK = (
    "--suite quick --tasks prose/register prose/station --seed 13 --lengths 2000 --samples 1 "
    "--set facts=8 --set tokens=32"
)
PARTS = {
    "quick": Part(ABOUT_QUICK, f"{QUICK} 4000 16000 32000", SMALL_QUICK),
    "chain": Part(
        "Facts are asked for one by one during decode, in the easiest wording.",
        "--suite chain --seed 11 --lengths 4000 16000 32000 126000 --samples 2 --set facts=32 "
        "--batch 2",
        "--suite chain --seed 11 --lengths 2000 --samples 2 --set facts=8",
    ),
    "ruler": Part(
        "RULER's tasks but question answering. The question stands at the prompt's end.",
        "--suite ruler --seed 11 --lengths 4000 16000 32000 --samples 16",
        "--suite ruler --seed 11 --lengths 2000 --samples 3 --tasks niah_single_2 niah_multikey_1",
    ),
    "probes": Part(
        "Work on a long text beyond recall of a number, asked during decode.",
        "--suite probes --seed 5 --lengths 4000 16000 64000 --samples 2 --set questions=6 "
        "--batch 11",
        "--suite probes --seed 5 --lengths 2000 --samples 1 --set questions=2 "
        "--tasks multikey copy_prose",
        {"enable_prefix_caching": True},
    ),
    "lm_eval": Part(
        "LongBench by lm-eval's prompts and metrics, with the question asked during decode.",
        f"--suite lm_eval --seed 11 --lengths 16000 --samples 50 --tasks {LONGBENCH}",
        "--suite lm_eval --seed 11 --lengths 4000 --samples 2 --tasks longbench_hotpotqa",
    ),
    "ablations": Part(
        f"{ABOUT_QUICK} Each row leaves one mechanism of the default out.",
        f"{QUICK} 4000 16000 64000",
        SMALL_QUICK,
        configurations=ablations,
        budgets=(0.3, 0.2, 0.1, 0.05, 0.02),
    ),
    "policies": Part(
        f"{ABOUT_QUICK} Each row is another policy with its own defaults.",
        f"{QUICK} 4000 16000",
        SMALL_QUICK,
        configurations=policies,
        budgets=(0.2, 0.1),
    ),
}
# Of a run that names no parts. The others take many engines.
USUAL = ("quick", "chain", "ruler", "probes", "lm_eval")
