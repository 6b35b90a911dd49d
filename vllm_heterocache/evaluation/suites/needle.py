"""The suite `needle`: one sentence hidden at every depth of contexts of every length.

Source: G. Kamradt, Needle in a Haystack, github.com/gkamradt/LLMTest_NeedleInAHaystack. The prompt
and the task `sandwich` are its own; a language model judges the answers there, here it is the
share of the needle's words, as in later papers. The task `magic` hides a number that no model can
guess and scores 0 or 1. Prose is Python's reference unless --data has RULER's essays (prose.py).
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_heterocache.evaluation.prompt import PromptFrame, make_frame
from vllm_heterocache.evaluation.prose import Prose, load_prose, split_sentences
from vllm_heterocache.evaluation.sample import Sample, SuiteSettings
from vllm_heterocache.evaluation.suite_options import choose_tasks, read_options
from vllm_heterocache.evaluation.text_metrics import word_overlap

if TYPE_CHECKING:
    from collections.abc import Iterator

INTRODUCTION = (
    "You are a helpful AI bot that answers questions for a user. Keep your response short and "
    "direct.\n\n"
)
REQUEST = " Don't give information outside the document or repeat your findings."


class Needle(NamedTuple):
    statement: str
    question: str
    answer_prefix: str  # ends a plain prompt; a chat model answers in its own words
    answer: str
    max_tokens: int


def _magic(rng: random.Random, prose: Prose) -> Needle:
    key, value = rng.choice(prose.key_words), str(rng.randrange(10**6, 10**7))
    return Needle(
        f"The special magic number for {key} is: {value}.",
        f"What is the special magic number for {key}?",
        f" The special magic number for {key} is:",
        value,
        32,
    )


def _sandwich(rng: random.Random, prose: Prose) -> Needle:
    best, answer = "best thing to do in San Francisco is", "eat a sandwich and sit in Dolores Park"
    answer += " on a sunny day"
    question = "What is the best thing to do in San Francisco?"
    return Needle(f"The {best} {answer}.", question, f" The {best}", answer, 64)


NEEDLES = {"magic": _magic, "sandwich": _sandwich}


class NeedleSuite:
    """A grid of depths and lengths with `num_samples` prompts in each cell.

    --set depths=11 is the number of depths, evenly from 0 to 100 % of the context; --set chat=true
    asks in the model's chat template. Every prompt is exactly as long as asked for.
    """

    name = "needle"

    def samples(self, tokenizer: Any, settings: SuiteSettings) -> Iterator[Sample]:
        options = read_options(self.name, settings, {"chat": False, "depths": 11})
        if options["depths"] < 2:
            raise ValueError(f"--set depths={options['depths']} must be 2 or more.")
        depths = [round(100 * i / (options["depths"] - 1), 1) for i in range(options["depths"])]
        tasks = choose_tasks(self.name, settings, list(NEEDLES), ["magic"])
        frame = make_frame(tokenizer, options["chat"])
        prose = load_prose(settings.data)
        sentences = [frame.encode(f" {piece}") for piece in split_sentences(prose.text)]
        grid = itertools.product(tasks, settings.lengths, depths, range(settings.num_samples))
        for task, length, depth, index in grid:
            name = f"{task}/{length}/{depth}/{settings.seed}.{index}"
            rng = random.Random(name)
            needle = NEEDLES[task](rng, prose)
            start = rng.randrange(len(sentences))
            haystack = itertools.cycle(sentences[start:] + sentences[:start])
            yield Sample(
                id=f"needle/{name}",
                prompt=_hide(frame, needle, haystack, length, depth),
                max_tokens=needle.max_tokens,
                meta={"task": task, "length": length, "depth": depth, "answers": [needle.answer]},
            )

    def score(self, sample: Sample, tokens: list[int], text: str) -> dict[str, float]:
        (answer,) = sample.meta["answers"]
        if sample.task == "magic":
            return {"score": float(answer in text)}
        return {"score": word_overlap(text, answer)}


def _hide(
    frame: PromptFrame, needle: Needle, haystack: Iterator[list[int]], length: int, depth: float
) -> list[int]:
    """The prompt; the needle stands after the last sentence that ends before its depth.

    Raises:
        ValueError: `length` leaves no room for a haystack.
    """
    begin = frame.before + frame.encode(INTRODUCTION)
    hidden = frame.encode(f" {needle.statement}")
    question = f"\n\n{needle.question}{REQUEST}"
    if frame.chat:
        end = frame.encode(question) + frame.after
    else:
        end = frame.encode(f"{question}{needle.answer_prefix}")
    room = length - len(begin) - len(hidden) - len(end)
    if room <= len(hidden):
        raise ValueError(
            f"--lengths {length} is too short for --suite needle, whose question, needle and "
            f"some haystack take {length - room + len(hidden) + 1} tokens."
        )
    filler: list[int] = []
    place = 0
    while len(filler) < room:
        filler += next(haystack)
        if len(filler) <= room * depth / 100:
            place = len(filler)
    place = room if depth == 100 else place
    filler = filler[:room]
    return begin + filler[:place] + hidden + filler[place:] + end
