"""Probes `multikey` and `multivalue`: RULER's harder needles, asked during decode.

Source: Hsieh et al., RULER, arXiv 2404.06654, section 3, tasks niah_multikey_2 and niah_multivalue;
suite `ruler` has them as published. Here several questions are asked about one context, during
decode, and each number has a slot of its own, after the words that stand before it in a needle.
Contexts of multivalue have a key for each question, RULER's one. RULER's multi-query is what suite
`chain` asks: several keys of a number each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.chain import hide
from vllm_heterocache.evaluation.suites.probes.probe import Drawn, Probe
from vllm_heterocache.evaluation.suites.probes.source import check_room, fitting, of_one_length
from vllm_heterocache.evaluation.words import compounds

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.suites.probes.source import Source

NEEDLE = "One of the special magic numbers for {key} is: {value}."
VALUES = 4  # of each key of multivalue
LEAST_TOKENS = 12  # of a needle
SPARE = 4  # so many times more numbers are drawn than are needed, to have them of one length


def _numbers(source: Source, rng: random.Random, count: int) -> list[str]:
    """Distinct numbers of seven digits and of one number of tokens."""
    drawn = map(str, rng.sample(range(10**6, 10**7), SPARE * count))
    return of_one_length(source.encode, drawn)[:count]


def _ask(source: Source, key: str, values: list[str]) -> Probe:
    """The beginning of a needle, once for each value of the key."""
    lead = source.encode("\n" + NEEDLE.partition(" {value}")[0].format(key=key))
    answers = [source.encode(f" {value}") for value in values]
    return Probe([lead] * len(values), answers, any_order=True)


class MultiKey:
    """The whole context is needles; some of them are asked for."""

    def draw(self, source: Source, rng: random.Random, length: int, questions: int) -> Drawn:
        opening = source.opening()
        room = length - len(opening)
        keys = rng.sample(compounds(), max(questions, room // LEAST_TOKENS))
        values = _numbers(source, rng, len(keys))
        pairs = list(zip(keys, values, strict=True))
        lines = [source.encode(NEEDLE.format(key=k, value=v) + "\n") for k, v in pairs]
        check_room("multikey", length, room, sum(map(len, lines[:questions])))
        kept = fitting(lines, room)
        asked = rng.sample(pairs[: len(kept)], questions)
        probes = [_ask(source, key, [value]) for key, value in asked]
        return Drawn(opening + [token for line in kept for token in line], probes)


class MultiValue:
    """Needles hidden in prose, VALUES of them with each key."""

    def draw(self, source: Source, rng: random.Random, length: int, questions: int) -> Drawn:
        keys = rng.sample(compounds(), questions)
        values = _numbers(source, rng, VALUES * questions)
        of_key = {key: values[VALUES * i : VALUES * (i + 1)] for i, key in enumerate(keys)}
        pairs = [(key, value) for key, own in of_key.items() for value in own]
        needles = [source.encode(" " + NEEDLE.format(key=k, value=v)) for k, v in pairs]
        opening = source.opening()
        room = length - len(opening) - sum(map(len, needles))
        check_room("multivalue", length, room, len(needles) + 2)
        prompt = opening + hide(source.filler("prose", room), needles, rng)
        asked = rng.sample(keys, questions)
        return Drawn(prompt, [_ask(source, key, of_key[key]) for key in asked])
