"""Probes `copy_prose` and `copy_code`: passages of the text itself, once more and word by word.

Sources: Jelassi et al., Repeat After Me, arXiv 2402.01032, whose n-gram lookup gives the beginning
of a passage and asks how it goes on; and RepoQA, arXiv 2406.06025, which asks for a function of a
long code context verbatim. There strings are random, and the function is described. Here the text
is Python's reference or library. The first tokens from the beginning of a line are given, which
stand together once in the context, and those after them are expected. Wording `copy` of suite
`chain` asks for random words instead.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.suites.probes.probe import Drawn, Probe, ProbeTask
from vllm_heterocache.evaluation.suites.probes.source import check_room

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.suites.probes.source import Source

CUE_TOKENS = 16
ANSWER_TOKENS = 16
PASSAGE = CUE_TOKENS + ANSWER_TOKENS
QUESTION = "\n\nOnce more, the passage that begins like this:\n\n"


@dataclass(frozen=True)
class Copying(ProbeTask):
    haystack: str

    def draw(self, source: Source, rng: random.Random, length: int, questions: int) -> Drawn:
        opening = source.opening()
        room = length - len(opening)
        check_room(f"copy_{self.haystack}", length, room, 2 * PASSAGE * questions)
        lines = source.lines(self.haystack, room)
        text = [token for line in lines for token in line][:room]
        question = source.encode(QUESTION)
        probes = []
        for start in self._starts(lines, text, rng, length, questions):
            cue, answer = text[start : start + CUE_TOKENS], text[start + CUE_TOKENS :]
            probes.append(Probe([question + cue], [answer[:ANSWER_TOKENS]]))
        return Drawn(opening + text, probes)

    def _starts(
        self,
        lines: list[list[int]],
        text: list[int],
        rng: random.Random,
        length: int,
        questions: int,
    ) -> list[int]:
        """Where the passages begin: one in each part of the text, in random order."""
        begins = itertools.accumulate(map(len, lines), initial=0)
        whole = [b for b, line in zip(begins, lines, strict=False) if len(line) > 1]
        cues = Counter(tuple(text[i : i + CUE_TOKENS]) for i in range(len(text)))
        part = len(text) // questions
        starts = []
        for index in range(questions):
            last = min((index + 1) * part, len(text)) - PASSAGE
            fit = [b for b in whole if index * part <= b <= last]
            once = [b for b in fit if cues[tuple(text[b : b + CUE_TOKENS])] == 1]
            if not once:
                raise ValueError(
                    f"--tasks copy_{self.haystack} finds no passage to ask for in a part of "
                    f"--lengths {length}; take a larger length or fewer --set questions=N"
                )
            starts.append(rng.choice(once))
        return rng.sample(starts, len(starts))
