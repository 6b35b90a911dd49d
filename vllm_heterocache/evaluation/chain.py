"""Forced chains: facts hidden in a long text and asked for one by one during decode.

The prompt ends with the first question. Every later question is forced token by token
(forced_tokens.py), so it arrives as decode tokens, after the prompt was compacted; only the
answers are the model's own. A question at the end of the prompt would hardly test anything,
because pages are selected by the prompt's last query.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_heterocache.evaluation.sample import FREE
from vllm_heterocache.evaluation.words import NOUNS

if TYPE_CHECKING:
    from collections.abc import Sequence

# Chains of up to 32 facts use the first 32, so that the recorded ones stay what they are.
KEYS = (
    "Lisbon Oslo Cairo Quito Hanoi Dakar Sofia Lima Riga Tunis Accra Minsk Havana Nairobi "
    "Warsaw Zagreb Ankara Bogota Dublin Helsinki Jakarta Kigali Lagos Manila Ottawa Prague "
    "Rabat Seoul Taipei Vienna Zurich Athens "
    "Berlin Madrid Rome Paris London Moscow Tokyo Delhi Beijing Tehran Baghdad Damascus "
    "Amman Beirut Kabul Doha Muscat Colombo Bangkok Canberra Wellington Suva Caracas Santiago "
    "Montevideo Asuncion Brasilia Managua Kingston Nassau Reykjavik Luanda"
).split()
FEWER_KEYS = 32
ANSWER_DIGITS = 5


@dataclass(frozen=True)
class Wording:
    """How a fact is stated and asked: the answer follows the question's last word."""

    statement: str  # with {key} and {value}
    question: str  # with {key}
    keys: tuple[str, ...]
    num_words: int = 0  # the answer is so many words; 0: a number
    # With {key} and {other}: it is asked for `key`, and the value is stated for `other` alone.
    link: str | None = None


def _labels(letters: str) -> tuple[str, ...]:
    """64 labels such as B17, of a letter and two digits."""
    return tuple(f"{letters[i % len(letters)]}{11 + 7 * i % 89}" for i in range(64))


# None of them is among calibration's (calibration/wordings.py).
WORDINGS = {
    "magic": Wording(
        "The special magic number for {key} is: {value}.",
        "The special magic number for {key} is:",
        tuple(KEYS),
    ),
    "invoice": Wording(
        "Invoice {key} came to a total of {value} crowns.",
        "Invoice {key} came to a total of",
        _labels("JQUWYZ"),
    ),
    "register": Wording(
        "In the parish register, {key} is entered under {value} by the clerk.",
        "In the parish register, {key} is entered under",
        tuple(KEYS),
    ),
    "station": Wording(
        "At night, station {key} transmits at {value} kilohertz.",
        "At night, station {key} transmits at",
        _labels("OIQJ"),
    ),
    # Verbatim recall: words in an order that nothing but the text gives away.
    "copy": Wording(
        "The secret phrase of {key} is: {value}.",
        "The secret phrase of {key} is:",
        tuple(KEYS),
        num_words=12,
    ),
    # Two hops: the number stands with another name.
    "tracking": Wording(
        "The special magic number for {key} is: {value}.",
        "The special magic number for {key} is:",
        tuple(KEYS),
        link="The special magic number for {key} is the same as the one for {other}.",
    ),
}


@dataclass(frozen=True)
class Chain:
    """One context: prompt, the output tokens to force, and where the answers stand."""

    prompt: list[int]
    forced: list[int]
    answers: list[list[int]]  # expected tokens of each answer
    positions: list[int]  # output position of each answer's first token

    def sampling_kwargs(self) -> dict[str, Any]:
        """Arguments of SamplingParams for this chain."""
        return {
            "temperature": 0.0,
            "max_tokens": len(self.forced),
            "ignore_eos": True,
            "extra_args": {"forced_tokens": self.forced},
        }

    def correct(self, output_ids: list[int]) -> list[bool]:
        """Which answers are exactly right.

        Raises:
            ValueError: the output is shorter than the chain.
        """
        if len(output_ids) < len(self.forced):
            raise ValueError(f"output has {len(output_ids)} of {len(self.forced)} tokens")
        return [
            output_ids[start : start + len(answer)] == answer
            for start, answer in zip(self.positions, self.answers, strict=True)
        ]


def make_chain(
    tokenizer: Any,
    haystack: str,
    num_tokens: int,
    num_facts: int,
    seed: int,
    wording: Wording = WORDINGS["magic"],
) -> Chain:
    """Hide facts at random places of a text and ask for them in random order.

    Args:
        tokenizer: a Hugging Face tokenizer.
        haystack: text, at least about `num_tokens` tokens long.
        num_tokens: length of the prompt, first question included.
        num_facts: facts, at most as many as the wording has keys.
        seed: decides facts, places and order.
        wording: of statements and questions.

    Raises:
        ValueError: too many facts, or the prompt or the haystack is too short for them.
    """
    keys = wording.keys
    num_names = num_facts if wording.link is None else 2 * num_facts
    if num_names > len(keys):
        raise ValueError(f"num_facts={num_facts} is more than the {len(keys)} keys allow")
    if num_names <= FEWER_KEYS:
        keys = keys[:FEWER_KEYS]
    rng = random.Random(seed)
    facts = [(key, _value(wording, rng)) for key in rng.sample(keys, num_facts)]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def question(key: str) -> list[int]:
        return encode("\n" + wording.question.format(key=key))

    asked = rng.sample(facts, num_facts)
    sentences = [encode(" " + text) for text in _statements(wording, facts, keys, rng)]
    ending = encode("\n\n") + question(asked[0][0])
    room = num_tokens - len(ending) - sum(map(len, sentences))
    if room <= len(sentences):
        raise ValueError(f"num_tokens={num_tokens} leaves no room between {num_facts} facts")
    filler = encode(haystack)[:room]
    if len(filler) < room:
        raise ValueError(f"the haystack has {len(filler)} tokens and {room} are needed")
    prompt = hide(filler, sentences, rng) + ending
    forced, positions, answers = [], [], []
    for index, (key, value) in enumerate(asked):
        if index:
            forced += question(key)
        answer = encode(f" {value}")
        positions.append(len(forced))
        answers.append(answer)
        forced += [FREE] * len(answer)
    return Chain(prompt, forced, answers, positions)


def _value(wording: Wording, rng: random.Random) -> str:
    if wording.num_words:
        return " ".join(rng.sample(NOUNS, wording.num_words))
    return str(rng.randrange(10 ** (ANSWER_DIGITS - 1), 10**ANSWER_DIGITS))


def _statements(
    wording: Wording, facts: list[tuple[str, str]], keys: Sequence[str], rng: random.Random
) -> list[str]:
    """One sentence a fact, or two where its value is stated for another name."""
    if wording.link is None:
        return [wording.statement.format(key=key, value=value) for key, value in facts]
    others = rng.sample([key for key in keys if key not in dict(facts)], len(facts))
    sentences = []
    for (key, value), other in zip(facts, others, strict=True):
        sentences.append(wording.statement.format(key=other, value=value))
        sentences.append(wording.link.format(key=key, other=other))
    return sentences


def hide(filler: list[int], sentences: list[list[int]], rng: random.Random) -> list[int]:
    """Insert the sentences at random places, in random order."""
    places = sorted(rng.sample(range(1, len(filler)), len(sentences)))
    hidden, begin = [], 0
    for place, sentence in zip(places, rng.sample(sentences, len(sentences)), strict=True):
        hidden += filler[begin:place] + sentence
        begin = place
    return hidden + filler[begin:]
