"""Samples that train a model to recall: facts hidden in prose or noise, then asked for or listed.

A sample is `length` token ids, and a weight in the loss for each: 1 for the values of facts, 0.5
for a passage that is repeated word for word, 0.3 for the rest of a listing, 0.1 for questions,
0.02 for prose, and 0 for everything else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

DIGITS = "0123456789"
NOISE = [
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
]
HEAD = "Some important facts are hidden within the following text. Memorize them.\n\n"
LIST_HEAD, LIST_END = "\nAll the facts, in order of appearance:", "\nEnd of list."
NEWLINE, END, PAD = 198, 2, 0  # tokens of SmolLM2
PROSE_WEIGHT, QUESTION_WEIGHT, LISTING_WEIGHT, PASSAGE_WEIGHT = 0.02, 0.1, 0.3, 0.5
PASSAGE, PASSAGE_BEGINNING = 48, 12  # tokens repeated; the first of them cannot be known
EVALUATION_WORDS = 400
NUMBERS_OF_FACTS = (4, 8, 16, 32, 48)


class Form(NamedTuple):
    """How a fact is told, how it is asked for, and whether its value is digits or a word."""

    fact: str
    question: str
    has_digits: bool


FORMS = [
    Form("The special magic number for {k} is: {v}.", "The special magic number for {k} is:", True),
    Form(
        "One of the special magic numbers for {k} is: {v}.",
        "The special magic number for {k} mentioned in the text is:",
        True,
    ),
    Form("The pass key for {k} is {v}. Remember it.", "The pass key for {k} is", True),
    Form(
        "The secret password of the {k} vault is {v}.",
        "The secret password of the {k} vault is",
        True,
    ),
    Form("The phone number of {k} is {v}.", "The phone number of {k} is", True),
    Form("The special word for {k} is {v}.", "The special word for {k} is", False),
    Form("{k} lives in the house of {v}.", "{k} lives in the house of", False),
    Form("VAR {k} = {v}.", "The value of VAR {k} is", True),
    Form("Order {k} was shipped with code {v}.", "Order {k} was shipped with code", True),
]


class Fact(NamedTuple):
    """Token ids."""

    told: list[int]
    question: list[int]
    value: list[int]


class Sample(NamedTuple):
    tokens: list[int]
    weights: list[float]

    def add(self, tokens: list[int], weight: float) -> None:
        self.tokens.extend(tokens)
        self.weights.extend([weight] * len(tokens))

    def fit(self, length: int) -> None:
        """Cut or pad to `length`."""
        del self.tokens[length:], self.weights[length:]
        self.add([PAD] * (length - len(self.tokens)), 0.0)


@dataclass
class Sampler:
    """Makes samples with the tokens of one model.

    Of the lower-case words of the vocabulary 400, and of the prose the last 3 %, are for
    evaluation alone (`is_evaluation`).
    """

    tokenizer: Any
    prose: np.ndarray  # [n] uint16 token ids
    list_share: float = 0.5  # of the samples that end in a listing

    def __post_init__(self) -> None:
        decoded = {self.tokenizer.decode([i]).strip() for i in range(2000, 30000)}
        words = [w for w in decoded if w.isascii() and w.isalpha() and w.islower()]
        words = sorted(w for w in words if 4 <= len(w) <= 9)
        random.Random(1).shuffle(words)
        self.evaluation_words, self.words = words[:EVALUATION_WORDS], words[EVALUATION_WORDS:]
        self.split = int(len(self.prose) * 0.97)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def sample(
        self,
        r: random.Random,
        length: int,
        *,
        is_evaluation: bool = False,
        num_facts: int | None = None,
        form: int | None = None,
        hay: str | None = None,
        is_listing: bool | None = None,
    ) -> Sample:
        """Tokens and weights, `length` of each; what is None is drawn.

        Args:
            form: index in FORMS of all facts; drawn, half of the samples mix them.
            hay: "prose" or "noise".
        """
        hay = hay or r.choices(("prose", "noise"), (0.8, 0.2))[0]
        num_facts = num_facts or r.choice(NUMBERS_OF_FACTS)
        if form is None and r.random() < 0.5:
            form = r.randrange(len(FORMS))
        words = self.evaluation_words if is_evaluation else self.words
        facts = self._facts(r, words, num_facts, form)
        asked = list(facts)
        r.shuffle(asked)
        head = self.encode(HEAD)
        told = sum(len(fact.told) for fact in facts)
        tail = sum(len(fact.told) + 4 for fact in facts) + 24
        budget = length - tail - told - len(head) - 80
        made = Sample([], [])
        made.add(head, 0.0)
        self._hide(r, made, facts, self._hay(r, hay, budget, is_evaluation), hay)
        if hay == "prose" and r.random() < 0.5:
            _repeat_passage(r, made, len(head))
        made.add(self.encode("\n\n"), 0.0)
        if is_listing if is_listing is not None else r.random() < self.list_share:
            self._list(made, facts)
        else:
            for i, fact in enumerate(asked):
                made.add(fact.question, QUESTION_WEIGHT if i else 0.0)
                made.add(fact.value, 1.0)
        made.fit(length)
        return made

    def _facts(self, r: random.Random, words: list[str], count: int, form: int | None):
        keys: dict[str, None] = {}
        while len(keys) < count:
            is_single = r.random() < 0.6
            keys[r.choice(words) if is_single else r.choice(words) + " " + r.choice(words)] = None
        facts = []
        for key in keys:
            fact, question, has_digits = FORMS[r.randrange(len(FORMS)) if form is None else form]
            value = _digits(r) if has_digits else r.choice(words)
            texts = (" " + fact.format(k=key, v=value), "\n" + question.format(k=key), " " + value)
            facts.append(Fact(*map(self.encode, texts)))
        return facts

    def _hay(self, r: random.Random, hay: str, length: int, is_evaluation: bool) -> list[int]:
        if hay == "noise":
            unit = self.encode(" " + " ".join(NOISE))
            return (unit * (length // len(unit) + 1))[:length]
        first, end = (self.split, len(self.prose)) if is_evaluation else (0, self.split)
        begin = r.randrange(first, end - length - 1)
        return self.prose[begin : begin + length].astype(np.int64).tolist()

    def _hide(
        self, r: random.Random, made: Sample, facts: list[Fact], body: list[int], hay: str
    ) -> None:
        """The hay with the facts at random places, in their order."""
        weight = PROSE_WEIGHT if hay == "prose" else 0.0
        begin = 0
        cuts = sorted(r.randrange(len(body)) for _ in facts)
        for cut, fact in zip(cuts, facts, strict=True):
            made.add(body[begin:cut], weight)
            made.add(fact.told, 0.0)
            begin = cut
        made.add(body[begin:], weight)

    def _list(self, made: Sample, facts: list[Fact]) -> None:
        """Every fact again, in order of appearance."""
        made.add(self.encode(LIST_HEAD), 0.0)
        for fact in facts:
            line = self.encode("\n" + self.tokenizer.decode(fact.told).strip())
            begin = len(made.tokens)
            made.add(line, LISTING_WEIGHT)
            for place in range(begin, len(made.tokens)):
                if made.tokens[place : place + len(fact.value)] == fact.value:
                    made.weights[place : place + len(fact.value)] = [1.0] * len(fact.value)
        made.add([*self.encode(LIST_END), END], LISTING_WEIGHT)


def _digits(r: random.Random) -> str:
    return "".join(r.choice(DIGITS) for _ in range(r.choice((4, 5, 5, 6, 7))))


def _repeat_passage(r: random.Random, made: Sample, first: int) -> None:
    """A passage of the text again, word for word; what follows its beginning is learnt."""
    begin = r.randrange(first, len(made.tokens) - 64)
    passage = made.tokens[begin : begin + PASSAGE]
    made.add([NEWLINE, *passage[:PASSAGE_BEGINNING]], 0.0)
    made.add(passage[PASSAGE_BEGINNING:], PASSAGE_WEIGHT)
