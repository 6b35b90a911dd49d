"""Builds the token prompts of a calibration run and says which attention rows to measure in each.

Two kinds. Prose: a window of text whose last tokens play the decode steps. Needle: facts hidden in
prose or noise, asked and answered at the end. Texts are encoded piece by piece and the ids joined,
so that a value has the same ids where it is hidden and where it is the answer, with any tokenizer.
"""

from __future__ import annotations

import itertools
import random
import re
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_heterocache.calibration.wordings import FAMILIES, Fact, make_fact, noise_sentence

if TYPE_CHECKING:
    from collections.abc import Callable

TOP_SHARE = 0.2  # share of the columns in a top set: 1024 of 5000 in the reference code
POOL = 5  # neighbouring tokens averaged before the top set is taken
SHORTEST_PROMPT = 768  # tokens in which every kind of prompt still fits
SHORTEST_TEXT = 448  # tokens of prose without which top sets mean little
LONGEST_PIECE = 300  # characters of haystack between two places for a fact


@dataclass(frozen=True)
class CalibrationSizes:
    """How many prompts of each kind, and their lengths in tokens."""

    prose_prompts: int = 3
    prose_tokens: int = 2000  # the "prefill": columns of the top sets
    prose_steps: int = 64  # tokens after it, each a "decode step"
    needle_prompts: int = 12
    needle_tokens: int = 1600  # length of the longest; the shortest has three quarters of it
    facts_per_prompt: int = 6

    @classmethod
    def of_samples(cls, samples: int) -> CalibrationSizes:
        """The default lengths, with `samples` prose windows and needle prompts in proportion."""
        if samples < 1:
            raise ValueError(f"samples is {samples}, but calibration needs at least 1.")
        return cls(samples, needle_prompts=4 * samples)

    @property
    def longest_prompt(self) -> int:
        """Tokens, with a beginning-of-sequence token."""
        return 1 + max(self.prose_tokens + self.prose_steps, self.needle_tokens)

    def fit(self, max_prompt_tokens: int) -> CalibrationSizes:
        """The same with no prompt over `max_prompt_tokens`; ValueError below SHORTEST_PROMPT."""
        if max_prompt_tokens < SHORTEST_PROMPT:
            raise ValueError(
                f"max_model_len leaves {max_prompt_tokens} tokens for a prompt, but calibration "
                f"needs {SHORTEST_PROMPT}; raise max_model_len."
            )
        room = max_prompt_tokens - 1
        return replace(
            self,
            prose_tokens=min(self.prose_tokens, room - self.prose_steps),
            needle_tokens=min(self.needle_tokens, room),
        )


class ProbePrompt(NamedTuple):
    """One prompt and the probe spec (probe.py) that goes with it."""

    kind: str  # "prose" or "needle"
    token_ids: list[int]
    spec: dict


class PromptBuilder:
    """Makes the prompts of one calibration run; the same seed gives the same prompts.

    `tokenizer` needs encode(text, add_special_tokens=...).
    """

    def __init__(self, tokenizer: Any, text: str, sizes: CalibrationSizes, seed: int) -> None:
        self._tokenizer = tokenizer
        self._text = " ".join(text.split())
        self._sizes = sizes
        self._rng = random.Random(seed)
        # A beginning-of-sequence token is an attention sink: it stays in front if there is one.
        whole, bare = tokenizer.encode("a", add_special_tokens=True), self._encode("a")
        self._start = list(whole[: whole.index(bare[0])])

    def build(self) -> list[ProbePrompt]:
        """All prompts of the run; ValueError naming `text` if that is too short."""
        return self._prose() + self._needles()

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _prose(self) -> list[ProbePrompt]:
        """Windows spread evenly over the text; they overlap where the text is short."""
        sizes, ids = self._sizes, self._encode(self._text)
        if len(ids) < SHORTEST_TEXT:
            raise ValueError(
                f"text has {len(ids)} tokens, but calibration needs at least {SHORTEST_TEXT}; "
                "give a longer text file."
            )
        window = min(sizes.prose_tokens + sizes.prose_steps, len(ids))
        columns = len(self._start) + window - sizes.prose_steps
        sets = {
            "rows": list(range(columns - 1, columns + sizes.prose_steps)),
            "columns": columns,
            "top_k": round(TOP_SHARE * columns),
            "pool": POOL,
        }
        gaps = max(1, sizes.prose_prompts - 1)
        starts = [(len(ids) - window) * i // gaps for i in range(sizes.prose_prompts)]
        return [
            ProbePrompt(
                "prose", self._start + ids[start : start + window], {"sets": sets, "targets": []}
            )
            for start in starts
        ]

    def _needles(self) -> list[ProbePrompt]:
        """Families in turn, haystacks of noise and of prose in turn."""
        per_prompt, longest = self._sizes.facts_per_prompt, self._sizes.needle_tokens
        prompts = []
        for i in range(self._sizes.needle_prompts):
            pieces = self._prose_pieces() if i % 2 else lambda: noise_sentence(self._rng)
            taken: set[str] = set()
            chosen = [FAMILIES[(i * per_prompt + j) % len(FAMILIES)] for j in range(per_prompt)]
            facts = [make_fact(self._rng, family, taken) for family in chosen]
            distractors = [make_fact(self._rng, family, taken) for family in chosen]
            length = self._rng.randint(3 * longest // 4, longest)
            prompts.append(self._needle(facts, distractors, length, pieces))
        return prompts

    def _needle(
        self, facts: list[Fact], distractors: list[Fact], length: int, pieces: Callable[[], str]
    ) -> ProbePrompt:
        """Facts and like-worded distractors in a haystack, then the facts asked and answered."""
        asked = self._rng.sample(facts, len(facts))
        tail = [(self._encode(f"\n{f.question}"), self._encode(f" {f.value}")) for f in asked]
        tail_tokens = sum(len(question) + len(value) for question, value in tail)
        hidden = facts + distractors
        self._rng.shuffle(hidden)
        ids, spans = self._haystack(hidden, length - tail_tokens, pieces)
        targets = []
        for fact, (question, value) in zip(asked, tail, strict=True):
            ids += question
            # The row that predicts value token j is the one before it.
            targets += [[len(ids) - 1 + j, *spans[fact]] for j in range(len(value))]
            ids += value
        return ProbePrompt("needle", ids, {"sets": None, "targets": targets})

    def _haystack(
        self, hidden: list[Fact], length: int, pieces: Callable[[], str]
    ) -> tuple[list[int], dict[Fact, tuple[int, int]]]:
        """At most `length` tokens with the facts spread over them, and where each value lies."""
        statements = []
        for fact in hidden:
            before, after = fact.statement
            parts = (f" {before}", f" {fact.value}", after)
            statements.append([self._encode(part) for part in parts])
        ids, spans = list(self._start), {}
        filler = length - len(ids) - sum(len(part) for s in statements for part in s)
        used = 0

        def fill(until: float) -> None:
            nonlocal used
            while used < until:
                piece = self._encode(f" {pieces()}")[: filler - used]
                ids.extend(piece)
                used += len(piece)

        for i, (fact, (lead, value, rest)) in enumerate(zip(hidden, statements, strict=True)):
            fill(filler * (i + self._rng.random()) / len(hidden))
            ids += lead
            spans[fact] = (len(ids), len(ids) + len(value))
            ids += value + rest
        fill(filler)
        return ids, spans

    def _prose_pieces(self) -> Callable[[], str]:
        """Sentences of the text in order from a random one on, cyclic."""
        sentences = [
            piece
            for sentence in re.split(r"(?<=[.!?])\s+", self._text)
            for piece in textwrap.wrap(sentence, LONGEST_PIECE)
        ]
        start = self._rng.randrange(len(sentences))
        return itertools.cycle(sentences[start:] + sentences[:start]).__next__
