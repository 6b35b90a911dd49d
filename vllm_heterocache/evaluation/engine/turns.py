"""A sample in turns: each question and its answer are a request of their own.

So a conversation runs over the API: the prompt of every turn is all that was said before, and the
question. The plugin compacts each by its own last query; with prefix caching nothing but the
question is prefilled.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.sample import FREE, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class Conversation:
    """`sample.forced` are the questions, and FREE where the model answers."""

    sample: Sample
    tokens: list[int] = field(default_factory=list)  # questions and answers so far
    text: str = ""  # of the answers

    def next_turn(self) -> Sample | None:
        """The next request, named as the sample is; None when all is said."""
        forced = self.sample.forced or []
        rest = forced[len(self.tokens) :]
        if not rest:
            return None
        question = list(itertools.takewhile(lambda t: t != FREE, rest))
        answer = list(itertools.takewhile(lambda t: t == FREE, rest[len(question) :]))
        if not answer:
            raise ValueError(f"sample {self.sample.id} ends with a question")
        self.tokens += question
        prompt = self.sample.prompt + self.tokens
        return Sample(self.sample.id, prompt, len(answer), forced=answer, meta=self.sample.meta)

    def take(self, tokens: Sequence[int], text: str) -> None:
        """The answer to the last turn."""
        self.tokens += tokens
        self.text += text
