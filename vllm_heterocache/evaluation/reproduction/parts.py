"""The evaluations that `heterocache reproduce` makes, each a command line of `heterocache eval`."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

BUDGETS = (0.2, 0.1, 0.05)
SMALL_BUDGETS = (0.1,)  # one engine beside stock's
PAPER_BUDGET = 0.3  # above the floors of the roles that the paper's authors have published
LONGBENCH = (
    "longbench_qasper longbench_multifieldqa_en longbench_hotpotqa longbench_2wikimqa "
    "longbench_musique longbench_triviaqa longbench_gov_report longbench_passage_retrieval_en"
)


class Part(NamedTuple):
    """One run of `heterocache eval`. Model, budgets and folder are added to its options."""

    about: str  # what is asked
    options: str  # words of the command line
    small: str  # the same for a few minutes on a CPU
    llm: dict[str, Any] = {}  # noqa: RUF012  arguments of vLLM's LLM()
    has_ablations: bool = False

    def words(self, small: bool) -> list[str]:
        """Of the command line; an option's value has no blank."""
        words = (self.small if small else self.options).split()
        return words + (["--llm", json.dumps(self.llm, separators=(",", ":"))] if self.llm else [])


PARTS = {
    "quick": Part(
        "Text is continued by its own tokens, and facts are asked for one by one during decode, in "
        "several wordings. KL is in nats a token. Labels are the wordings `invoice` and `station`.",
        "--suite quick --tasks prose/register prose/invoice prose/station --seed 13 "
        "--lengths 4000 16000 32000 --samples 6 --set facts=32",
        "--suite quick --tasks prose/register prose/station --seed 13 "
        "--lengths 2000 --samples 1 --set facts=8 --set tokens=32",
        has_ablations=True,
    ),
    "chain": Part(
        "Facts are asked for one by one during decode, in the easiest wording.",
        "--suite chain --seed 11 --lengths 4000 16000 32000 126000 --samples 2 --set facts=32 "
        "--batch 2",
        "--suite chain --seed 11 --lengths 2000 --samples 2",
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
}


def configurations(budgets: tuple[float, ...], ablations: bool) -> list[dict[str, Any]]:
    """Options of each engine but stock's: the defaults at each budget, and what they leave out."""
    found: list[dict[str, Any]] = [{"gpu_budget": budget} for budget in budgets]
    if ablations:
        found += [{"gpu_budget": budget, "matched_share": 0} for budget in budgets]  # means
        found += [{"gpu_budget": budget, "drift_threshold": 0} for budget in budgets]
        found.append({"gpu_budget": PAPER_BUDGET, "recipe": "paper"})
    return found
