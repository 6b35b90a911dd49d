"""Suite `chain`: facts asked one by one during decode, when the prompt is already compacted.

A task is HAYSTACK or HAYSTACK/WORDING: prose, noise or code, and how facts are stated (chain.py).
Wordings `copy` (phrases of 12 words, verbatim) and `tracking` (the number stands with another name)
ask for more than recall of a number.
`--set facts=N` hides N facts a context, 16 by default. Each fact is a unit of its own in intervals
and tests.

Questions come as forced decode tokens: they meet an already compacted prompt. With `--set
turns=true` they come as a conversation over the API does, each at the end of a further request's
prompt, which is compacted by its own last query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_heterocache.evaluation.chain import WORDINGS, Chain, make_chain
from vllm_heterocache.evaluation.haystacks import HAYSTACKS, piece
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suite_options import read_options
from vllm_heterocache.evaluation.text_metrics import common_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_WORDING = "magic"
OPTIONS = {"facts": 16, "turns": False}
CHARACTERS_PER_TOKEN = 12  # more than any of the haystacks has


class ChainSuite:
    name = "chain"

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        options = read_options(self.name, settings, OPTIONS)
        facts, in_turns = options["facts"], options["turns"]
        for task in settings.tasks or ("prose",):
            haystack, wording = _parts_of(task)
            text = HAYSTACKS[haystack]()
            for length in settings.lengths:
                for index in range(settings.num_samples):
                    chain = make_chain(
                        tokenizer,
                        piece(text, index, CHARACTERS_PER_TOKEN * length),
                        length,
                        facts,
                        settings.seed * 1000 + index,
                        WORDINGS[wording],
                    )
                    yield _sample(chain, task, length, facts, index, in_turns)

    def right(self, sample: Sample, tokens: list[int]) -> list[bool]:
        """Which of the sample's questions are answered exactly."""
        meta = sample.meta
        return [
            tokens[start : start + len(answer)] == answer
            for start, answer in zip(meta["positions"], meta["answers"], strict=True)
        ]

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        """score: share of answers that are exact; prefix: mean share of an answer's tokens before
        its first wrong one, which tells more of long answers."""
        right, meta = self.right(sample, tokens), sample.meta
        prefixes = [
            common_prefix(tokens[start : start + len(answer)], answer) / len(answer)
            for start, answer in zip(meta["positions"], meta["answers"], strict=True)
        ]
        return {
            "score": sum(right) / len(right),
            "prefix": sum(prefixes) / len(prefixes),
        }


def _parts_of(task: str) -> tuple[str, str]:
    haystack, _, wording = task.partition("/")
    wording = wording or DEFAULT_WORDING
    if haystack not in HAYSTACKS or wording not in WORDINGS:
        raise ValueError(
            f"--tasks {task} is no task of suite chain: use HAYSTACK or HAYSTACK/WORDING, with "
            f"HAYSTACK one of {', '.join(HAYSTACKS)} and WORDING one of {', '.join(WORDINGS)}"
        )
    return haystack, wording


def _sample(chain: Chain, task: str, length: int, facts: int, index: int, in_turns: bool) -> Sample:
    meta = {
        "task": task,
        "length": length,
        "facts": facts,
        "answers": chain.answers,
        "positions": chain.positions,
    }
    return Sample(
        id=f"chain-{task}-{length}-{facts}-{index}" + "-turns" * in_turns,
        prompt=chain.prompt,
        max_tokens=len(chain.forced),
        forced=chain.forced,
        in_turns=in_turns,
        meta=meta,
    )
