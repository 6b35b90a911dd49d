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

from vllm_heterocache.evaluation.suites.probes.probe import Drawn, Probe
from vllm_heterocache.evaluation.suites.probes.source import check_room

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.suites.probes.source import Source

CUE_TOKENS = 16
END_TOKENS = 4  # of a cue, which stand together once in the text
ANSWER_TOKENS = 16
PASSAGE = CUE_TOKENS + ANSWER_TOKENS
QUESTION = "\n\nOnce more, the passage that begins like this:\n\n"


@dataclass(frozen=True)
class Copying:
    haystack: str

    def draw(self, source: Source, rng: random.Random, length: int, questions: int) -> Drawn:
        opening = source.opening()
        room = length - len(opening)
        check_room(f"copy_{self.haystack}", length, room, 2 * PASSAGE * questions)
        lines = source.lines(self.haystack, room)
        text = [token for line in lines for token in line][:room]
        begins = itertools.accumulate(map(len, lines[:-1]), initial=0)
        fit = [at for at, line in zip(begins, lines, strict=True) if len(line) > 1]
        starts = _apart(_ending_once(fit, text), rng)[:questions]
        if len(starts) < questions:
            raise ValueError(
                f"--tasks copy_{self.haystack} finds {len(starts)} passages to ask for at "
                f"--lengths {length}; take a larger length or fewer --set questions=N"
            )
        question = source.encode(QUESTION)
        probes = []
        for start in starts:
            cue, answer = text[start : start + CUE_TOKENS], text[start + CUE_TOKENS :]
            probes.append(Probe([question + cue], [answer[:ANSWER_TOKENS]]))
        return Drawn(opening + text, probes)


def _ending_once(starts: list[int], text: list[int]) -> list[int]:
    """Those from which a whole passage goes, with a cue whose end stands once in the text."""
    ends = Counter(tuple(text[i : i + END_TOKENS]) for i in range(len(text)))

    def end(start: int) -> tuple[int, ...]:
        return tuple(text[start + CUE_TOKENS - END_TOKENS : start + CUE_TOKENS])

    return [start for start in starts if start <= len(text) - PASSAGE and ends[end(start)] == 1]


def _apart(starts: list[int], rng: random.Random) -> list[int]:
    """Some of them in random order, whose passages do not overlap."""
    chosen: list[int] = []
    for start in rng.sample(starts, len(starts)):
        if all(abs(start - other) >= PASSAGE for other in chosen):
            chosen.append(start)
    return chosen
