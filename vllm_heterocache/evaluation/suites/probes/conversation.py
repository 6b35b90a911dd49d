"""Probe `conversation`: 20 turns whose history grows, with a question about what was said before.

Sources: SCBench, arXiv 2412.10319, which asks in several turns about one context that the KV cache
keeps; and LoCoMo, arXiv 2402.17753, whose dialogues are long themselves. Here the first half of a
length is a text with hidden facts. Each turn says something new, with a fact of its own, and asks
for an older one, of the text and of earlier turns in alternation. Each turn is a request of its
own, whose prompt is all that was said before; the last one is nearly as long as the length asked
for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.chain import ANSWER_DIGITS, KEYS, WORDINGS, hide
from vllm_heterocache.evaluation.suites.probes.probe import Drawn, Probe
from vllm_heterocache.evaluation.suites.probes.source import check_room

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.suites.probes.source import Source

TURNS = 20
STATEMENT, QUESTION = WORDINGS["magic"].statement, WORDINGS["magic"].question
USER, ASSISTANT = "\n\nUser:", "\n\nAssistant: "


class Conversation:
    """`questions` is not heeded: there is one in each turn."""

    def draw(self, source: Source, rng: random.Random, length: int, questions: int) -> Drawn:
        keys = rng.sample(KEYS, TURNS + TURNS // 2)
        values = rng.sample(range(10 ** (ANSWER_DIGITS - 1), 10**ANSWER_DIGITS), len(keys))
        facts = list(zip(keys, map(str, values), strict=True))
        of_text, of_turns = facts[: TURNS // 2], facts[TURNS // 2 :]
        said = [source.encode(" " + STATEMENT.format(key=k, value=v)) for k, v in facts]
        told, noted = said[: TURNS // 2], said[TURNS // 2 :]
        asked = self._asked(of_text, of_turns, rng)
        asks = [source.encode(ASSISTANT + QUESTION.format(key=k)) for k, _ in asked]
        answers = [source.encode(f" {value}") for _, value in asked]
        user, opening = source.encode(USER), source.opening()
        room = length // 2 - len(opening) - sum(map(len, told))
        fixed = zip(noted, asks, answers, strict=True)
        rooms = [(length // 2) // TURNS - len(user) - sum(map(len, parts)) for parts in fixed]
        check_room("conversation", length, room, len(told) + 2)
        check_room("conversation", length, TURNS * min(rooms), TURNS * 2)
        text = source.filler("prose", room + sum(rooms))
        prompt = opening + hide(text[:room], told, rng)
        probes = []
        for own, fact, ask, answer in zip(rooms, noted, asks, answers, strict=True):
            words, text = text[room : room + own], text[own:]
            probes.append(Probe([user + hide(words, [fact], rng) + ask], [answer]))
        return Drawn(prompt, probes, in_turns=True)

    def _asked(
        self, of_text: list[tuple[str, str]], of_turns: list[tuple[str, str]], rng: random.Random
    ) -> list[tuple[str, str]]:
        """The fact asked for in each turn, each once: even turns ask for one of the text, odd ones
        for one of a turn before."""
        asked: list[tuple[str, str]] = []
        for turn in range(TURNS):
            before = of_text if turn % 2 == 0 else of_turns[:turn]
            asked.append(rng.choice([fact for fact in before if fact not in asked]))
        return asked
