"""RULER's variable tracking, common words and frequent words: tasks over a whole context.

Source: arXiv 2404.06654, section 3, and variable_tracking.py, common_words_extraction.py and
freq_words_extraction.py of github.com/NVIDIA/RULER; see task.py.
"""

from __future__ import annotations

import itertools
import math
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.suites.ruler.task import NOISE, Drawn, hide_in_lines

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.prose import Prose

SHORT_LENGTH = 4096  # tokens under which RULER makes examples smaller
ZETA = math.pi**2 / 6  # zeta(2): the counts of frequent words add up to the size


@dataclass(frozen=True)
class VariableTracking:
    """A chain of assignments in noise, after one solved example. Size: lines of noise."""

    num_hops: int = 4
    max_tokens: int = 30
    any_answer: bool = False

    def least(self, length: int) -> int:
        return self.num_hops + 1

    def draw(self, rng: random.Random, size: int, length: int, prose: Prose) -> Drawn:
        # RULER fits the example to 500 tokens, with at least 5 lines
        example = self._chain(rng, 14 if length >= SHORT_LENGTH else 5, 3)
        solved = f"{example.text}{example.answer_prefix} {' '.join(example.answers)}\n"
        asked = self._chain(rng, size, 5)
        return asked._replace(text=f"{solved}\n{asked.text}")

    def _chain(self, rng: random.Random, num_lines: int, letters: int) -> Drawn:
        names: list[str] = []
        while len(names) <= self.num_hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        value = str(rng.randrange(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names)]
        context = hide_in_lines(rng, [NOISE] * num_lines, chain)
        text = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            f"\n\n{context}\nQuestion: Find all variables that are assigned the value {value} in "
            "the text above."
        )
        prefix = (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are: "
        )
        return Drawn(text, prefix, names)


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which 10 words are common, after one solved example. Size: words."""

    num_common: int = 10
    max_tokens: int = 120
    any_answer: bool = False

    def least(self, length: int) -> int:
        return self.num_common + 1

    def draw(self, rng: random.Random, size: int, length: int, prose: Prose) -> Drawn:
        if length < SHORT_LENGTH:
            example, asked = (20, 3, 1), (size, 6, 1)
        else:
            example, asked = (40, 10, 3), (size, 30, 3)
        solved = self._list(rng, prose, *example)
        answer = " ".join(f"{i}. {word}" for i, word in enumerate(solved.answers, 1))
        drawn = self._list(rng, prose, *asked)
        return drawn._replace(text=f"{solved.text}{solved.answer_prefix} {answer}\n{drawn.text}")

    def _list(
        self, rng: random.Random, prose: Prose, num_words: int, often: int, seldom: int
    ) -> Drawn:
        words = prose.draw_words(rng, num_words)
        common = words[: self.num_common]
        entries = common * often + words[self.num_common :] * seldom
        rng.shuffle(entries)
        context = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
        text = (
            "Below is a numbered list of words. In these words, some appear more often than "
            f"others. Memorize the ones that appear most often.\n{context}\nQuestion: What are "
            f"the {self.num_common} most common words in the above list?"
        )
        prefix = f" Answer: The top {self.num_common} words that appear most often in the list are:"
        return Drawn(text, prefix, common)


@dataclass(frozen=True)
class FrequentWords:
    """Coded words with zeta-distributed counts; the three most frequent. Size: words, about."""

    letters: int = 6
    max_tokens: int = 50
    any_answer: bool = False

    def least(self, length: int) -> int:
        return 80  # fewer and the third and fourth counts are equal

    def draw(self, rng: random.Random, size: int, length: int, prose: Prose) -> Drawn:
        words: dict[str, None] = {}  # a set that keeps its order
        while len(words) < max(length // 50, 5):
            words["".join(rng.choices(string.ascii_lowercase, k=self.letters))] = None
        ranked = ["...", *list(words)[1:]]  # the most frequent one is noise
        counts = [int(size * rank**-2 / ZETA) for rank in range(1, len(ranked) + 1)]
        coded = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        rng.shuffle(coded)
        text = (
            "Read the following coded text and track the frequency of each coded word. Find the "
            f"three most frequently appeared coded words. {' '.join(coded)}\nQuestion: Do not "
            "provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?"
        )
        prefix = (
            " Answer: According to the coded text above, the three most frequently appeared "
            "words are:"
        )
        return Drawn(text, prefix, ranked[1:4])
