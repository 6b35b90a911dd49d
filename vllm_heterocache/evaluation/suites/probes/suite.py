"""The suite `probes`: tasks beyond recall of a number, with every question asked during decode.

A context is prefilled and compacted before anything is asked: all questions are forced tokens
(forced_tokens.py), the first one too, and each answer is a slot of its own (probe.py). The tasks'
modules name their sources and how these differ.

`--set questions=N` asks N questions a context, 8 by default; the answers are the units of intervals
and tests, and some tasks have several a question. With `--set turns=true` each question ends the
prompt of a further request, as in suite `chain`; task `conversation` always does so.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from vllm_heterocache.evaluation.prompt import make_frame
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suite_options import choose_tasks, read_options
from vllm_heterocache.evaluation.suites.probes.conversation import Conversation
from vllm_heterocache.evaluation.suites.probes.copying import Copying
from vllm_heterocache.evaluation.suites.probes.graph_walks import GraphWalk
from vllm_heterocache.evaluation.suites.probes.needles import MultiKey, MultiValue
from vllm_heterocache.evaluation.suites.probes.phase_switch import PhaseSwitch
from vllm_heterocache.evaluation.suites.probes.probe import lay_out, prefixes
from vllm_heterocache.evaluation.suites.probes.records import Records
from vllm_heterocache.evaluation.suites.probes.source import Source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_heterocache.evaluation.prompt import PromptFrame
    from vllm_heterocache.evaluation.suites.probes.probe import ProbeTask

TASKS: dict[str, ProbeTask] = {
    "multikey": MultiKey(),
    "multivalue": MultiValue(),
    "copy_prose": Copying("prose"),
    "copy_code": Copying("code"),
    "json": Records(),
    "conversation": Conversation(),
    "phase_switch": PhaseSwitch(),
    "graph_steps": GraphWalk("graph_steps", 2, in_steps=True),
    "graph_bfs": GraphWalk("graph_bfs", 2),
    "graph_parents": GraphWalk("graph_parents", 0),
}
OPTIONS = {"questions": 8, "turns": False}


class ProbesSuite:
    name = "probes"

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        options = read_options(self.name, settings, OPTIONS)
        frame = make_frame(tokenizer, False)
        for task in choose_tasks(self.name, settings, list(TASKS), list(TASKS)):
            for length in settings.lengths:
                for index in range(settings.num_samples):
                    yield _sample(frame, task, length, settings.seed, index, **options)

    def right(self, sample: Sample, tokens: list[int]) -> list[bool]:
        """Of each answer, in the order of the slots, whether it is given exactly."""
        return [share == 1 for share in _shares(sample, tokens)]

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        """score: share of answers that are exact; prefix: mean share of an answer's tokens before
        its first wrong one, which tells more of long answers."""
        shares = _shares(sample, tokens)
        exact = sum(share == 1 for share in shares)
        return {"score": exact / len(shares), "prefix": sum(shares) / len(shares)}


def _shares(sample: Sample, tokens: list[int]) -> list[float]:
    return [share for probe in sample.meta["probes"] for share in prefixes(probe, tokens)]


def _sample(
    frame: PromptFrame,
    task: str,
    length: int,
    seed: int,
    index: int,
    questions: int,
    turns: bool,
) -> Sample:
    name = f"{task}/{length}/{questions}/{seed}.{index}"
    source = Source(frame, seed * 7 + index, f"Text {name}")
    prompt, probes, in_turns = TASKS[task].draw(source, random.Random(name), length, questions)
    in_turns = in_turns or turns
    forced, laid_out = lay_out(probes)
    return Sample(
        id=f"probes/{name}" + "/turns" * in_turns,
        prompt=prompt,
        max_tokens=len(forced),
        forced=forced,
        in_turns=in_turns,
        meta={"task": task, "length": length, "probes": laid_out},
    )
